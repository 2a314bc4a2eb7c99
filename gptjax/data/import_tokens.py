"""Import of token files into a token store, by whole arrays.

The store is written beside its place and renamed at the end: an import that is killed leaves
nothing that could be taken for a store.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data import store
from gptjax.data.files import Counts
from gptjax.data.store import Manifest, Split, Writer
from gptjax.data.token_files import TokenFile
from gptjax.errors import DataError, OutputError
from gptjax.tokenizer import Tokenizer

IMPORTED = "imported"
"""The entry of a manifest's data that says what an imported store was made of."""
_LOOKED_AT = 1 << 16  # tokens by which a wrong type or tokenizer is told
_MIX = np.uint64(0x9E3779B97F4A7C15)

Tell = Callable[[str, int, int | None], None]


def import_tokens(
    folder: Path,
    tokenizer: Tokenizer,
    files: Sequence[TokenFile],
    valid_files: Sequence[TokenFile],
    valid_fraction: float,
    tell: Tell = lambda *_: None,
) -> Manifest:
    """Makes a store of token files; without `valid_files`, of a fraction of the documents.

    Raises DataError for tokens that the tokenizer does not have or that have no validation part,
    OutputError where the folder exists or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"--store={folder}: exists already; give a new folder")
    for file in [*files, *valid_files]:
        _check(file, tokenizer)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        manifest = _write(partial, tokenizer, files, valid_files, valid_fraction, tell)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        store.sync(folder.parent)
    except OSError as error:
        raise OutputError(f"--store={folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _check(file: TokenFile, tokenizer: Tokenizer) -> None:
    """Raises DataError for a file that is surely not of this tokenizer, or not of its type."""
    if file.vocab_size not in (None, tokenizer.vocab_size):
        raise DataError(
            f"{file.path}: its header stands for a vocabulary of {file.vocab_size}, and the "
            f"tokenizer has {tokenizer.vocab_size} pieces"
        )
    head = file.tokens()[:_LOOKED_AT]
    if file.dtype == "<u2" and len(head) > 16 and not head[1::2].any():
        raise DataError(f"{file.path}: every other token is 0, as in uint32; give --dtype uint32")


class _Stream:
    """Writes a split as a store has it: each document opened by `start_id`, ended by EOS."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, start_id: int) -> None:
        self._tokenizer, self._start_id = tokenizer, start_id
        self._writer = Writer(folder, store.token_dtype(tokenizer.vocab_size), 0)
        self._last = start_id
        self._writer.append(np.array([start_id]))
        self.documents = self.unknown = 0

    def append(self, tokens: np.ndarray, place: Path) -> None:
        """Appends tokens of a file. Raises DataError for one that the tokenizer does not have."""
        if len(tokens) and tokens[0] == self._start_id == self._last:
            tokens = tokens[1:]  # it has been written already
        if not len(tokens):
            return
        if int(tokens.max()) >= self._tokenizer.vocab_size or int(tokens.min()) < 0:
            wrong = (tokens >= self._tokenizer.vocab_size) | (tokens < 0)
            raise DataError(
                f"{place}: has the token {tokens[int(wrong.argmax())]}, and the tokenizer "
                f"{self._tokenizer.vocab_size} pieces: it is another tokenizer's, or of another "
                "type than --dtype says"
            )
        self.documents += int(np.count_nonzero(tokens == self._tokenizer.eos_id))
        if self._tokenizer.unk_id is not None:
            self.unknown += int(np.count_nonzero(tokens == self._tokenizer.unk_id))
        self._writer.append(tokens)
        self._last = int(tokens[-1])

    def close(self, text_bytes: Callable[[int], int]) -> Split:
        """Ends the last document and the split; `text_bytes` of its number of tokens."""
        eos_id = self._tokenizer.eos_id
        if self._last == self._start_id != eos_id:
            pass  # it ends with what would open the next document
        else:
            if self._last != eos_id:
                self._writer.append(np.array([eos_id]))
                self.documents += 1
            if self._start_id != eos_id:
                self._writer.append(np.array([self._start_id]))
        tokens = self._writer.tokens
        hashes, checksums = self._writer.close()
        if tokens < 3:
            raise DataError(
                "no documents for training or none for validation: give --valid FILE, or another "
                "--valid-fraction"
            )
        size = text_bytes(tokens)
        return Split(self.documents, tokens, size, hashes, self.unknown, 0.0, checksums)


def _write(
    folder: Path,
    tokenizer: Tokenizer,
    files: Sequence[TokenFile],
    valid_files: Sequence[TokenFile],
    valid_fraction: float,
    tell: Tell,
) -> Manifest:
    """Writes a store into an empty folder."""
    start_id = _start_id(files, tokenizer)
    tokenizer.start_id = start_id
    tokenizer.save(folder)
    splits = {name: _Stream(folder / name, tokenizer, start_id) for name in ("train", "valid")}
    done, total = 0, sum(file.count for file in [*files, *valid_files])
    for name, given in (("train", files), ("valid", valid_files)):
        rest: list[np.ndarray] = []  # of a document that goes on in the next chunk
        for path, chunk in _with_ends(given, tokenizer.eos_id, start_id):
            done += len(chunk)
            tell("import", done, max(done, total))
            if valid_files:
                splits[name].append(chunk, path)
                continue
            ends = np.flatnonzero(chunk == tokenizer.eos_id)
            last = int(ends[-1]) + 1 if len(ends) else 0
            if last:
                whole = np.concatenate([*rest, chunk[:last]])
                held_out = _held_out(whole, tokenizer.eos_id, valid_fraction)
                splits["valid"].append(whole[held_out], path)
                splits["train"].append(whole[~held_out], path)
                rest = []
            rest.append(chunk[last:])
        for chunk in rest:
            splits["train"].append(chunk, given[-1].path)
    valid = splits["valid"].close(lambda tokens: _text_bytes(folder, tokenizer, tokens))
    # The text of the training tokens is not at hand: its size is that of as many tokens of the
    # validation split, whose text is decoded and counted.
    train = splits["train"].close(lambda tokens: round(tokens * valid.bytes / valid.tokens))
    manifest = Manifest(
        tokenizer={
            "kind": tokenizer.kind,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            **({} if start_id == tokenizer.eos_id else {"start_id": start_id}),
        },
        data={IMPORTED: [f"{file.path.name} ({file.format})" for file in [*files, *valid_files]]},
        counts=asdict(Counts()),
        dtype=store.token_dtype(tokenizer.vocab_size).str,
        splits={"train": train, "valid": valid},
    )
    store.write_manifest(folder, manifest)
    return manifest


def _start_id(files: Sequence[TokenFile], tokenizer: Tokenizer) -> int:
    """The token that opens the documents of the files: BOS where they begin with it, or EOS."""
    first = next((int(file.tokens()[0]) for file in files if file.count), None)
    return first if first is not None and first == tokenizer.bos_id else tokenizer.eos_id


def _with_ends(
    files: Sequence[TokenFile], eos_id: int, start_id: int
) -> Iterator[tuple[Path, np.ndarray]]:
    """The tokens of files in order, each with its path, with an EOS before each BOS that has none
    where documents begin with BOS."""
    last = start_id if start_id != eos_id else eos_id
    for file in files:
        for chunk in file.chunks(eos_id):
            if start_id != eos_id and len(chunk):
                begins = np.flatnonzero(chunk == start_id)
                before = np.where(begins > 0, chunk[begins - 1], last)
                lacking = begins[(before != eos_id) & ((begins > 0) | (last != start_id))]
                last = int(chunk[-1])
                if len(lacking):
                    wide = np.result_type(chunk.dtype, np.min_scalar_type(eos_id))
                    chunk = np.insert(chunk.astype(wide), lacking, eos_id)
            yield file.path, chunk


def _held_out(tokens: np.ndarray, eos_id: int, fraction: float) -> np.ndarray:
    """Which tokens are of documents that are held out: those whose contents' hash is low.

    All documents end with EOS, the last one too.
    """
    if not len(tokens):
        return np.zeros(0, bool)
    ends = np.flatnonzero(tokens == eos_id) + 1
    begins = np.concatenate([[0], ends[:-1]])
    lengths = ends - begins
    with np.errstate(over="ignore"):
        within = np.arange(len(tokens), dtype=np.uint64) - np.repeat(begins, lengths).astype("u8")
        mixed = (tokens.astype(np.uint64) + np.uint64(1)) * (within * _MIX | np.uint64(1))
        sums = np.add.reduceat(mixed ^ (mixed >> np.uint64(29)), begins)
        shares = ((sums ^ (sums >> np.uint64(32))) * _MIX) >> np.uint64(11)
    return np.repeat(shares < np.uint64(fraction * 2.0**53), lengths)


def _text_bytes(folder: Path, tokenizer: Tokenizer, tokens: int) -> int:
    """The bytes of the text of the validation split, decoded document by document."""
    files: list[Any] = sorted((folder / "valid" / "c").iterdir(), key=lambda file: int(file.name))
    dtype, size = store.token_dtype(tokenizer.vocab_size), 0
    rest = np.zeros(0, dtype)
    for number, file in enumerate(files):
        count = min(store.FILE_TOKENS, tokens - number * store.FILE_TOKENS)
        mapped = np.fromfile(file, dtype, count)
        for document in _documents(np.concatenate([rest, mapped]), tokenizer.eos_id):
            rest = document
            if len(document) and document[-1] == tokenizer.eos_id:
                size += len(tokenizer.decode(document.tolist()).encode())
                rest = rest[:0]
    return size


def _documents(tokens: np.ndarray, eos_id: int) -> Iterator[np.ndarray]:
    """The documents of a split, each with its EOS; the last one may lack it."""
    yield from np.split(tokens, np.flatnonzero(tokens == eos_id) + 1)
