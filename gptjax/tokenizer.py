"""Tokenizers behind one interface: raw bytes, and SentencePiece models (loaded or trained).

A tokenizer is a file with a fingerprint. It is copied into the token store and into the run folder,
and whoever uses either checks the fingerprint, so text is never read with another vocabulary.
"""

import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import TokenizerConfig
from gptjax.errors import DataError

_KNOWN = 1 << 17  # units of text whose ids are remembered; some 25 MB
_KNOWN_LENGTH = 64  # characters of the longest one; longer ones seldom recur
_SLICE = 1 << 20  # characters of a text that are cut into units at once

# Ways to cut a text where no piece of a model may cross, finest first: Latin letters from all else,
# words with the spaces before them, lines.
_LETTERS = "A-Za-zªºÀ-ÖØ-öø-ʸḀ-ỿ"
_WORDS = (rf"\n| *(?:[{_LETTERS}]+|[^{_LETTERS} \n]+)| +", r"\n| *[^ \n]+| +")
_LINES = r"\n|[^\n]+"
_FILES = {"bytes": "tokenizer.bytes", "sentencepiece": "tokenizer.model"}


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes: `vocab_size`; `eos_id`, which ends every document and starts every prompt.
    """

    kind: str
    vocab_size: int
    eos_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with no special token added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens have none, invalid UTF-8 becomes U+FFFD."""

    def encode_documents(self, texts: Sequence[str], ends: Sequence[bool]) -> np.ndarray:
        """All texts one after the other, uint32; an EOS after each that ends a document."""
        parts = [np.zeros(0, np.uint32)]
        for text, end in zip(texts, ends, strict=True):
            parts += [self._encode_long(text), np.array([self.eos_id][:end], np.uint32)]
        return np.concatenate(parts)

    def _encode_long(self, text: str) -> np.ndarray:
        """The ids of `encode`, uint32, by the fastest way."""
        return np.array(self.encode(text), np.uint32)

    @abstractmethod
    def serialized(self) -> bytes:
        """The contents of the tokenizer's file."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the kind and the file's contents."""
        return hashlib.sha256(self.kind.encode() + b"\0" + self.serialized()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's file into a folder."""
        partial = folder / f".{_FILES[self.kind]}.partial"
        partial.write_bytes(self.serialized())
        os.replace(partial, folder / _FILES[self.kind])


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255; 256 is EOS, 257 is reserved for padding."""

    kind, vocab_size, eos_id = "bytes", 258, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def _encode_long(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint32)

    def serialized(self) -> bytes:
        return json.dumps({"kind": "bytes"}).encode()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo & Richardson 2018)."""

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.vocab_size()
        except RuntimeError as error:
            raise DataError(f"this is no SentencePiece model: {error}") from None
        if not self.vocab_size:
            raise DataError("this is no SentencePiece model: it has no pieces")
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(
                "this SentencePiece model has no end-of-sentence piece, which ends documents; "
                "train it with an eos_id"
            )
        self._units = _units(model)
        self._known = _Known(self._processor)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(_plain(text))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def _encode_long(self, text: str) -> np.ndarray:
        if self._units is None:
            return super()._encode_long(text)
        plain, known = _plain(text), self._known
        parts, start = [], 0
        while start < len(plain):
            end = plain.find("\n", start + _SLICE) + 1 or len(plain)
            parts += map(known.__getitem__, self._units.findall(plain, start, end))
            start = end
        return np.frombuffer(b"".join(parts), np.uint32)

    def serialized(self) -> bytes:
        return self._model


class _Known(dict[str, bytes]):
    """The ids of units of text, uint32; a unit is encoded when it is first met."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __missing__(self, unit: str) -> bytes:
        ids = np.array(self._processor.encode(unit), np.uint32).tobytes()
        if len(unit) <= _KNOWN_LENGTH:
            if len(self) >= _KNOWN:
                self.clear()
            self[unit] = ids
        return ids


def _plain(text: str) -> str:
    """Text without lone surrogates, which have no UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def load(folder: Any) -> Tokenizer:
    """The tokenizer whose file a folder, a pathlib or epath Path, holds. Raises DataError."""
    if (file := folder / _FILES["sentencepiece"]).exists():
        return SentencePieceTokenizer(file.read_bytes())
    if (folder / _FILES["bytes"]).exists():
        return ByteTokenizer()
    raise DataError(f"{folder}: holds no tokenizer ({' or '.join(_FILES.values())})")


def make(cfg: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The configured tokenizer: loaded from `cfg.path`, or trained on texts. Raises DataError."""
    if cfg.kind == "bytes":
        return ByteTokenizer()
    if cfg.path:
        path = Path(cfg.path).expanduser()
        if not path.is_file():
            raise DataError(f"tokenizer.path={cfg.path}: no such file")
        try:
            return SentencePieceTokenizer(path.read_bytes())
        except DataError as error:
            raise DataError(f"tokenizer.path={cfg.path}: {error}") from None
    return train_sentencepiece(texts, cfg)


def train_sentencepiece(texts: Iterable[str], cfg: TokenizerConfig) -> SentencePieceTokenizer:
    """Trains a model that encodes any text without loss.

    Bytes stand in for characters outside the vocabulary, text is not normalised, runs of spaces may
    become pieces, and a newline is a piece of its own. Raises DataError where the texts cannot fill
    the vocabulary.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_slices(texts),
            model_writer=model,
            model_type=cfg.algorithm,
            vocab_size=cfg.vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # 1.0 spends a quarter of 4096 pieces on single characters
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            max_sentence_length=4 * SLICE,  # in bytes; a longer one is dropped without a word
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise DataError(
            f"tokenizer.vocab_size={cfg.vocab_size}: training failed; give more text or ask for "
            f"fewer pieces ({reason})"
        ) from None
    # SentencePiece writes a space as U+2581, and so takes a real U+2581 for one. Spaces themselves
    # in the pieces encode the same and keep the two apart.
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in proto.pieces:
        piece.piece = piece.piece.replace("\u2581", " ")
    proto.normalizer_spec.escape_whitespaces = False
    return SentencePieceTokenizer(proto.SerializeToString())


SLICE = 4096  # characters


def _slices(texts: Iterable[str]) -> Iterator[str]:
    """Texts in slices, which the trainer takes for sentences."""
    for text in texts:
        plain = _plain(text)
        for start in range(0, len(plain), SLICE):
            yield plain[start : start + SLICE]


def _units(model: bytes) -> re.Pattern[str] | None:
    """The finest cut of a text whose units can be encoded one by one, if there is one.

    It is one that no piece crosses. Words are for BPE alone: its merges look no farther than the
    pieces that they join, while Unigram adds up the scores of a whole text, which rounds.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    spec, piece = proto.normalizer_spec, sentencepiece_model_pb2.ModelProto.SentencePiece
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces or spec.name != "identity":
        return None
    in_text = [p for p in proto.pieces if p.type not in (piece.BYTE, piece.CONTROL, piece.UNKNOWN)]
    if not any(p.piece == "\n" and p.type == piece.USER_DEFINED for p in in_text):
        return None
    trainer = proto.trainer_spec
    # An unknown character that has no bytes is merged with an unknown one before it.
    local = trainer.model_type == trainer.BPE and trainer.byte_fallback
    for pattern in (*_WORDS, _LINES) if local and not spec.escape_whitespaces else (_LINES,):
        units = re.compile(pattern)
        if all(units.fullmatch(p.piece) for p in in_text):
            return units
    return None
