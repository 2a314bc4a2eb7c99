"""What pre-training is worth to a small labelled task: which package do some lines of Python come
from?

    python tests/bench/finetuning.py runs/quickstart --work /tmp/finetuning --sklearn PYTHON

The text is that of packages installed beside this one, which the quickstart's tokens are not of.
Files, not passages, are split into train, valid and test; lines that import, that name one of the
packages or the short names that they go by, and licence headers are left out. Three ways, three
seeds each: fine-tuned from RUN, from random parameters of the same model, and (where PYTHON has
scikit-learn) TF-IDF with logistic regression. Learning rates, and the baseline's features and
strength, are chosen on the validation examples of the first seed; test accuracy is of what was
chosen.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config, run
from gptjax.checkpoint import Checkpoints
from gptjax.config import CheckpointConfig
from gptjax.model import decoder

PACKAGES = ("flax", "jax", "keras", "numpy", "orbax", "tensorflow_datasets")
GIVEAWAY = re.compile(
    r"^\s*(import|from)\s|copyright|license|\b("
    + "|".join(PACKAGES)
    + r"|np|jnp|nnx?|tf|tfds|array_api|lax|linen|dataset\w*|ocp|checkpoint\w*|epath)\b",
    re.IGNORECASE,
)
LINES, LONGEST = 6, 260
PER_LABEL = {"train": 64, "valid": 40, "test": 100}
EPOCHS, RATES, SEEDS = 4, (3e-4, 1e-3), (0, 1, 2)

SKLEARN = """
import json, sys
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
read = lambda n: [json.loads(l) for l in open(f"{sys.argv[1]}/{n}.jsonl")]
sets = {n: ([r["text"] for r in read(n)], [r["label"] for r in read(n)]) for n in
        ("train", "valid", "test")}
best = None
for kind in (dict(token_pattern=r"[^\\W\\d_]+|[^\\w\\s]+", ngram_range=(1, 2)),
             dict(analyzer="char_wb", ngram_range=(2, 5))):
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


@functools.cache
def passages(package: str) -> dict[str, list[str]]:
    """Stretches of a package's lines by split, each from a file's place of its own."""
    (place,) = importlib.util.find_spec(package).submodule_search_locations
    found: dict[str, list[str]] = {name: [] for name in PER_LABEL}
    for file in sorted(Path(place).rglob("*.py")):
        name = file.relative_to(place).as_posix()
        if "test" in name:
            continue
        lines = file.read_text(errors="replace").splitlines()
        kept = [line.rstrip() for line in lines if line.strip() and not GIVEAWAY.search(line)]
        for start in range(0, len(kept) - LINES + 1, 4 * LINES):
            text = "\n".join(kept[start : start + LINES])[:LONGEST]
            if len(text) > 80:
                found[split_of(f"{package}/{name}")].append(text)
    return found


def write_examples(folder: Path, seed: int) -> None:
    """train.jsonl, valid.jsonl and test.jsonl; the seed draws the passages."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    by_label = {package: passages(package) for package in PACKAGES}
    for split, count in PER_LABEL.items():
        lines = []
        for label, found in by_label.items():
            assert len(found[split]) >= count, (label, split, len(found[split]))
            chosen = rng.choice(len(found[split]), count, replace=False)
            lines += [json.dumps({"text": found[split][i], "label": label}) for i in chosen]
        (folder / f"{split}.jsonl").write_text("\n".join(rng.permutation(lines)) + "\n")


def random_run(base: str, target: Path, seed: int) -> str:
    """A run of the base's model and tokenizer with random parameters."""
    if not target.exists():
        target.mkdir(parents=True)
        for file in Path(base).iterdir():
            if file.is_file() and file.name.startswith(("config", "data", "tokenizer")):
                shutil.copyfile(file, target / file.name)
        cfg = config.load(base)
        with run.entered_mesh(cfg):
            key = jax.random.key(seed)
            params = jax.jit(lambda key: decoder.init(cfg.model, key))(key)
            checkpoints = Checkpoints(target / run.CHECKPOINTS, CheckpointConfig())
            with checkpoints:
                checkpoints.save(0, {"step": jnp.int32(0), "params": params})
                checkpoints.finish()
    return str(target)


def gptjax(*words: object) -> str:
    """A command's standard output."""
    command = [sys.executable, "-m", "gptjax", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tuned(base: str, data: Path, out: Path, seed: int, rate: float) -> dict[str, float]:
    """Fine-tunes; accuracy on valid, and the run."""
    told = gptjax(
        *("finetune", base, "--task", "classify", "--run", out),
        *("--data", data / "train.jsonl", "--valid", data / "valid.jsonl"),
        *("--optim.lr", rate, "--finetune.epochs", EPOCHS, "--train.seed", seed),
        *("--eval.every", 0, "--log.tensorboard", "False", "--compute.scan_layers", "True"),
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
        bases = {
            "pretrained": args.run,
            "random": random_run(args.run, args.work / f"random-{seed}", seed),
        }
        for way, base in bases.items():
            found = {}
            for rate in [rates[way]] if way in rates else RATES:
                out = args.work / f"{way}-{seed}-{rate:g}"
                found[rate] = tuned(base, data, out, seed, rate)["valid_accuracy"]
                say(way, "seed", seed, "rate", rate, "valid accuracy", round(found[rate], 4))
            rates[way] = max(found, key=found.get)
            table.setdefault(way, []).append(
                tested(args.work / f"{way}-{seed}-{rates[way]:g}", data)
            )
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
