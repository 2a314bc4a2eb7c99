"""The split of documents into those that are trained on and those held out for validation.

The hash of its text decides on which side a document is: equal texts are on the same side, and a
document that is added moves no other.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptjax.config import Config
from gptjax.data.files import Counts, Document
from gptjax.data.sources import Source
from gptjax.errors import DataError

_LEAST_CUT = 0.01  # of a single document, at least this is held out


@dataclass(frozen=True)
class Split:
    """A rule that says of each document of data.sources where it belongs.

    A document is held out where the hash of its text, from 0 to 1, is below `fraction`. Where it is
    equal to one of data.valid_sources, whose hashes are `validation`, it is left out. A single
    document is trained on up to its character `cut`, and held out from there.

    A document that is longer than data.max_document_bytes is told by its first part.
    """

    fraction: float
    validation: frozenset[bytes] = frozenset()
    cut: int | None = None

    @classmethod
    def of(cls, cfg: Config, found: list[Source], held_out: list[Source]) -> "Split":
        """The configured split, with a document at least on each side of it.

        Reads data.valid_sources whole, and data.sources until both sides have a document. Raises
        DataError where that cannot be.
        """
        if held_out:
            validation = frozenset(_digest(text) for text, _ in _texts(cfg, held_out))
            if not validation:
                raise DataError(f"data.valid_sources={' '.join(cfg.data.valid_sources)}: no text")
            if all(_digest(text) in validation for text, _ in _texts(cfg, found)):
                raise DataError(_nothing(cfg, " that is not in data.valid_sources too"))
            return cls(0.0, validation)
        fraction, least, most = cfg.data.valid_fraction, math.inf, -math.inf
        documents = characters = 0
        for text, length in _texts(cfg, found):
            value = share(text)
            least, most = min(least, value), max(most, value)
            documents, characters = documents + 1, characters + length
            if least < fraction <= most:
                return cls(fraction)
        if not documents:
            raise DataError(_nothing(cfg))
        if documents == 1 and characters > 1:
            kept = int(characters * (1 - max(fraction, _LEAST_CUT)))
            return cls(0.0, cut=min(max(1, kept), characters - 1))
        if least == most:
            raise DataError(
                f"data.sources={' '.join(cfg.data.sources)}: all its documents are the same text, "
                "so none can be held out; give more text, or name data.valid_sources"
            )
        return cls(most if most < fraction else math.nextafter(least, 1))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rule."""
        rule = [self.fraction, self.cut, sorted(digest.hex() for digest in self.validation)]
        return hashlib.sha256(json.dumps(rule).encode()).hexdigest()

    def apply(
        self, documents: Iterator[Document], counts: Counts
    ) -> Iterator[tuple[str, Document]]:
        """The documents of data.sources, or their parts, each after "train" or "valid"."""
        side, begins, position = "", True, 0
        for document in documents:
            if self.cut is not None:
                yield from _cut(document, self.cut - position)
                position += len(document.text)
                continue
            if begins:
                side = self._side(document.text, counts)
            begins = document.ends
            if side:
                yield side, document

    def _side(self, text: str, counts: Counts) -> str:
        if self.validation and _digest(text) in self.validation:
            counts.in_validation += 1
            return ""
        return "valid" if share(text) < self.fraction else "train"


def share(text: str) -> float:
    """The hash of a document's text, from 0 to 1: below data.valid_fraction, it is held out."""
    return int.from_bytes(_digest(text)[:8], "big") / 2**64


def _cut(document: Document, place: int) -> Iterator[tuple[str, Document]]:
    """A part of the single document, or two, cut at a line's end before `place` if there is one.

    `place` counts characters from the part's beginning, and may be outside of it.
    """
    text, last = document.text, place <= len(document.text)
    place = min(max(place, 0), len(text))
    if place < len(text):
        place = text.rfind("\n", 0, place) + 1 or place
    if place:
        yield "train", Document(document.key, text[:place], last)
    if place < len(text):
        yield "valid", Document(document.key, text[place:], document.ends)


def _nothing(cfg: Config, more: str = "") -> str:
    return f"data.sources={' '.join(cfg.data.sources)}: no text to train on{more}"


def _texts(cfg: Config, found: list[Source]) -> Iterator[tuple[str, int]]:
    """The first part of each document, and the characters of the whole."""
    counts = Counts()
    documents = itertools.chain.from_iterable(s.documents(cfg.data, counts) for s in found)
    first, length = None, 0
    for document in documents:
        first = document.text if first is None else first
        length += len(document.text)
        if document.ends:
            yield first, length
            first, length = None, 0


def _digest(text: str) -> bytes:
    # The word before the text makes another draw: without it, nine tenths of the quickstart's
    # validation text are one file of Python 3.12.
    return hashlib.sha256(b"valid" + text.encode("utf-8", "replace")).digest()[:16]
