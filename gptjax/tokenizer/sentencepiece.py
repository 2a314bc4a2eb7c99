"""SentencePiece tokenizers: loading, training, and fast encoding by caching repeated words."""

import importlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gptjax.config import TokenizerConfig
from gptjax.errors import DataError
from gptjax.tokenizer.interface import SLICE, Tokenizer, slices, valid_text

_CACHE_SIZE = 1 << 17  # units of text whose ids are cached; about 25 MB
_CACHED_LENGTH = 64  # characters of the longest cached unit; longer ones seldom recur
_SLICE = 1 << 20  # characters of a text that are cut into units at once
_SCORES = 64  # a trained Unigram model's scores are multiples of 1/64

# Ways to cut a text into units that no piece of a model may span, finest first: runs of Latin
# letters and of other characters, words with the spaces before them, lines.
_LETTERS = "A-Za-zªºÀ-ÖØ-öø-ʸḀ-ỿ"
_WORDS = (rf"\n| *(?:[{_LETTERS}]+|[^{_LETTERS} \n]+)| +", r"\n| *[^ \n]+| +")
_LINES = r"\n|[^\n]+"


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
            raise DataError(f"not a SentencePiece model: {error}") from None
        if not self.vocab_size:
            raise DataError("not a SentencePiece model: its vocabulary is empty")
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(
                "this SentencePiece model has no end-of-sentence token, which must end documents; "
                "train it with an eos_id"
            )
        if self._processor.bos_id() >= 0:
            self.bos_id = self._processor.bos_id()
        self.unk_id = self._processor.unk_id()
        self._units = _units(model)
        self._cache = _Cache(self._processor)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(valid_text(text))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def _encode_long(self, text: str) -> np.ndarray:
        if self._units is None:
            return super()._encode_long(text)
        plain, start = valid_text(text), 0
        parts: list[bytes] = []
        while start < len(plain):
            end = plain.find("\n", start + _SLICE) + 1 or len(plain)
            parts += map(self._cache.__getitem__, self._units.findall(plain, start, end))
            start = end
        return np.frombuffer(b"".join(parts), np.uint32)

    def serialized(self) -> bytes:
        return self._model


class _Cache(dict[str, bytes]):
    """Cached token ids of units of text, as uint32 bytes; a missing unit is encoded."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __missing__(self, unit: str) -> bytes:
        ids = np.array(self._processor.encode(unit), np.uint32).tobytes()
        if len(unit) <= _CACHED_LENGTH:
            if len(self) >= _CACHE_SIZE:
                self.clear()
            self[unit] = ids
        return ids


def train_sentencepiece(texts: Iterable[str], cfg: TokenizerConfig) -> SentencePieceTokenizer:
    """Trains a lossless model.

    Characters outside the vocabulary are encoded as bytes, text is not normalised, runs of spaces
    may become pieces, and a newline is always one piece. Raises DataError if the texts are too
    small for the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=slices(texts),
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
            max_sentence_length=4 * SLICE,  # in bytes; longer ones are dropped silently
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
            f"tokenizer.vocab_size={cfg.vocab_size}: training failed ({reason}); give more text, "
            "or lower it"
        ) from None
    # SentencePiece writes a space as U+2581, and so confuses a real U+2581 with it. Plain spaces in
    # the pieces encode alike and are unambiguous. Rounded, a Unigram model's scores have exact sums
    # in any precision, so that every implementation breaks a tie alike.
    proto = parse_model(model.getvalue())
    for piece in proto.pieces:
        piece.piece = piece.piece.replace("\u2581", " ")
        if cfg.algorithm == "unigram":
            piece.score = round(piece.score * _SCORES) / _SCORES
    proto.normalizer_spec.escape_whitespaces = False
    return SentencePieceTokenizer(proto.SerializeToString())


def parse_model(model: bytes) -> Any:
    """The protocol buffer of a serialized model."""
    protos: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    return protos.ModelProto.FromString(model)


def _units(model: bytes) -> re.Pattern[str] | None:
    """The finest way to cut text into units that may be encoded one by one, or None.

    No piece of the model spans two units. Words are only for BPE, whose merges depend on nothing
    but the merged pieces; Unigram adds the scores of a whole text, with rounding.
    """
    proto = parse_model(model)
    spec = proto.normalizer_spec
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces or spec.name != "identity":
        return None
    piece = type(proto).SentencePiece
    in_text = [p for p in proto.pieces if p.type not in (piece.BYTE, piece.CONTROL, piece.UNKNOWN)]
    if not any(p.piece == "\n" and p.type == piece.USER_DEFINED for p in in_text):
        return None
    trainer = proto.trainer_spec
    # Without byte fallback, successive unknown characters are merged into one unknown token.
    local = trainer.model_type == trainer.BPE and trainer.byte_fallback
    for pattern in (*_WORDS, _LINES) if local and not spec.escape_whitespaces else (_LINES,):
        units = re.compile(pattern)
        if all(units.fullmatch(p.piece) for p in in_text):
            return units
    return None
