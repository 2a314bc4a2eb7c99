"""`gptjax predict`: labels of new text, by a fine-tuned run; a JSON object a line, in and out.

classify   {"label": "...", "probabilities": {"...": 0.9, ...}}
choose     {"label": 0, "probabilities": [0.9, ...]}, the number of the likeliest choice
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax import bucket, config, load_model
from gptjax import tokenizer as tokenizers
from gptjax.config import Config
from gptjax.errors import ConfigError, OutputError
from gptjax.finetune import examples, tokenize
from gptjax.finetune.classification import Classifier, probabilities
from gptjax.finetune.tokenize import SpecialTokens
from gptjax.runtime.progress import Progress


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    progress = Progress()
    count = predict(args.run, args.file, args.output, progress)
    progress.say(f"{args.output}: {count:,} lines")


def predict(path: str, file: str, output: str, progress: Progress) -> int:
    """Writes a line for each line of `file`, in their order; returns how many.

    A label in a line is ignored. Raises ConfigError for a run of another task,
    DataError for lines that cannot be used, before anything is computed, and OutputError.
    """
    cfg = config.load(path)
    task, labels = cfg.finetune.task, cfg.finetune.labels
    if not cfg.finetune.outputs:
        raise ConfigError([f"{path}: finetune.task={task}; predict is for classify and choose"])
    given = examples.read(file, task, "--file", labelled=False)
    tokenizer = tokenizers.load(bucket.path_of(path))
    texts = tokenize.encode(given, tokenizer)
    length = cfg.train.seq_len
    rows = tokenize.to_arrays(
        given, texts, SpecialTokens.of(tokenizer), length, labels, tokenizer.eos_id
    )
    if rows.cut:
        progress.say(f"{rows.cut:,} of {len(rows):,} cut to train.seq_len={length}")
    with load_model.load_model(path, say=progress.say) as model:
        scores_EK = Classifier(model.cfg, progress).scores(model.params, rows, "predict")
    lines = [
        _line(cfg, chances_K[: len(one.sequences) if not labels else None])
        for one, chances_K in zip(given.all, probabilities(scores_EK), strict=True)
    ]
    target = Path(output)
    try:
        partial = target.with_name(f".{target.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in lines))
        partial.replace(target)
    except OSError as error:
        raise OutputError(f"--output={output}: cannot be written: {error.strerror}") from None
    return len(lines)


def _line(cfg: Config, chances_K: np.ndarray) -> str:
    labels, best = cfg.finetune.labels, int(chances_K.argmax())
    if not labels:
        return json.dumps({"label": best, "probabilities": chances_K.tolist()})
    named = dict(zip(labels, chances_K.tolist(), strict=True))
    return json.dumps({"label": labels[best], "probabilities": named}, ensure_ascii=False)
