"""Text to token store: train or load the tokenizer, tokenize in parallel processes, write.

The stream of documents has a fixed order, so the work so far is a few counts: a journal beside the
half-made store says how many documents and tokens are safely in it, and an interrupted preparation
goes on from there.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
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
from gptjax.config import Config
from gptjax.data import sources, store
from gptjax.data.sources import Counts, Document
from gptjax.errors import DataError, MismatchError, OutputError
from gptjax.runtime import file_lock
from gptjax.runtime.progress import Bar, Progress

JOURNAL = "journal.json"
_LOCK = "prepare.lock"
_PARTIAL = f".{JOURNAL}.partial"  # left where a preparation is killed as it writes its journal
_OWN = {_LOCK, _PARTIAL}  # what a preparation may leave before it has a journal
_SAMPLED_FROM = 16  # times the tokenizer's sample is read to take it from
_BATCH_BYTES = 1 << 20
_JOURNAL_BYTES = 64 << 20

Tell = Callable[[str, int, int | None], None]
"""Told (phase, bytes of text done, bytes expected)."""
Clock = Callable[[int, float], None]
"""Told (bytes of text tokenized by this call, the seconds that took) where any were."""


@contextlib.contextmanager
def shown(progress: Progress) -> Iterator[Tell]:
    """Shows each phase of a preparation as a bar over its bytes."""
    with contextlib.ExitStack() as stack:
        bars: dict[str, Bar] = {}

        def tell(phase: str, done: int, expected: int | None) -> None:
            if phase not in bars:
                stack.close()  # the phase before is over
                bars[phase] = stack.enter_context(progress.bar(phase, expected, unit="B"))
            bars[phase].update(done)

        yield tell


def identity(cfg: Config) -> dict[str, Any]:
    """What decides a store's contents: the fields that must agree for it to be used."""
    skipped = {"store", "workers", "prefetch", "documents"}
    data = {k: v for k, v in asdict(cfg.data).items() if k not in skipped}
    return json.loads(json.dumps({**data, "tokenizer": asdict(cfg.tokenizer)}))


def prepare(
    cfg: Config,
    tell: Tell = lambda *_: None,
    say: Callable[[str], None] = lambda line: None,
    clock: Clock = lambda *_: None,
) -> store.Manifest:
    """Makes the configured store, or finishes it, or finds it made; returns its manifest.

    Waits, telling `say`, while another process makes the same store.

    Raises DataError for text that cannot be used, MismatchError where the folder holds a store of
    other data, OutputError where it cannot be written.
    """
    if "://" in cfg.data.store or (Path(cfg.data.store) / store.MANIFEST).exists():
        return _made(cfg)
    found = sources.resolve(cfg.data.sources)
    held_out = sources.resolve(cfg.data.valid_sources, "data.valid_sources")
    folder = Path(cfg.data.store)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock.held(folder / _LOCK, f"data.store={cfg.data.store}", say):
            if (folder / store.MANIFEST).exists():
                return _made(cfg)  # by the process that held the lock before
            journal = _Journal.load(folder, identity(cfg) | {"files": _files(found + held_out)})
            tokenizer = _tokenizer(cfg, folder, found, tell)
            began, before = time.monotonic(), sum(journal.bytes.values())
            manifest = _tokenize(cfg, folder, found, held_out, tokenizer, journal, tell)
            clock(sum(journal.bytes.values()) - before, time.monotonic() - began)
            return manifest
    except OSError as error:
        raise OutputError(f"data.store={cfg.data.store}: cannot be written: {error}") from None


def _made(cfg: Config) -> store.Manifest:
    """The manifest of a finished store; a remote one is read and never made."""
    manifest = store.read_manifest(cfg.data.store)
    _check_same(cfg.data.store, manifest.data, identity(cfg))
    return manifest


def _files(found: list[sources.Source]) -> str:
    """A hash of the sources' files and their sizes: an unfinished stream must stay the same."""
    listing = [[sources.name(source), sources.size(source)] for source in found]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _check_same(folder: str | Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
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
    """How far a preparation has come."""

    identity: dict[str, Any]
    documents: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"train": 0, "valid": 0})
    split_documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "valid": 0})
    bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "valid": 0})

    @classmethod
    def load(cls, folder: Path, wanted: dict[str, Any]) -> "_Journal":
        file = folder / JOURNAL
        if file.exists():
            try:
                journal = cls(**json.loads(file.read_bytes()))
            except (ValueError, TypeError) as error:
                raise DataError(f"{file}: is damaged ({error}); remove {folder}") from None
            if journal.documents or journal.identity == wanted:
                _check_same(f"{folder} (unfinished)", journal.identity, wanted)
                return journal
            _discard(folder)  # nothing was done yet, so another attempt may be at other data
        elif others := sorted({p.name for p in folder.iterdir()} - _OWN):
            raise OutputError(
                f"data.store={folder}: holds other files ({', '.join(others[:3])}); give a new or "
                "an empty folder"
            )
        journal = cls(wanted)
        journal.save(folder)
        return journal

    def save(self, folder: Path) -> None:
        store.replace_file(folder / JOURNAL, json.dumps(asdict(self)))


def _discard(folder: Path) -> None:
    """Empties the folder of an unfinished preparation, which was empty before it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _tokenizer(
    cfg: Config, folder: Path, found: list[sources.Source], tell: Tell
) -> tokenizers.Tokenizer:
    """The store's tokenizer; made on the first call, read afterwards."""
    try:
        return tokenizers.load(folder)
    except DataError:
        tokenizer = tokenizers.make(cfg.tokenizer, tokenizer_sample(cfg, found, tell))
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"model.vocab_size={cfg.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} "
            "pieces; raise it"
        )
    tokenizer.save(folder)
    for name in tokenizer.files():
        store.sync(folder / name)
    return tokenizer


def tokenizer_sample(cfg: Config, found: list[sources.Source], tell: Tell) -> Iterator[str]:
    """Slices of training documents to train the tokenizer on, by a hash of text and place.

    Of a large corpus only some files are read, chosen by a hash too.
    """
    budget, total, chosen = cfg.tokenizer.sample_bytes, 0, set()
    for source in sorted(found, key=lambda s: sources.hash_share("tokenizer " + sources.name(s))):
        if total >= _SAMPLED_FROM * budget:
            break
        chosen.add(source)
        total += sources.size(source)
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
    cfg: Config, found: list[sources.Source], split: str | None, counts: Counts
) -> Iterator[Document]:
    """Documents of the sources that belong to one split, or all where it is None."""
    fraction = 0.0 if cfg.data.valid_sources else cfg.data.valid_fraction
    for source in found:
        for document in sources.read(source, cfg.data, counts):
            if split is None or (sources.hash_share(document.key) < fraction) == (split == "valid"):
                yield document


def _labelled(cfg: Config, found, held_out, counts: Counts) -> Iterator[tuple[str, Document]]:
    """Every document with the name of its split."""
    fraction = 0.0 if cfg.data.valid_sources else cfg.data.valid_fraction
    for document in read_documents(cfg, found, None, counts):
        yield "valid" if sources.hash_share(document.key) < fraction else "train", document
    for document in read_documents(cfg, held_out, None, counts):
        yield "valid", document


Batch = list[tuple[str, str, bool]]  # (split, text, whether the document ends)


def _batches(labelled: Iterator[tuple[str, Document]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for split, document in labelled:
        batch.append((split, document.text, document.ends))
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class _Encoded:
    """A batch's tokens by split, and its counts."""

    tokens: dict[str, np.ndarray]
    documents: dict[str, int]
    bytes: dict[str, int]
    pieces: int


_worker_tokenizer: tokenizers.Tokenizer


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = tokenizers.load(folder)


def _end_with_parent() -> None:
    """Without this, a worker whose parent is killed waits for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: Batch) -> _Encoded:
    """Runs in a worker process."""
    tokens, documents, size = {}, {}, {}
    dtype = store.token_dtype(_worker_tokenizer.vocab_size)
    for split in ("train", "valid"):
        mine = [(text, ends) for name, text, ends in batch if name == split]
        encoded = _worker_tokenizer.encode_documents(*zip(*mine, strict=True)) if mine else []
        tokens[split] = np.asarray(encoded, dtype)
        documents[split] = sum(ends for _, ends in mine)
        size[split] = sum(len(text.encode("utf-8", "replace")) for text, _ in mine)
    return _Encoded(tokens, documents, size, len(batch))


def _tokenize(
    cfg: Config,
    folder: Path,
    found: list[sources.Source],
    held_out: list[sources.Source],
    tokenizer: tokenizers.Tokenizer,
    journal: _Journal,
    tell: Tell,
) -> store.Manifest:
    dtype = store.token_dtype(tokenizer.vocab_size)
    writers = {name: store.Writer(folder / name, dtype, n) for name, n in journal.tokens.items()}
    for writer in writers.values():
        if writer.tokens == 0:
            writer.append(np.array([tokenizer.eos_id]))
    counts, unsaved = Counts(), 0
    expected = sum(sources.size(source) for source in found + held_out)
    labelled = itertools.islice(_labelled(cfg, found, held_out, counts), journal.documents, None)
    for encoded in _in_order(cfg, folder, _batches(labelled)):
        for name, writer in writers.items():
            writer.append(encoded.tokens[name])
            journal.split_documents[name] += encoded.documents[name]
            journal.bytes[name] += encoded.bytes[name]
        journal.documents += encoded.pieces
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
    hashes = {name: writer.close() for name, writer in writers.items()}
    manifest = store.Manifest(
        tokenizer={
            "kind": tokenizer.kind,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        data=identity(cfg),
        counts=dataclasses.asdict(counts),
        dtype=dtype.str,
        splits={
            name: store.Split(
                journal.split_documents[name],
                writers[name].tokens,
                journal.bytes[name],
                hashes[name],
            )
            for name in writers
        },
    )
    store.write_manifest(folder, manifest)
    (folder / JOURNAL).unlink()
    (folder / _PARTIAL).unlink(missing_ok=True)
    return manifest


def _empty(cfg: Config, split: str) -> str:
    if split == "train":
        return f"data.sources={' '.join(cfg.data.sources)}: no text to train on"
    if cfg.data.valid_sources:
        return f"data.valid_sources={' '.join(cfg.data.valid_sources)}: no text"
    return (
        f"data.valid_fraction={cfg.data.valid_fraction}: no document was held out; raise it, or "
        "name data.valid_sources"
    )


def _in_order(cfg: Config, folder: Path, batches: Iterator[Batch]) -> Iterator[_Encoded]:
    """Batches encoded by worker processes, in the order in which they were read."""
    workers = cfg.data.workers or os.cpu_count() or 1
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (folder,)
    ) as pool:
        waiting: collections.deque[concurrent.futures.Future[_Encoded]] = collections.deque()
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
