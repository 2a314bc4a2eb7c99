"""What pre-training is worth to a small labelled task: after some lines of Python, is the next one
deeper, at the same depth, or shallower?

    python tests/bench/finetuning.py runs/quickstart --work /tmp/finetuning --sklearn PYTHON

The text is that of packages installed beside this one, which the quickstart's tokens are not of;
files, not passages, are split into train, valid and test. Four ways, three seeds each: fine-tuned
from RUN, from random parameters of the same model, from RUN with adapters alone, and (where PYTHON
has scikit-learn) TF-IDF with logistic regression. Learning rates, and the baseline's features and
strength, are chosen on validation examples, the rates on those of the first seed; test accuracy is
of what was chosen.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import CheckpointConfig
from gptjax.model import decoder
from gptjax.parallel import mesh

PACKAGES = ("flax", "jax", "keras", "numpy", "orbax", "tensorflow_datasets")
LINES, LONGEST, EVERY = 4, 240, 12
LABELS = ("deeper", "same", "shallower")
PER_LABEL = {"train": 200, "valid": 100, "test": 300}
EPOCHS, SEEDS = 4, (0, 1, 2)
ADAPTERS = (
    *("--finetune.lora.rank", 4, "--finetune.lora.alpha", 8),
    *("--finetune.lora.targets", "blocks/.*/attn/[qkvo]", "blocks/.*/mlp/(up|down)"),
)
RATES = {"pretrained": (3e-4, 1e-3), "random": (3e-4, 1e-3), "adapters": (3e-3, 1e-2)}

SKLEARN = """
import json, sys
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
read = lambda n: [json.loads(l) for l in open(f"{sys.argv[1]}/{n}.jsonl")]
sets = {n: ([r["text"] for r in read(n)], [r["label"] for r in read(n)]) for n in
        ("train", "valid", "test")}
best = None
for kind in (dict(token_pattern=r"\\w+|[^\\w\\s]|\\n *", ngram_range=(1, 3)),
             dict(token_pattern=r"[^\\W\\d_]+|[^\\w\\s]+", ngram_range=(1, 2)),
             dict(analyzer="char", ngram_range=(1, 5))):
    for strength in (1, 10, 100):
        model = make_pipeline(TfidfVectorizer(sublinear_tf=True, **kind),
                              LogisticRegression(C=strength, max_iter=2000))
        model.fit(*sets["train"])
        score = model.score(*sets["valid"])
        if best is None or score > best[0]:
            best = score, model.score(*sets["test"]), str(kind), strength
print(json.dumps(best))
"""


def split_of(path: str) -> str:
    """The split of a file, by a hash of its path."""
    place = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100
    return "train" if place < 50 else "valid" if place < 70 else "test"


def depth(line: str) -> int:
    """Its indentation, in columns."""
    return len(line) - len(line.lstrip())


@functools.cache
def passages() -> dict[tuple[str, str], list[str]]:
    """Texts by split and label: a few lines, and where the line after them is."""
    found: dict[tuple[str, str], list[str]] = {}
    for package in PACKAGES:
        (place,) = importlib.util.find_spec(package).submodule_search_locations
        for file in sorted(Path(place).rglob("*.py")):
            name = f"{package}/{file.relative_to(place).as_posix()}"
            lines = [line.rstrip() for line in file.read_text(errors="replace").splitlines()]
            lines = [line for line in lines if line]
            for i in range(2 * LINES, len(lines), EVERY):
                text = "\n".join(lines[i - LINES : i])
                step = depth(lines[i]) - depth(lines[i - 1])
                label = LABELS[0] if step > 0 else LABELS[2] if step < 0 else LABELS[1]
                if 40 <= len(text) <= LONGEST:
                    found.setdefault((split_of(name), label), []).append(text)
    return found


def write_examples(folder: Path, seed: int) -> None:
    """train.jsonl, valid.jsonl and test.jsonl; the seed draws the passages."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, count in PER_LABEL.items():
        lines = []
        for label in LABELS:
            texts = passages()[split, label]
            chosen = rng.choice(len(texts), count, replace=False)
            lines += [json.dumps({"text": texts[i], "label": label}) for i in chosen]
        (folder / f"{split}.jsonl").write_text("\n".join(rng.permutation(lines)) + "\n")


def random_run(base: str, target: Path, seed: int) -> str:
    """A run of the base's model and tokenizer with random parameters."""
    if not target.exists():
        target.mkdir(parents=True)
        for file in Path(base).iterdir():
            if file.is_file() and file.name.startswith(("config", "data", "tokenizer")):
                shutil.copyfile(file, target / file.name)
        cfg = config.load(base)
        with mesh.entered_mesh(cfg):
            key = jax.random.key(seed)
            params = jax.jit(lambda key: decoder.init(cfg.model, key))(key)
            checkpoints = Checkpointer(target / run_dir.CHECKPOINTS, CheckpointConfig())
            with checkpoints:
                checkpoints.save(0, {"step": jnp.int32(0), "params": params})
                checkpoints.finish()
    return str(target)


def gptjax(*words: object) -> str:
    """A command's standard output."""
    command = [sys.executable, "-m", "gptjax", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tuned(
    base: str, data: Path, out: Path, seed: int, rate: float, words: Sequence[object]
) -> dict[str, float]:
    """Fine-tunes; accuracy on valid, and the run."""
    told = gptjax(
        *("finetune", base, "--task", "classify", "--run", out),
        *("--data", data / "train.jsonl", "--valid", data / "valid.jsonl"),
        *("--optim.lr", rate, "--finetune.epochs", EPOCHS, "--train.seed", seed),
        *("--eval.every", 0, "--log.tensorboard", "False", "--compute.scan_layers", "True"),
        *words,
    )
    return json.loads(told.splitlines()[-1])


def tested(out: Path, data: Path) -> float:
    """Accuracy on test, through `gptjax predict`."""
    predicted = out / "test.jsonl"
    gptjax("predict", out, "--file", data / "test.jsonl", "--output", predicted)
    read = lambda file: [json.loads(line)["label"] for line in file.read_text().splitlines()]
    pairs = zip(read(predicted), read(data / "test.jsonl"), strict=True)
    return statistics.fmean(given == wanted for given, wanted in pairs)


def main() -> None:
    """Builds the task, trains, prints a line for each run and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sklearn", help="a Python with scikit-learn")
    args = parser.parse_args()
    began, rates, table = time.monotonic(), {}, {}
    say = lambda *words: print(f"[{time.monotonic() - began:5.0f} s]", *words, flush=True)
    for seed in SEEDS:
        data = args.work / f"data-{seed}"
        write_examples(data, seed)
        fresh = random_run(args.run, args.work / f"random-{seed}", seed)
        bases = {"pretrained": args.run, "random": fresh, "adapters": args.run}
        for way, base in bases.items():
            found = {}
            for rate in [rates[way]] if way in rates else RATES[way]:
                out, words = (
                    args.work / f"{way}-{seed}-{rate:g}",
                    ADAPTERS if way == "adapters" else (),
                )
                found[rate] = tuned(base, data, out, seed, rate, words)["valid_accuracy"]
                say(way, "seed", seed, "rate", rate, "valid accuracy", round(found[rate], 4))
            rates[way] = max(found, key=found.get)
            out = args.work / f"{way}-{seed}-{rates[way]:g}"
            table.setdefault(way, []).append(tested(out, data))
            say(way, "seed", seed, "rate", rates[way], "test accuracy", round(table[way][-1], 4))
        if args.sklearn:
            done = subprocess.run(
                [args.sklearn, "-c", SKLEARN, str(data)], check=True, capture_output=True, text=True
            )
            valid, test, *what = json.loads(done.stdout)
            table.setdefault("tf-idf", []).append(test)
            say("tf-idf seed", seed, "valid", round(valid, 4), "test", round(test, 4), *what)
    for way, values in table.items():
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"{way:12} {statistics.fmean(values):.3f}  ({each})  rate {rates.get(way, '-')}")


if __name__ == "__main__":
    main()
