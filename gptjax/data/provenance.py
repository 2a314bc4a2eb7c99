"""What text a token store was made of, and whether it is still that text.

STORE/sources.json lists the local files among the sources: their names, sizes, times of change and,
where all of them are soon read again, hashes. Remote files and TFDS datasets are not compared.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gptjax import tokenizer as tokenizers
from gptjax.config import Config
from gptjax.config.registry import DATA_SOURCES
from gptjax.data import sources, store
from gptjax.data.files import TextFile
from gptjax.data.sources import Source
from gptjax.errors import DataError

SOURCES = "sources.json"
_HASHED_BYTES = 4 << 30  # of files that are larger together, sizes and times are compared alone


@dataclass(frozen=True)
class FileFacts:
    """A file as it was when the store was made."""

    size: int
    mtime_ns: int
    sha256: str | None


def stats(found: list[Source]) -> dict[str, tuple[int, int]]:
    """Sizes and times of change of the local files among the sources, by name."""
    local = _local_by_name(found)
    taken = {name: file.stat() for name, file in local.items()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in taken.items()}


def check_unchanged(then: dict[str, tuple[int, int]], found: list[Source]) -> None:
    """Raises DataError for a file that was written to since its `stats`."""
    changed = [name for name, stat in stats(found).items() if stat != then.get(name)]
    if changed:
        raise DataError(
            f"{', '.join(changed[:3])}: written to while the text was prepared; delete the store, "
            "and prepare it when nobody writes to its text"
        )


def record(folder: Path, found: list[Source]) -> None:
    """Writes sources.json into a store's folder."""
    local = _local_by_name(found)
    stats = {name: file.stat() for name, file in local.items()}
    hashed = sum(stat.st_size for stat in stats.values()) <= _HASHED_BYTES
    facts = {
        name: FileFacts(stat.st_size, stat.st_mtime_ns, _sha256(local[name]) if hashed else None)
        for name, stat in stats.items()
    }
    listing = {name: asdict(file) for name, file in facts.items()}
    store.replace_file(folder / SOURCES, json.dumps(listing))


def changes(cfg: Config) -> list[str]:
    """What differs between the text that a local store was made of and that of today, a line each.

    None where the store is of before this was recorded, or where none of its text is here.
    """
    listing = Path(cfg.data.store) / SOURCES
    if not listing.exists():
        return []
    try:
        known = _read(listing)
    except DataError as error:
        return [str(error)]
    held_out = _present(cfg.data.valid_sources)
    found = _local_by_name(sources.without(_present(cfg.data.sources), held_out) + held_out)
    if not found:
        return []
    told = [f"{name}: is new" for name in found if name not in known]
    told += [f"{name}: is gone" for name in known if name not in found]
    told += [
        f"{name}: {difference}"
        for name, facts in known.items()
        if name in found and (difference := _difference(found[name], facts))
    ]
    return told + list(_tokenizer_changes(cfg))


def _read(file: Path) -> dict[str, FileFacts]:
    try:
        return {name: FileFacts(**facts) for name, facts in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: is damaged ({error}), so nothing says whether the text has changed"
        ) from None


def _present(patterns: Sequence[str]) -> list[Source]:
    """The sources of the patterns of local files of which there is something on this machine."""
    found: list[Source] = []
    for pattern in patterns:
        if "://" in pattern or pattern.partition(":")[0] in DATA_SOURCES.names():
            continue
        with contextlib.suppress(DataError):
            found += sources.resolve((pattern,))
    return sources.once(found)


def _local_by_name(found: list[Source]) -> dict[str, Path]:
    """The local files by their names, with a number where several have the same."""
    times: Counter[str] = Counter()
    named = {}
    for source in found:
        if isinstance(source, TextFile) and "://" not in str(source.path):
            times[source.name] += 1
            number = times[source.name]
            name = source.name if number == 1 else f"{source.name} ({number})"
            named[name] = Path(source.path)
    return named


def _difference(file: Path, then: FileFacts) -> str:
    """How a file differs from what it was; empty where it does not."""
    stat = file.stat()
    if stat.st_size != then.size:
        return f"has {stat.st_size} bytes, {then.size} when the store was made"
    if stat.st_mtime_ns == then.mtime_ns:
        return ""
    if then.sha256 is None:
        return "was written to since the store was made"
    return "" if _sha256(file) == then.sha256 else "has other contents than when the store was made"


def _tokenizer_changes(cfg: Config) -> Iterator[str]:
    path = Path(cfg.tokenizer.path).expanduser()
    if not cfg.tokenizer.path or cfg.tokenizer.kind == "bytes" or not path.exists():
        return
    try:
        given = tokenizers.make(cfg.tokenizer, ()).fingerprint
    except DataError as error:
        yield str(error)
        return
    if given != store.read_manifest(cfg.data.store).tokenizer["sha256"]:
        yield f"tokenizer.path={cfg.tokenizer.path}: is another tokenizer than the store's"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
