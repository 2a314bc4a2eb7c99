"""The journal of an unfinished store: how much of the sources' text is in it already."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gptjax.config import DataConfig
from gptjax.data import store
from gptjax.data.sources import Source
from gptjax.errors import DataError, MismatchError, OutputError

JOURNAL = "journal.json"
LOCK = "prepare.lock"
PARTIAL = f".{JOURNAL}.partial"  # left by a process that was killed while writing the journal
_OWN = {LOCK, PARTIAL}  # files that a preparation may leave before it has a journal


def _zeros() -> dict[str, int]:
    return {"train": 0, "valid": 0}


@dataclass
class Done:
    """What is on disk: documents read (parts of them count), and by split tokens and counts.

    `digest` identifies the text of those documents (`chained`).
    """

    documents: int = 0
    digest: str = ""
    tokens: dict[str, int] = field(default_factory=_zeros)
    split_documents: dict[str, int] = field(default_factory=_zeros)
    bytes: dict[str, int] = field(default_factory=_zeros)
    unknown: dict[str, int] = field(default_factory=_zeros)
    lost_bits: float = 0.0

    def copy(self) -> "Done":
        """A copy that does not change with this one."""
        return Done(**asdict(self))


@dataclass
class Journal:
    """Done of a preparation, and what it is a preparation of.

    `split` is the fingerprint of the split, `listing` the last entry of the sources'
    `listing_sha256`. `boundary` is the progress after the first `sources` of them, whose entry is
    `sources_listing`: from there it goes on where a later source has changed.
    """

    identity: dict[str, Any]
    split: str
    listing: str
    progress: Done
    start_id: int | None = None
    sources: int = 0
    sources_listing: str = ""
    boundary: Done | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        identity: dict[str, Any],
        split: str,
        listing: list[str],
        say: Callable[[str], None],
    ) -> "Journal":
        """The folder's journal, or a new one. Raises MismatchError for one of other data."""
        file = folder / JOURNAL
        if file.exists():
            journal = cls._parse(file)
            begun = journal.identity, journal.split, journal.listing
            if begun == (identity, split, listing[-1]):
                return journal
            if journal.progress.documents:
                check_same(f"{folder} (unfinished)", journal.identity, identity)
                return journal._from_boundary(folder, split, listing, say)
            discard(folder)  # nothing was written yet, so the data may be another
        elif others := sorted({p.name for p in folder.iterdir()} - _OWN):
            raise OutputError(
                f"data.store={folder}: contains other files ({', '.join(others[:3])}); give a new "
                "or an empty folder"
            )
        journal = cls(identity, split, listing[-1], Done())
        journal.save(folder)
        return journal

    @classmethod
    def _parse(cls, file: Path) -> "Journal":
        try:
            values = json.loads(file.read_bytes())
            values["progress"] = Done(**values["progress"])
            values["boundary"] = values["boundary"] and Done(**values["boundary"])
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{file}: is damaged, or of another version ({error!r}); delete {file.parent} and "
                "prepare it again"
            ) from None

    def _from_boundary(
        self, folder: Path, split: str, listing: list[str], say: Callable[[str], None]
    ) -> "Journal":
        """The journal as it was after the sources that have not changed."""
        same = listing[self.sources : self.sources + 1] == [self.sources_listing]
        if self.boundary is None or not same or self.split != split:
            raise MismatchError(
                f"{folder} (unfinished): the sources have changed since it was begun; restore "
                f"them, give another --data.store, or delete {folder} to begin anew"
            )
        say(f"sources have changed; goes on after the first {self.sources}, which are as they were")
        return replace(self, listing=listing[-1], progress=self.boundary.copy())

    def at_boundary(self, sources: int, listing: list[str]) -> None:
        """Remembers the progress as that of the first so many sources."""
        self.sources, self.sources_listing = sources, listing[sources]
        self.boundary = self.progress.copy()

    def save(self, folder: Path) -> None:
        """Writes the journal atomically."""
        store.replace_file(folder / JOURNAL, json.dumps(asdict(self)))


def chained(digest: str, split: str, text: str) -> str:
    """The digest of some documents and one more."""
    link = f"{digest} {split} ".encode() + text.encode("utf-8", "replace")
    return hashlib.sha256(link).hexdigest()


def listing_sha256(found: list[Source]) -> list[str]:
    """SHA-256 of the names and sizes of the first 0, 1, ... sources, up to all of them."""
    digest = hashlib.sha256()
    listing = [digest.hexdigest()]
    for source in found:
        digest.update(json.dumps([source.name, source.size_bytes()]).encode())
        listing.append(digest.hexdigest())
    return listing


def check_same(folder: str | Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises MismatchError where a store was made as other fields of the configuration say."""
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


def discard(folder: Path) -> None:
    """Deletes all files of an unfinished preparation, whose folder was empty before it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
