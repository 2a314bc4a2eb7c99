"""Preparation of the token store: train or load the tokenizer, tokenize in parallel, write.

The stream of documents has a fixed order, so progress is a few counts: a journal in the unfinished
store says how many documents and tokens are on disk, and an interrupted preparation continues from
there.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import tokenizer as tokenizers
from gptjax.config import Config, DataConfig
from gptjax.data import sources, store
from gptjax.data.files import Counts, Document
from gptjax.data.sources import Source
from gptjax.errors import DataError, MismatchError, OutputError
from gptjax.runtime import file_lock
from gptjax.runtime.progress import Bar, Progress

JOURNAL = "journal.json"
_LOCK = "prepare.lock"
_PARTIAL = f".{JOURNAL}.partial"  # left by a process that was killed while writing the journal
_OWN = {_LOCK, _PARTIAL}  # files that a preparation may leave before it has a journal
_SAMPLED_FROM = 16  # the tokenizer's sample is taken from this many times as much text
_BATCH_BYTES = 1 << 20  # text that a worker process tokenizes at once
_JOURNAL_BYTES = 64 << 20  # text between two writes of the journal

Tell = Callable[[str, int, int | None], None]
"""Called with (phase, bytes of text done, bytes expected)."""
Clock = Callable[[int, float], None]
"""Called with (bytes of text tokenized by this call, seconds), unless the store was finished."""


@contextlib.contextmanager
def shown(progress: Progress) -> Iterator[Tell]:
    """Shows each phase of a preparation as a progress bar in bytes."""
    with contextlib.ExitStack() as stack:
        bars: dict[str, Bar] = {}

        def tell(phase: str, done: int, expected: int | None) -> None:
            if phase not in bars:
                stack.close()  # the previous phase has ended
                bars[phase] = stack.enter_context(progress.bar(phase, expected, unit="B"))
            bars[phase].update(done)

        yield tell


def identity(cfg: Config) -> dict[str, Any]:
    """The fields that decide a store's contents, and so must agree for it to be used."""
    skipped = {"store", "workers", "prefetch", "documents"}
    data = {k: v for k, v in asdict(cfg.data).items() if k not in skipped}
    return json.loads(json.dumps({**data, "tokenizer": asdict(cfg.tokenizer)}))


def prepare(
    cfg: Config,
    tell: Tell = lambda *_: None,
    say: Callable[[str], None] = lambda line: None,
    clock: Clock = lambda *_: None,
) -> store.Manifest:
    """Prepares the configured store unless it is finished already; returns its manifest.

    Continues an unfinished one. While another process prepares the same store, calls `say` and
    waits.

    Raises DataError for text that cannot be used, MismatchError where the folder holds a store of
    other data, OutputError where it cannot be written.
    """
    if "://" in cfg.data.store or (Path(cfg.data.store) / store.MANIFEST).exists():
        return _finished(cfg)
    counts = Counts()
    held_out = sources.resolve(cfg.data.valid_sources, "data.valid_sources", counts)
    found = sources.resolve(cfg.data.sources, counts=counts)
    if shared := len(found) - len(sources.without(found, held_out)):
        found = sources.without(found, held_out)
        say(f"{shared} of the sources' files are in data.valid_sources: not trained on")
    if not found:
        raise DataError(_empty(cfg, "train"))
    folder = Path(cfg.data.store)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock.held(folder / _LOCK, f"data.store={cfg.data.store}", say):
            if (folder / store.MANIFEST).exists():
                return _finished(cfg)  # by the process that held the lock before
            files = _listing_sha256(found + held_out)
            journal = _Journal.load(folder, identity(cfg) | {"files": files})
            tokenizer = _tokenizer(cfg, folder, found, tell)
            if journal.start_id is None:  # a journal of before has EOS between its documents
                begun = journal.documents > 0
                journal.start_id = tokenizer.eos_id if begun else tokenizer.default_start_id
            tokenizer.start_id = journal.start_id
            began, before = time.monotonic(), sum(journal.bytes.values())
            manifest = _tokenize(cfg, folder, found, held_out, tokenizer, journal, counts, tell)
            _tell_losses(manifest, say)
            clock(sum(journal.bytes.values()) - before, time.monotonic() - began)
            return manifest
    except OSError as error:
        raise OutputError(f"data.store={cfg.data.store}: cannot be written: {error}") from None


def _finished(cfg: Config) -> store.Manifest:
    """The manifest of a finished store; a remote store is only ever read."""
    manifest = store.read_manifest(cfg.data.store)
    _check_same(cfg.data.store, manifest.data, identity(cfg))
    return manifest


def _listing_sha256(found: list[Source]) -> str:
    """SHA-256 of the sources' names and sizes, which must not change in an unfinished store."""
    listing = [[source.name, source.size_bytes()] for source in found]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _check_same(folder: str | Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    # A store of before a field existed was made as the field's default says.
    saved = {k: v for k, v in asdict(DataConfig()).items() if k in given} | saved
    changed = [
        f"{key}: {saved.get(key)!r} in the store, {given.get(key)!r} given"
        for key in {**saved, **given}
        if saved.get(key) != given.get(key)
    ]
    if changed:
        raise MismatchError(
            f"{folder} holds a store of other data; give another --data.store", changed
        )


@dataclass
class _Journal:
    """Progress of a preparation: what is already on disk, by split."""

    identity: dict[str, Any]
    start_id: int | None = None
    documents: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"train": 0, "valid": 0})
    split_documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "valid": 0})
    bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "valid": 0})
    unknown: dict[str, int] = field(default_factory=lambda: {"train": 0, "valid": 0})
    lost_bits: float = 0.0

    @classmethod
    def load(cls, folder: Path, identity: dict[str, Any]) -> "_Journal":
        """The folder's journal, or a new one. Raises MismatchError for one of other data."""
        file = folder / JOURNAL
        if file.exists():
            try:
                journal = cls(**json.loads(file.read_bytes()))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{file}: is damaged ({error}); delete {folder} and prepare it again"
                ) from None
            if journal.documents or journal.identity == identity:
                _check_same(f"{folder} (unfinished)", journal.identity, identity)
                return journal
            _discard(folder)  # nothing was written yet, so the data may be another
        elif others := sorted({p.name for p in folder.iterdir()} - _OWN):
            raise OutputError(
                f"data.store={folder}: contains other files ({', '.join(others[:3])}); give a new "
                "or an empty folder"
            )
        journal = cls(identity)
        journal.save(folder)
        return journal

    def save(self, folder: Path) -> None:
        store.replace_file(folder / JOURNAL, json.dumps(asdict(self)))


def _discard(folder: Path) -> None:
    """Deletes all files of an unfinished preparation, whose folder was empty before it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _tokenizer(cfg: Config, folder: Path, found: list[Source], tell: Tell) -> tokenizers.Tokenizer:
    """The store's tokenizer: loaded, or else trained on the sources and saved."""
    try:
        return tokenizers.load(folder)
    except DataError:
        tokenizer = tokenizers.make(cfg.tokenizer, tokenizer_sample(cfg, found, tell))
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"model.vocab_size={cfg.model.vocab_size}: smaller than the tokenizer's "
            f"{tokenizer.vocab_size}; raise it"
        )
    tokenizer.save(folder)
    for name in tokenizer.files():
        store.sync(folder / name)
    return tokenizer


def tokenizer_sample(cfg: Config, found: list[Source], tell: Tell) -> Iterator[str]:
    """Slices of training documents to train the tokenizer on, chosen by a hash of their place.

    Of a large corpus only some sources are read, chosen by a hash of their names.
    """
    budget, total, chosen = cfg.tokenizer.sample_bytes, 0, set()
    for source in sorted(found, key=lambda s: sources.hash_share(f"tokenizer {s.name}")):
        if total >= _SAMPLED_FROM * budget:
            break
        chosen.add(source)
        total += source.size_bytes()
    share = budget / max(min(total, _SAMPLED_FROM * budget), 1)
    taken = 0
    for document in read_documents(cfg, [s for s in found if s in chosen], "train", Counts()):
        for start in range(0, len(document.text), tokenizers.SLICE):
            if sources.hash_share(f"tokenizer {document.key} {start}") < share:
                text = document.text[start : start + tokenizers.SLICE]
                taken += len(text)
                tell("tokenizer", taken, min(total, budget))
                yield text
        if taken >= budget:
            return


def read_documents(
    cfg: Config, found: list[Source], split: str | None, counts: Counts
) -> Iterator[Document]:
    """The sources' documents of one split, train or valid; of both where it is None."""
    fraction = 0.0 if cfg.data.valid_sources else cfg.data.valid_fraction
    for source in found:
        for document in source.documents(cfg.data, counts):
            if split is None or (sources.hash_share(document.key) < fraction) == (split == "valid"):
                yield document


def _with_split(
    cfg: Config, found: list[Source], held_out: list[Source], counts: Counts
) -> Iterator[tuple[str, Document]]:
    """Every document, after the name of its split."""
    fraction = 0.0 if cfg.data.valid_sources else cfg.data.valid_fraction
    for document in read_documents(cfg, found, None, counts):
        yield "valid" if sources.hash_share(document.key) < fraction else "train", document
    for document in read_documents(cfg, held_out, None, counts):
        yield "valid", document


Batch = list[tuple[str, str, bool]]  # (split, text, whether the document ends)


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for split, document in documents:
        batch.append((split, document.text, document.ends))
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class _Encoded:
    """A batch's tokens and counts, by split; the bits that the tokens of its validation texts do
    not give back; `entries` is the length of the batch."""

    tokens: dict[str, np.ndarray]
    documents: dict[str, int]
    bytes: dict[str, int]
    unknown: dict[str, int]
    lost_bits: float
    entries: int


_worker_tokenizer: tokenizers.Tokenizer


def _start_worker(folder: Path, start_id: int | None) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one worker per core already
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_tokenizer = tokenizers.load(folder, start_id)


def _exit_with_parent() -> None:
    """Ends a worker whose parent was killed, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: Batch) -> _Encoded:
    """Tokenizes a batch; runs in a worker process."""
    tokens, documents, size, unknown = {}, {}, {}, {}
    tokenizer = _worker_tokenizer
    dtype = store.token_dtype(tokenizer.vocab_size)
    for split in ("train", "valid"):
        texts = [text for name, text, _ in batch if name == split]
        ends = [end for name, _, end in batch if name == split]
        tokens[split] = tokenizer.encode_documents(texts, ends).astype(dtype)
        unknown[split] = (
            int((tokens[split] == tokenizer.unk_id).sum()) if tokenizer.unk_id is not None else 0
        )
        documents[split] = sum(ends)
        size[split] = sum(len(text.encode("utf-8", "replace")) for text in texts)
    lost = sum(tokenizer.lost_bits(text) for name, text, _ in batch if name == "valid")
    return _Encoded(tokens, documents, size, unknown, lost, len(batch))


def _tokenize(
    cfg: Config,
    folder: Path,
    found: list[Source],
    held_out: list[Source],
    tokenizer: tokenizers.Tokenizer,
    journal: _Journal,
    counts: Counts,
    tell: Tell,
) -> store.Manifest:
    """Tokenizes what the journal does not have yet, and finishes the store."""
    dtype = store.token_dtype(tokenizer.vocab_size)
    writers = {name: store.Writer(folder / name, dtype, n) for name, n in journal.tokens.items()}
    for writer in writers.values():
        if writer.tokens == 0:
            writer.append(np.array([journal.start_id]))
    unsaved = 0
    expected = sum(source.size_bytes() for source in found + held_out)
    documents = _with_split(cfg, found, held_out, counts)
    rest = itertools.islice(documents, journal.documents, None)
    for encoded in _in_order(cfg, folder, journal.start_id, _batches(rest)):
        for name, writer in writers.items():
            writer.append(encoded.tokens[name])
            journal.split_documents[name] += encoded.documents[name]
            journal.bytes[name] += encoded.bytes[name]
            journal.unknown[name] += encoded.unknown[name]
        journal.lost_bits += encoded.lost_bits
        journal.documents += encoded.entries
        unsaved += sum(encoded.bytes.values())
        tell("tokenize", sum(journal.bytes.values()), expected)
        if unsaved >= _JOURNAL_BYTES:
            for name, writer in writers.items():
                writer.flush()
                journal.tokens[name] = writer.tokens
            journal.save(folder)
            unsaved = 0
    for name in writers:
        if not journal.bytes[name]:
            _discard(folder)
            raise DataError(_empty(cfg, name))
    manifest = _close(cfg, tokenizer, journal, counts, writers)
    store.write_manifest(folder, manifest)
    (folder / JOURNAL).unlink()
    (folder / _PARTIAL).unlink(missing_ok=True)
    return manifest


def _close(
    cfg: Config,
    tokenizer: tokenizers.Tokenizer,
    journal: _Journal,
    counts: Counts,
    writers: dict[str, store.Writer],
) -> store.Manifest:
    """Closes the splits' arrays; returns the manifest of the finished store."""
    splits = {}
    for name, writer in writers.items():
        hashes = writer.close()
        splits[name] = store.Split(
            journal.split_documents[name],
            writer.tokens,
            journal.bytes[name],
            hashes,
            journal.unknown[name],
            journal.lost_bits if name == "valid" else 0.0,
        )
    return store.Manifest(
        tokenizer={
            "kind": tokenizer.kind,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            **({} if journal.start_id == tokenizer.eos_id else {"start_id": journal.start_id}),
        },
        data=identity(cfg),
        counts=asdict(counts),
        dtype=store.token_dtype(tokenizer.vocab_size).str,
        splits=splits,
    )


def _tell_losses(manifest: store.Manifest, say: Callable[[str], None]) -> None:
    """Tells what a tokenizer loses."""
    total, valid = sum(s.tokens for s in manifest.splits.values()), manifest.splits["valid"]
    if unknown := sum(split.unknown for split in manifest.splits.values()):
        say(f"{unknown / total:.2%} of the tokens are <unk>, of which no text comes back")
    if valid.lost_bits:
        say(
            "the tokens do not give back all of the text: bits per byte include "
            f"{valid.lost_bits / valid.bytes:.4f} for what is lost"
        )


def _empty(cfg: Config, split: str) -> str:
    """The error message for a split without text."""
    if split == "train":
        return f"data.sources={' '.join(cfg.data.sources)}: no text to train on"
    if cfg.data.valid_sources:
        return f"data.valid_sources={' '.join(cfg.data.valid_sources)}: no text"
    return (
        f"data.valid_fraction={cfg.data.valid_fraction}: no document was held out; raise it, or "
        "name data.valid_sources"
    )


def _in_order(
    cfg: Config, folder: Path, start_id: int | None, batches: Iterator[Batch]
) -> Iterator[_Encoded]:
    """The batches tokenized by worker processes, in the order of reading."""
    workers = cfg.data.workers or os.cpu_count() or 1
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (folder, start_id)
    ) as pool:
        waiting: collections.deque[concurrent.futures.Future[_Encoded]] = collections.deque()
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
