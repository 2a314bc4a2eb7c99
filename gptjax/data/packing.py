"""Whole documents in rows of one length, in place of windows of the stream of all documents.

    STORE/packed-T/packed.json   counts, hashes, and the tokens that it was made of
    STORE/packed-T/pieces        of each piece its first token and its document, int64
    STORE/packed-T/lengths       tokens of each piece, int32
    STORE/packed-T/rows          the number of pieces before each row, and of all, int64

Best-fit decreasing (Ding et al. 2024, Fewer Truncations Improve Language Modeling): the longest
document first, each into the row with the least room that still holds it. A row ends where no
document fits. A document longer than a row fills rows by itself, and what is left of it begins a
row that others follow; so any other document in a row begins with its own beginning, which is how
training tells one from the next.

Documents are packed in blocks of their order in the store, so that memory is bounded.

Shapes: D documents, P pieces, R rows.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import bucket
from gptjax.data import store
from gptjax.data.journal import LOCK
from gptjax.data.store import Manifest, Reader
from gptjax.errors import DataError, OutputError
from gptjax.runtime import file_lock

FORMAT = 1
INDEX = "packed.json"
BLOCK = 1 << 22  # documents that are packed together
_SCANNED = 1 << 22  # tokens that are looked at at once
_NONE = np.zeros(0, np.int64)
_DTYPES = {"pieces": "<i8", "lengths": "<i4", "rows": "<i8"}


@dataclass(frozen=True)
class Counts:
    """What packing made of the training documents.

    cut: documents longer than a row. tokens: of all rows, without padding.
    """

    documents: int
    cut: int
    rows: int
    pieces: int
    tokens: int

    def told(self, seq_len: int) -> str:
        """The counts in a line."""
        padding = 1 - self.tokens / max(1, self.rows * (seq_len + 1))
        return (
            f"{self.documents:,} documents in {self.rows:,} rows of {seq_len:,} tokens, "
            f"{padding:.2%} of them padding; {self.cut:,} documents are longer than a row and cut"
        )


@dataclass(frozen=True)
class Packing:
    """The rows of a store's training documents.

    pieces_P2: first token and document of each piece. lengths_P: its tokens. rows_R: the number of
    pieces before each row, and of all.
    """

    counts: Counts
    pieces_P2: np.ndarray
    lengths_P: np.ndarray
    rows_R: np.ndarray

    def __len__(self) -> int:
        return self.counts.rows

    def read_into(
        self, windows_NW: np.ndarray, here: np.ndarray, numbers: np.ndarray, reader: Reader
    ) -> np.ndarray:
        """Reads rows of these numbers into the windows `here`; their numbers of targets, int32."""
        places, firsts, targets = [], [], np.empty(len(here), np.int32)
        for i, (window, number) in enumerate(zip(here.tolist(), numbers.tolist(), strict=True)):
            starts, lengths, _ = self.row(number)
            at = 0
            for length in lengths.tolist():
                places.append(windows_NW[window, at : at + length])
                at += length
            firsts.append(starts)
            targets[i] = at - 1
        reader.read_into(places, np.concatenate(firsts) if firsts else here[:0])
        return targets

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First token, length and document of each piece of a row, in their order."""
        own = slice(self.rows_R[number], self.rows_R[number + 1])
        return self.pieces_P2[own, 0], self.lengths_P[own], self.pieces_P2[own, 1]


# --- rows of a block -----------------------------------------------------------------------------


def best_fit(costs_D: np.ndarray, capacity: int, room_R: np.ndarray = _NONE) -> np.ndarray:
    """The row of each item by best-fit decreasing, int64 [D]; of rows with equal room the first.

    The first rows have the room of `room_R`, and further ones that of `capacity`. All items of one
    cost are placed together, so the time goes with the number of different costs.
    """
    row_D = np.empty(len(costs_D), np.int64)
    rooms: dict[int, np.ndarray] = {}
    sizes: list[int] = []  # of the rooms that any row has, ascending

    def leave(rows: np.ndarray, room: int) -> None:
        if room > 0 and len(rows):
            if room not in rooms:
                bisect.insort(sizes, room)
            rooms[room] = np.sort(np.concatenate([rooms.get(room, rows[:0]), rows]), kind="stable")

    for room in np.unique(room_R).tolist():
        leave(np.flatnonzero(room_R == room), room)
    opened = len(room_R)
    order_D = np.argsort(-costs_D, kind="stable")
    borders = np.flatnonzero(np.diff(costs_D[order_D], prepend=-1, append=-1))
    for first, last in itertools.pairwise(borders):
        items = order_D[first:last]
        cost = int(costs_D[items[0]])
        while len(items):
            at = bisect.bisect_left(sizes, cost)
            room = sizes.pop(at) if at < len(sizes) else capacity
            each = room // cost
            needed = -(-len(items) // each)
            if room in rooms:
                rows = rooms.pop(room)
                leave(rows[needed:], room)
            else:
                rows = np.arange(opened, opened + needed)
                opened += needed
            rows = rows[:needed]
            placed, items = items[: each * len(rows)], items[each * len(rows) :]
            row_D[placed] = np.repeat(rows, each)[: len(placed)]
            over = len(placed) - each * (len(rows) - 1)  # in the last of them
            leave(rows[:-1], room - each * cost)
            leave(rows[-1:], room - over * cost)
    return row_D


def _pack(starts_D: np.ndarray, first: int, seq_len: int, shared: bool) -> tuple[np.ndarray, ...]:
    """Pieces of a block's documents by row: first token, length and document, and each row's number
    of pieces.

    `starts_D` are the places of the documents' start tokens, and of the one after the last, and
    `first` is the first document's number. `shared`: a start token ends the document before, so a
    row has it for its first document only.
    """
    targets_D = np.diff(starts_D) - (not shared)
    numbers_D = np.arange(first, first + len(targets_D))
    whole_D, rest_D = np.divmod(targets_D, seq_len)
    long_D = targets_D > seq_len
    whole_D[~long_D] = 0
    # Rows that a long document fills: each shares a token with the next, as windows do.
    full = np.repeat(np.arange(len(whole_D)), whole_D)
    nth = np.arange(len(full)) - (np.cumsum(whole_D) - whole_D)[full]
    # Then the rests of long documents, each of which opens a row, and whole documents.
    opens = np.flatnonzero(long_D & (rest_D > 0))
    fits = np.flatnonzero(~long_D & (targets_D > 0))
    capacity, beside = (seq_len, 0) if shared else (seq_len + 1, 1)
    room = capacity - (rest_D[opens] + beside)
    rows = best_fit(targets_D[fits] + beside, capacity, room)
    begins = np.concatenate(
        [
            starts_D[full] + nth * seq_len,
            starts_D[opens] + whole_D[opens] * seq_len + shared,
            starts_D[fits] + shared,
        ]
    )
    lengths = np.concatenate(
        [np.full(len(full), seq_len + 1), rest_D[opens] + beside, targets_D[fits] + beside]
    )
    row = np.concatenate(
        [np.arange(len(full)), len(full) + np.arange(len(opens)), len(full) + rows]
    )
    document = numbers_D[np.concatenate([full, opens, fits])]
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row, minlength=1 if len(row) else 0)
    if shared:  # the start token of a row's first piece, or the token before a rest
        leading = order[(np.cumsum(counts) - counts).astype(np.int64)]
        leading = leading[leading >= len(full)]
        begins[leading] -= 1
        lengths[leading] += 1
    return begins[order], lengths[order], document[order], counts


def _starts(reader: Reader, start_id: int) -> Iterator[np.ndarray]:
    """Places of the tokens that open documents, in blocks that begin with the last of the one
    before."""
    found: list[np.ndarray] = []
    held = 0
    for first in range(0, len(reader), _SCANNED):
        length = min(_SCANNED, len(reader) - first)
        tokens = reader.windows(np.array([first]), length)[0]
        found.append(first + np.flatnonzero(tokens == start_id))
        held += len(found[-1])
        while held > BLOCK:
            together = np.concatenate(found)
            yield together[: BLOCK + 1]
            found, held = [together[BLOCK:]], len(together) - BLOCK
    yield np.concatenate(found)


# --- on disk -------------------------------------------------------------------------------------


def prepare(
    folder: str, manifest: Manifest, seq_len: int, say: Callable[[str], None] = lambda line: None
) -> None:
    """Packs a store's training documents into rows of a length, unless that was done.

    Raises DataError for a damaged store, OutputError where the folder cannot be written.
    """
    place = bucket.path_of(folder) / f"packed-{seq_len}"
    if "://" in folder or (place / INDEX).exists():
        return
    try:
        with file_lock.held(Path(folder) / LOCK, f"data.store={folder}", say):
            if (place / INDEX).exists():  # another run has made it meanwhile
                return
            counts = _write(folder, manifest, seq_len, Path(place))
    except OSError as error:
        raise OutputError(f"{place}: cannot be written: {error}") from None
    say(f"{folder}: {counts.told(seq_len)}")


def _write(folder: str, manifest: Manifest, seq_len: int, place: Path) -> Counts:
    """Writes the index of a packing, with the file that makes it valid last."""
    place.mkdir(exist_ok=True)  # of a run that was killed, perhaps
    digests = {name: hashlib.sha256() for name in _DTYPES}
    streams = {name: (place / name).open("wb") for name in _DTYPES}

    def append(name: str, values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values, _DTYPES[name]).tobytes()
        digests[name].update(raw)
        streams[name].write(raw)

    documents = cut = rows = pieces = tokens = 0
    reader = Reader(folder, "train", manifest)
    append("rows", np.zeros(1))
    for starts_D in _starts(reader, manifest.start_id):
        shared = manifest.start_id == manifest.eos_id
        begins, lengths, numbers, counts = _pack(starts_D, documents, seq_len, shared)
        append("pieces", np.stack([begins, numbers], 1))
        append("lengths", lengths)
        append("rows", pieces + np.cumsum(counts))
        documents += len(starts_D) - 1
        cut += int((np.diff(starts_D) - (not shared) > seq_len).sum())
        rows, pieces = rows + len(counts), pieces + len(begins)
        tokens += int(lengths.sum())
    for name, stream in streams.items():
        stream.close()
        store.sync(place / name)
    made = Counts(documents, cut, rows, pieces, tokens)
    facts = {"format": FORMAT, "store": manifest.fingerprint(), "counts": asdict(made)}
    facts["sha256"] = {name: digest.hexdigest() for name, digest in digests.items()}
    store.replace_file(place / INDEX, json.dumps(facts, indent=2))
    return made


def open_packing(folder: str, manifest: Manifest, seq_len: int) -> Packing:
    """The packing of a store's training documents.

    Raises DataError where it is missing, damaged, or of other tokens.
    """
    place = bucket.path_of(folder) / f"packed-{seq_len}"
    again = f"delete {place}, and make it with `gptjax data prepare CONFIG`"
    if not (place / INDEX).exists():
        raise DataError(
            f"{folder}: its documents have not been packed into rows of {seq_len} tokens; do it "
            "with `gptjax data prepare CONFIG`, on a local folder"
        )
    try:
        facts = json.loads((place / INDEX).read_text())
        if (known := facts["format"]) != FORMAT:
            raise DataError(
                f"{place}: format {known}; this version of gptjax reads format {FORMAT}"
            )
        counts = Counts(**facts["counts"])
        of_store, hashes = facts["store"], {name: facts["sha256"][name] for name in _DTYPES}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place / INDEX} is damaged ({str(error)[:200]}); {again}") from None
    if of_store != manifest.fingerprint():
        raise DataError(f"{place}: was made of other tokens than the store has; {again}")
    arrays = {name: _read(place / name, name, hashes[name], again) for name in _DTYPES}
    return Packing(counts, arrays["pieces"].reshape(-1, 2), arrays["lengths"], arrays["rows"])


def _read(path: Any, name: str, sha256: str, again: str) -> np.ndarray:
    """The numbers in a file of the index, mapped where it is local."""
    try:
        if bucket.remote(path):
            contents = path.read_bytes() if path.exists() else b""
            values = np.frombuffer(bytearray(contents), _DTYPES[name])
        elif not path.exists() or not path.stat().st_size:
            values = np.zeros(0, _DTYPES[name])
        else:
            values = np.asarray(np.memmap(path, _DTYPES[name], "r"))
    except ValueError:  # no whole number of them
        raise DataError(f"{path}: is damaged or missing; {again}") from None
    if hashlib.sha256(values).hexdigest() != sha256:
        raise DataError(f"{path}: is damaged or missing; {again}")
    return values
