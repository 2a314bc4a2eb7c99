"""The tokenizer interface, and the byte tokenizer."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gptjax.config import TokenizerKind
from gptjax.tokenizer.round_trip import correction_bits

FILES: dict[TokenizerKind, str] = {  # the file that identifies each kind
    "huggingface": "tokenizer.json",
    "sentencepiece": "tokenizer.model",
    "bytes": "tokenizer.bytes",
}


class Tokenizer(ABC):
    """Converts text to token ids and back.

    Attributes: `vocab_size`, greater than every id; `eos_id`, which ends every document; `bos_id`,
    the declared beginning of a text, or None; `unk_id`, for text that has no other token, or None;
    `stop_ids`, each of which ends a generated text, `eos_id` first; `start_id`, which opens each
    document of the store that a run is trained on, and so each of its prompts: BOS, or else the EOS
    of the document before. It is None for a tokenizer whose own convention holds, as that of an
    imported model. `notes` say which of its declarations are left out.
    """

    kind: TokenizerKind
    vocab_size: int
    eos_id: int
    bos_id: int | None = None
    unk_id: int | None = None
    start_id: int | None = None
    notes: Sequence[str] = ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a document's text; no special token is added, and none is parsed."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens; invalid UTF-8 becomes U+FFFD."""

    def lost_bits(self, text: str) -> float:
        """Bits of a text that its tokens do not give back; 0 where they decode to it."""
        return correction_bits(valid_text(text), self.decode(self._encode_long(text).tolist()))

    @abstractmethod
    def piece(self, token: int) -> str:
        """The vocabulary entry of a token, for display."""

    @property
    def default_start_id(self) -> int:
        """The `start_id` of a new store: what the tokenizer puts before a text, or EOS."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def starts_by_itself(self) -> bool:
        """Whether prompts begin with `start_id` by the tokenizer's own convention too."""
        return self.start_id in (None, self.default_start_id)

    @property
    def prefix_id(self) -> int:
        """The token from which a text's first token is predicted.

        `start_id` or, by the tokenizer's own convention, BOS or else EOS, as in lm_eval.
        """
        if self.start_id is not None:
            return self.start_id
        return self.eos_id if self.bos_id is None else self.bos_id

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, which begins as a document does; never empty."""
        return [self.prefix_id, *self.encode(text)]

    def encode_documents(self, texts: Sequence[str], ends: Sequence[bool]) -> np.ndarray:
        """Token ids of all texts joined, uint32 [N].

        EOS follows each text that ends a document, and then `start_id` if it is another token.
        """
        between = [self.eos_id]
        if self.start_id not in (None, self.eos_id):
            between.append(self.start_id)
        parts = [np.zeros(0, np.uint32)]
        for text, end in zip(texts, ends, strict=True):
            parts += [self._encode_long(text), np.array(between if end else [], np.uint32)]
        return np.concatenate(parts)

    def _encode_long(self, text: str) -> np.ndarray:
        """The ids of `encode`, uint32 [N], computed as fast as possible."""
        return np.array(self.encode(text), np.uint32)

    @abstractmethod
    def serialized(self) -> bytes:
        """All that determines the tokenizer's behaviour."""

    def files(self) -> dict[str, bytes]:
        """Contents of its files by name; the last one identifies the kind."""
        return {FILES[self.kind]: self.serialized()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the kind and of all that determines the tokenizer's behaviour."""
        return hashlib.sha256(self.kind.encode() + b"\0" + self.serialized()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files into a folder, each atomically."""
        for name, contents in self.files().items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(contents)
            os.replace(partial, folder / name)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255; 256 is EOS, 257 is reserved for padding."""

    kind, vocab_size, eos_id = "bytes", 258, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        return f"<0x{token:02X}>" if token < 256 else "<eos>" if token == self.eos_id else "<pad>"

    def _encode_long(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint32)

    def serialized(self) -> bytes:
        return json.dumps({"kind": "bytes"}).encode()


def valid_text(text: str) -> str:
    """Replaces lone surrogates, which UTF-8 cannot encode, by question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


SLICE = 4096  # characters


def slices(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts into slices of SLICE characters, the sentences of the trainer."""
    for text in texts:
        plain = valid_text(text)
        for start in range(0, len(plain), SLICE):
            yield plain[start : start + SLICE]
