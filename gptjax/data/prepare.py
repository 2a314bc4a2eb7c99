"""Preparation of the token store: train or load the tokenizer, tokenize in parallel, write.

The stream of documents has a fixed order, so progress is a few counts: a journal in the unfinished
store says how many documents and tokens are on disk, and an interrupted preparation continues from
there.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import bucket
from gptjax import tokenizer as tokenizers
from gptjax.config import Config, DataConfig
from gptjax.data import provenance, sources, store
from gptjax.data.files import Counts, Document
from gptjax.data.import_tokens import IMPORTED
from gptjax.data.journal import (
    JOURNAL,
    LOCK,
    PARTIAL,
    Done,
    Journal,
    chained,
    check_same,
    listing_sha256,
)
from gptjax.data.sources import Source
from gptjax.data.split import Split
from gptjax.data.tokenizer_sample import sample
from gptjax.errors import DataError, MismatchError, OutputError
from gptjax.runtime import file_lock
from gptjax.runtime.progress import Bar, Progress

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
    skipped = {"store", "cache", "cache_gb", "workers", "prefetch", "documents", "packing"}
    data = {k: v for k, v in asdict(cfg.data).items() if k not in skipped}
    return json.loads(json.dumps({**data, "tokenizer": asdict(cfg.tokenizer)}))


def prepare(
    cfg: Config,
    tell: Tell = lambda *_: None,
    say: Callable[[str], None] = lambda line: None,
    clock: Clock = lambda *_: None,
    begun_with: str | None = None,
) -> store.Manifest:
    """Prepares the configured store unless it is finished already; returns its manifest.

    Continues an unfinished one. While another process prepares the same store, calls `say` and
    waits. Where the text has changed since, a run that was `begun_with` the store's fingerprint
    goes on with it.

    Raises DataError for text that cannot be used, MismatchError where the folder holds a store of
    other data or of what the text was before, OutputError where it cannot be written.
    """
    if "://" in cfg.data.store or (Path(cfg.data.store) / store.MANIFEST).exists():
        return _finished(cfg, say, begun_with)
    if cfg.tokenizer.path and not (Path(cfg.data.store) / JOURNAL).exists():
        tokenizers.make(cfg.tokenizer, ())  # refused before anything is written
    counts = Counts()
    held_out = sources.resolve(cfg.data.valid_sources, "data.valid_sources", counts)
    found = sources.resolve(cfg.data.sources, counts=counts)
    if shared := len(found) - len(sources.without(found, held_out)):
        found = sources.without(found, held_out)
        say(f"{shared} of the sources' files are in data.valid_sources: not trained on")
    folder = Path(cfg.data.store)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock.held(folder / LOCK, f"data.store={cfg.data.store}", say):
            if (folder / store.MANIFEST).exists():
                return _finished(cfg, say, begun_with)  # by the process with the lock before
            preparation = _Preparation(cfg, folder, found, held_out, Split.of(cfg, found, held_out))
            return _prepare(preparation, counts, tell, say, clock)
    except OSError as error:
        raise OutputError(f"data.store={cfg.data.store}: cannot be written: {error}") from None


@dataclass(frozen=True)
class _Preparation:
    """What is prepared: where, of which sources, and how they are split."""

    cfg: Config
    folder: Path
    found: list[Source]
    held_out: list[Source]
    split: Split

    def documents(self, counts: Counts) -> Iterator[tuple[int, str, Document]]:
        """Every document, after the number of its source and the name of its split."""
        current = 0

        def of_sources() -> Iterator[Document]:
            nonlocal current
            for number, source in enumerate(self.found):
                current = number
                yield from source.documents(self.cfg.data, counts)

        for side, document in self.split.apply(of_sources(), counts):
            yield current, side, document
        for number, source in enumerate(self.held_out, len(self.found)):
            for document in source.documents(self.cfg.data, counts):
                yield number, "valid", document


def _prepare(
    preparation: _Preparation,
    counts: Counts,
    tell: Tell,
    say: Callable[[str], None],
    clock: Clock,
) -> store.Manifest:
    """Makes a store, or finishes one that was begun."""
    listing = listing_sha256(preparation.found + preparation.held_out)
    split = preparation.split.fingerprint
    journal = Journal.load(preparation.folder, identity(preparation.cfg), split, listing, say)
    tokenizer = _tokenizer(preparation, tell)
    if journal.start_id is None:
        journal.start_id = tokenizer.default_start_id
    began, before = time.monotonic(), sum(journal.progress.bytes.values())
    manifest = _tokenize(preparation, tokenizer, journal, listing, counts, tell)
    clock(sum(journal.progress.bytes.values()) - before, time.monotonic() - began)
    if counts.in_validation:
        say(
            f"{counts.in_validation} documents of the sources are in data.valid_sources too: not "
            "trained on"
        )
    _tell_losses(manifest, say)
    return manifest


def _finished(cfg: Config, say: Callable[[str], None], begun_with: str | None) -> store.Manifest:
    """The manifest of a finished store; a remote store is only ever read."""
    manifest, given = store.read_manifest(cfg.data.store), identity(cfg)
    if IMPORTED in manifest.data:
        _check_imported(cfg, manifest, begun_with)
        return manifest
    # A tokenizer is what its files say, wherever they lie.
    if manifest.fingerprint() == begun_with or _has_tokenizer(manifest, cfg):
        given["tokenizer"] = manifest.data["tokenizer"]
    check_same(cfg.data.store, manifest.data, given)
    if "://" not in cfg.data.store and (changes := provenance.changes(cfg)):
        shown = changes[:5] + [f"and {len(changes) - 5} more"] * (len(changes) > 5)
        if manifest.fingerprint() != begun_with:
            raise MismatchError(
                f"data.store={cfg.data.store}: the text has changed since it was made; give "
                f"another --data.store, or delete {provenance.SOURCES} in it to use it as it is",
                shown,
            )
        say(f"the text has changed, and the run goes on with the tokens it has: {'; '.join(shown)}")
    return manifest


def _check_imported(cfg: Config, manifest: store.Manifest, begun_with: str | None) -> None:
    """Raises MismatchError where a store of imported tokens is not what is configured."""
    data, default, path = cfg.data, DataConfig(), Path(cfg.tokenizer.path).expanduser()
    changed = [
        f"data.{name}={value}: would not be read; leave it out"
        for name in ("sources", "valid_sources")
        if (value := getattr(data, name)) not in ((), getattr(default, name))
    ]
    given = cfg.tokenizer.kind == "bytes" or (cfg.tokenizer.path and path.exists())
    if given and not (manifest.fingerprint() == begun_with or _has_tokenizer(manifest, cfg)):
        changed.append(f"tokenizer.path={path}: is another tokenizer than the store's")
    if changed:
        raise MismatchError(f"data.store={data.store} holds imported tokens", changed)


def _has_tokenizer(manifest: store.Manifest, cfg: Config) -> bool:
    """Whether a store has the configured tokenizer, which is not to be trained."""
    given, remote = cfg.tokenizer, "://" in cfg.tokenizer.path
    readable = given.path and (remote or Path(given.path).expanduser().exists())
    if given.kind != "bytes" and not readable:
        return False
    try:
        found = (
            tokenizers.load(bucket.path_of(given.path)) if remote else tokenizers.make(given, ())
        )
    except DataError:
        return False
    return found.fingerprint == manifest.tokenizer["sha256"]


def _tokenizer(preparation: _Preparation, tell: Tell) -> tokenizers.Tokenizer:
    """The store's tokenizer: loaded, or else trained on the sources and saved."""
    cfg, folder = preparation.cfg, preparation.folder
    try:
        return tokenizers.load(folder)
    except DataError:
        texts = tokenizer_sample(cfg, preparation.found, preparation.split, tell)
        tokenizer = tokenizers.make(cfg.tokenizer, texts)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"model.vocab_size={cfg.model.vocab_size}: smaller than the tokenizer's "
            f"{tokenizer.vocab_size}; raise it"
        )
    tokenizer.save(folder)
    for name in tokenizer.files():
        store.sync(folder / name)
    return tokenizer


def tokenizer_sample(cfg: Config, found: list[Source], split: Split, tell: Tell) -> Iterator[str]:
    """Text to train a tokenizer on: tokenizer.sample_bytes from all over the training documents."""
    expected = sum(source.size_bytes() for source in found)

    def documents() -> Iterator[Document]:
        counts, read = Counts(), 0
        of_sources = (d for source in found for d in source.documents(cfg.data, counts))
        for side, document in split.apply(of_sources, counts):
            read += len(document.text)
            tell("tokenizer", read, expected)
            if side == "train":
                yield document

    return sample(documents(), cfg.tokenizer.sample_bytes)


Batch = list[tuple[str, str, bool]]  # (split, text, whether the document ends)


def _batches(
    documents: Iterator[tuple[int, str, Document]], digest: str
) -> Iterator[tuple[Batch, int | None, str]]:
    """Batches, each with the number of the sources that end with it (None where one goes on), and
    the digest of all documents up to its end; `digest` is that of those before.
    """
    batch: Batch = []
    size, current = 0, 0
    for number, side, document in documents:
        if number != current and size >= _BATCH_BYTES // 4:
            yield batch, number, digest
            batch, size = [], 0
        current = number
        batch.append((side, document.text, document.ends))
        digest = chained(digest, side, document.text)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch, None, digest
            batch, size = [], 0
    if batch:
        yield batch, None, digest


@dataclass
class _Encoded:
    """A batch's tokens and counts, by split; the bits that the tokens of its validation texts do
    not give back; `entries` is the length of the batch, `sources` and `digest` are what `_batches`
    gives with it."""

    tokens: dict[str, np.ndarray]
    documents: dict[str, int]
    bytes: dict[str, int]
    unknown: dict[str, int]
    lost_bits: float
    entries: int
    sources: int | None
    digest: str

    def add_to(self, done: Done) -> None:
        """Counts the batch as done."""
        for name in self.tokens:
            done.split_documents[name] += self.documents[name]
            done.bytes[name] += self.bytes[name]
            done.unknown[name] += self.unknown[name]
        done.lost_bits += self.lost_bits
        done.documents += self.entries
        done.digest = self.digest


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


def _encode(batch: Batch, sources: int | None, digest: str) -> _Encoded:
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
    return _Encoded(tokens, documents, size, unknown, lost, len(batch), sources, digest)


def _tokenize(
    preparation: _Preparation,
    tokenizer: tokenizers.Tokenizer,
    journal: Journal,
    listing: list[str],
    counts: Counts,
    tell: Tell,
) -> store.Manifest:
    """Tokenizes what the journal does not have yet, and finishes the store."""
    folder, done = preparation.folder, journal.progress
    sources_then = provenance.stats(preparation.found + preparation.held_out)
    dtype = store.token_dtype(tokenizer.vocab_size)
    writers = {name: store.Writer(folder / name, dtype, n) for name, n in done.tokens.items()}
    for writer in writers.values():
        if writer.tokens == 0:
            writer.append(np.array([journal.start_id]))
    unsaved = 0
    expected = sum(source.size_bytes() for source in preparation.found + preparation.held_out)
    rest = preparation.documents(counts)
    _pass_over(rest, done, folder)
    batches = _batches(rest, done.digest)

    def save() -> None:
        for writer in writers.values():
            writer.flush()
        journal.save(folder)

    try:
        for encoded in _in_order(preparation.cfg, folder, journal.start_id, batches):
            for name, writer in writers.items():
                writer.append(encoded.tokens[name])
                done.tokens[name] = writer.tokens
            encoded.add_to(done)
            if encoded.sources is not None:
                journal.at_boundary(encoded.sources, listing)
            unsaved += sum(encoded.bytes.values())
            tell("tokenize", sum(done.bytes.values()), expected)
            if unsaved >= _JOURNAL_BYTES:
                save()
                unsaved = 0
    except concurrent.futures.process.BrokenProcessPool:
        save()
        raise OutputError(
            "a process that tokenized text was ended, as for want of memory (fewer data.workers "
            "need less); a script that calls gptjax.train needs `if __name__ == '__main__':` "
            "around it"
        ) from None
    except DataError:
        save()  # when the text is mended, it goes on from here or from the source's beginning
        raise
    provenance.check_unchanged(sources_then, preparation.found + preparation.held_out)
    manifest = _close(preparation.cfg, tokenizer, journal, counts, writers)
    provenance.record(folder, preparation.found + preparation.held_out)
    store.write_manifest(folder, manifest)
    (folder / JOURNAL).unlink()
    (folder / PARTIAL).unlink(missing_ok=True)
    return manifest


def _pass_over(documents: Iterator[tuple[int, str, Document]], done: Done, folder: Path) -> None:
    """Reads the documents that are done. Raises MismatchError where their text is another now."""
    digest = ""
    for _, side, document in itertools.islice(documents, done.documents):
        digest = chained(digest, side, document.text)
    if done.digest and digest != done.digest:
        raise MismatchError(
            f"{folder} (unfinished): the text of the first {done.documents} documents is not what "
            f"it was when they were tokenized; restore it, give another --data.store, or delete "
            f"{folder} to begin anew"
        )


def _close(
    cfg: Config,
    tokenizer: tokenizers.Tokenizer,
    journal: Journal,
    counts: Counts,
    writers: dict[str, store.Writer],
) -> store.Manifest:
    """Closes the splits' arrays; returns the manifest of the finished store."""
    splits, done = {}, journal.progress
    for name, writer in writers.items():
        hashes, checksums_sha256 = writer.close()
        splits[name] = store.Split(
            done.split_documents[name],
            writer.tokens,
            done.bytes[name],
            hashes,
            done.unknown[name],
            done.lost_bits if name == "valid" else 0.0,
            checksums_sha256,
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


def _in_order(
    cfg: Config,
    folder: Path,
    start_id: int | None,
    batches: Iterator[tuple[Batch, int | None, str]],
) -> Iterator[_Encoded]:
    """The batches tokenized by worker processes, in the order of reading.

    An error of reading is raised after what was read before it.
    """
    workers = cfg.data.workers or os.cpu_count() or 1
    failure: DataError | None = None
    waiting: collections.deque[concurrent.futures.Future[_Encoded]] = collections.deque()
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (folder, start_id)
    ) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode, *batch))
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result()
        except DataError as error:
            failure = error
        while waiting:
            yield waiting.popleft().result()
    if failure:
        raise failure
