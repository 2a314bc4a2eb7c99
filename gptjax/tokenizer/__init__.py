"""Tokenizers behind one interface: raw bytes, SentencePiece and Hugging Face.

The last two are loaded or trained. A tokenizer is a few files with a fingerprint. They are copied
into the token store and the run folder, and the fingerprint is checked at each use, so text is
never encoded with a different vocabulary.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptjax.config import TokenizerConfig, TokenizerKind
from gptjax.errors import DataError
from gptjax.tokenizer import bpe_files
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
    "config_of",
    "load",
    "make",
    "train",
    "train_huggingface",
    "train_sentencepiece",
]


def load(folder: Any, start_id: int | None = None) -> Tokenizer:
    """The tokenizer whose files are in a folder, as `bucket.path_of` has it. Raises DataError.

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
    try:
        return _of_path(cfg.kind, Path(cfg.path).expanduser())
    except DataError as error:
        raise DataError(f"tokenizer.path={cfg.path}: {error}") from None


def _of_path(kind: TokenizerKind, path: Path) -> Tokenizer:
    """The tokenizer in a file or a folder. Raises DataError."""
    plain = path / FILES[kind] if path.is_dir() else path
    if kind == "huggingface" and (path.is_file() or not plain.is_file()):
        if file := bpe_files.find(path):
            return HuggingFaceTokenizer(read_files(file, bpe_files.read(file)))
    elif bpe_files.is_ranks(plain):
        raise DataError("is a rank file of byte-level BPE; give --tokenizer.kind huggingface")
    if not plain.is_file():
        raise DataError(f"no such file, and no folder with {FILES[kind]}")
    return _read(kind, plain)


def config_of(path: str) -> TokenizerConfig:
    """The configuration of the tokenizer in a file or a folder, or of "bytes". Raises DataError."""
    if path == "bytes":
        return TokenizerConfig(kind="bytes")
    place = Path(path).expanduser()
    is_json = place.suffix == ".json" or (place / FILES["huggingface"]).is_file()
    kind: TokenizerKind = "sentencepiece"
    if is_json or bpe_files.find(place):
        kind = "huggingface"
    elif (place / FILES["bytes"]).is_file():
        kind = "bytes"
    return TokenizerConfig(kind=kind, path=path)


def train(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """A tokenizer of the configured kind and algorithm, trained on texts. Raises DataError."""
    if cfg.kind == "huggingface":
        return train_huggingface(texts, cfg)
    return train_sentencepiece(texts, cfg)
