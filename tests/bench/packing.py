"""Packing whole documents into rows, and reading them beside windows of the same store.

    python tests/bench/packing.py

Prints the seconds that best fit alone takes, those that 400,000 documents of a store of 296 million
tokens take, and tokens per second of reading batches in turn, medians.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from gptjax.config import Config, DataConfig, TrainConfig
from gptjax.data import packing, store
from gptjax.data.loader import TrainData
from gptjax.data.mixture import Manifests
from gptjax.data.store import Manifest, Split, Writer

DOCUMENTS, VOCAB, BATCH, SEQ, STEPS, TURNS = 400_000, 50_000, 256, 2048, 4, 30


def make(folder: Path) -> Manifest:
    """A store of documents whose lengths are log-normal, 737 tokens in the mean."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.lognormal(6, 1.1, DOCUMENTS).astype(int).clip(1) + 1)
    tokens = rng.integers(1, VOCAB, int(ends[-1]) + 1).astype(np.uint16)
    tokens[0], tokens[ends] = 0, 0
    writer = Writer(folder / "train", store.token_dtype(VOCAB), 0)
    writer.append(tokens)
    hashes, checksums = writer.close()
    split = Split(DOCUMENTS, len(tokens), 1, hashes, checksums_sha256=checksums)
    return Manifest({"eos_id": 0, "vocab_size": VOCAB}, {}, {}, "<u2", {"train": split})


def main() -> None:
    for count in (DOCUMENTS, 10 * DOCUMENTS):
        costs = np.random.default_rng(0).lognormal(6, 1.2, count).astype(int).clip(1, SEQ)
        began = time.perf_counter()
        rows = packing.best_fit(costs, SEQ).max() + 1
        took = time.perf_counter() - began
        print(
            f"{count:,} documents: {rows:,} rows, at least {-(-costs.sum() // SEQ):,}, {took:.2f} s"
        )
    with tempfile.TemporaryDirectory() as name:
        manifest = make(Path(name))
        for length in (SEQ, 8192):
            began = time.perf_counter()
            packing.prepare(name, manifest, length, lambda line: print(line.split(": ", 1)[1]))
            print(f"packed in {time.perf_counter() - began:.2f} s")
        windows = Config(
            data=DataConfig(store=name), train=TrainConfig(seq_len=SEQ, batch_tokens=SEQ * BATCH)
        )
        packed = replace(windows, data=replace(windows.data, documents="mask", packing="documents"))
        both = {"windows": windows, "documents": packed}
        opened = {
            kind: TrainData.open(cfg, Manifests({"": manifest})) for kind, cfg in both.items()
        }
        times: dict[str, list[float]] = {kind: [] for kind in both}
        for turn in range(TURNS + 1):
            for kind, data in opened.items():
                began = time.perf_counter()
                data.read(range(STEPS * turn, STEPS * (turn + 1)))
                times[kind].append(time.perf_counter() - began)
        for kind, taken in times.items():
            median = statistics.median(taken[1:])
            print(f"{kind}: {STEPS * BATCH * SEQ / median / 1e6:.0f} million tokens/s")


if __name__ == "__main__":
    main()
