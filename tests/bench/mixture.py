"""Compare reading a mixture of data with reading one source of the same text.

Stores of bytes are made of the Python library, as one source and as three parts by their first
letters; then blocks of 16 batches are read from each in turn. Prints tokens a second (medians), and
the ratio of the times.

Run: python tests/bench/mixture.py [--rounds 60]
"""

import argparse
import statistics
import sysconfig
import tempfile
import time
from dataclasses import replace

from gptjax.config import Config, DataConfig, MixturePart, TokenizerConfig, TrainConfig
from gptjax.data import loader, prepare_mixture

STEPS = 16


def configs(folder: str) -> dict[str, Config]:
    """The same text as one source and as a mixture."""
    library = sysconfig.get_path("stdlib")
    globs = [f"{library}/[{letters}]*.py" for letters in ("a-g", "h-p", "_q-z")]
    parts = {
        f"part{number}": MixturePart(weight, (glob,))
        for number, (glob, weight) in enumerate(zip(globs, (0.55, 0.35, 0.1), strict=True))
    }
    base = Config(tokenizer=TokenizerConfig(kind="bytes"), train=TrainConfig(seq_len=1024))
    single = DataConfig(sources=tuple(globs), store=f"{folder}/single")
    return {
        "single": replace(base, data=single),
        "mixture": replace(base, data=DataConfig(store=f"{folder}/mixed", mixture=parts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        for batch in (512, 32):
            opened, times = {}, {}
            for name, cfg in configs(folder).items():
                cfg = replace(cfg, train=replace(cfg.train, batch_tokens=batch * 1024))
                opened[name] = loader.TrainData.open(cfg, prepare_mixture.prepare_parts(cfg))
                opened[name].read(range(STEPS))
                times[name] = []
            for turn in range(rounds):
                for name, data in opened.items():
                    began = time.perf_counter()
                    data.read(range(STEPS * turn, STEPS * (turn + 1)))
                    times[name].append(time.perf_counter() - began)
            medians = {name: statistics.median(taken) for name, taken in times.items()}
            tokens = STEPS * batch * 1024 / 1e6
            rates = ", ".join(f"{name} {tokens / t:.0f}" for name, t in medians.items())
            print(
                f"batches of {batch} x 1024: {rates} million tokens/s; "
                f"time of the mixture / single {medians['mixture'] / medians['single']:.3f}"
            )


if __name__ == "__main__":
    main()
