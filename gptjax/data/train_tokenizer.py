"""Training of a tokenizer on data sources, and its measurement on held-out text."""

import time
from dataclasses import dataclass
from pathlib import Path

from gptjax import tokenizer as tokenizers
from gptjax.config import Config
from gptjax.data import prepare
from gptjax.data.files import Counts
from gptjax.data.prepare import Tell
from gptjax.data.sources import Source, resolve
from gptjax.data.split import Split
from gptjax.errors import OutputError


@dataclass(frozen=True)
class Report:
    """The size, speed and compression of a trained tokenizer. Sizes are in bytes."""

    vocab_size: int
    trained_on: int
    train_seconds: float
    held_out: int
    held_out_documents: int
    held_out_tokens: int
    encode_seconds: float
    """Processor time of all threads, and so the time that one core would take."""

    def __str__(self) -> str:
        return (
            f"{self.vocab_size:,} pieces trained on {self.trained_on / 1e6:.2f} MB in "
            f"{self.train_seconds:.1f} s ({self.trained_on / 1e6 / self.train_seconds:.2f} MB/s); "
            f"encodes {self.held_out / 1e6 / self.encode_seconds:.2f} MB/s on one core and "
            f"{self.held_out / self.held_out_tokens:.3f} bytes per token, on the "
            f"{self.held_out / 1e6:.2f} MB of {self.held_out_documents:,} held-out documents"
        )


def train(cfg: Config, folder: Path, tell: Tell = lambda *_: None) -> Report:
    """Trains the configured tokenizer on the training documents and saves it into a folder.

    Measures it on documents that data.valid_fraction holds out, up to tokenizer.sample_bytes.

    Raises DataError for text that cannot be used, or too little of it; OutputError where the folder
    holds a tokenizer already or cannot be written.
    """
    if "://" in str(folder) or ":/" in str(folder):
        raise OutputError(f"{folder}: must be a local folder")
    found = resolve(cfg.data.sources)
    split = Split.of(cfg, found, [])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if existing := [name for name in tokenizers.FILES.values() if (folder / name).exists()]:
            raise OutputError(
                f"{folder}: holds a tokenizer already ({existing[0]}); give a new folder"
            )
        held_out = _held_out(cfg, found, split)
        texts = list(prepare.tokenizer_sample(cfg, found, split, tell))
        began = time.perf_counter()
        tokenizer = tokenizers.train(texts, cfg.tokenizer)
        train_seconds = time.perf_counter() - began
        tokenizer.save(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error}") from None
    began = time.process_time()
    tokens = tokenizer.encode_documents(held_out, [False] * len(held_out))
    encode_seconds = time.process_time() - began
    return Report(
        tokenizer.vocab_size,
        sum(map(_bytes, texts)),
        train_seconds,
        sum(map(_bytes, held_out)),
        len(held_out),
        len(tokens),
        encode_seconds,
    )


def _held_out(cfg: Config, found: list[Source], split: Split) -> list[str]:
    texts, size, counts = [], 0, Counts()
    documents = (d for source in found for d in source.documents(cfg.data, counts))
    for side, document in split.apply(documents, counts):
        if side == "valid":
            texts.append(document.text)
            size += _bytes(document.text)
        if size >= cfg.tokenizer.sample_bytes:
            break
    return texts


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))
