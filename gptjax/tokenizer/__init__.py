"""Tokenizers behind one interface: raw bytes, SentencePiece and Hugging Face.

The last two are loaded or trained. A tokenizer is a few files with a fingerprint. They are copied
into the token store and the run folder, and the fingerprint is checked at each use, so text is
never encoded with a different vocabulary.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptjax.config import TokenizerConfig
from gptjax.errors import DataError
from gptjax.tokenizer.huggingface import HuggingFaceTokenizer, read_files, train_huggingface
from gptjax.tokenizer.interface import FILES, SLICE, ByteTokenizer, Tokenizer
from gptjax.tokenizer.sentencepiece import SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "FILES",
    "SLICE",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load",
    "make",
    "train",
    "train_huggingface",
    "train_sentencepiece",
]


def load(folder: Any, start_id: int | None = None) -> Tokenizer:
    """The tokenizer whose files are in a folder (a pathlib or epath Path). Raises DataError.

    `start_id` opens documents and prompts; None: by the tokenizer's own convention.
    """
    for kind, name in FILES.items():
        if (folder / name).exists():
            try:
                tokenizer = _read(kind, folder / name)
            except DataError as error:
                raise DataError(f"{folder}: {error}") from None
            tokenizer.start_id = start_id
            return tokenizer
    raise DataError(f"{folder}: no tokenizer found; needs {' or '.join(FILES.values())}")


def _read(kind: str, file: Any) -> Tokenizer:
    if kind == "huggingface":
        return HuggingFaceTokenizer(read_files(file))
    return ByteTokenizer() if kind == "bytes" else SentencePieceTokenizer(file.read_bytes())


def make(cfg: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The configured tokenizer, loaded from `cfg.path` or trained on texts. Raises DataError."""
    if cfg.kind == "bytes":
        return ByteTokenizer()
    if not cfg.path:
        return train(texts, cfg)
    path = Path(cfg.path).expanduser()
    if path.is_dir():
        path /= FILES[cfg.kind]
    if not path.is_file():
        raise DataError(
            f"tokenizer.path={cfg.path}: no such file, and no folder with {FILES[cfg.kind]}"
        )
    try:
        return _read(cfg.kind, path)
    except DataError as error:
        raise DataError(f"tokenizer.path={cfg.path}: {error}") from None


def train(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """A tokenizer of the configured kind and algorithm, trained on texts. Raises DataError."""
    if cfg.kind == "huggingface":
        return train_huggingface(texts, cfg)
    return train_sentencepiece(texts, cfg)
