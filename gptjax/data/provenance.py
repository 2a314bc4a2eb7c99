"""What text a token store was made of, and whether it is still that text.

STORE/sources.json lists the sources: names, sizes, and of local files the times of change and,
where all of them are soon read again, hashes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gptjax import tokenizer as tokenizers
from gptjax.config import Config
from gptjax.data import sources, store
from gptjax.data.files import TextFile
from gptjax.data.sources import Source
from gptjax.errors import DataError

SOURCES = "sources.json"
_HASHED_BYTES = 4 << 30  # of files that are larger together, sizes and times are compared alone


@dataclass(frozen=True)
class SourceFacts:
    """A source as it was when the store was made; of one that is no local file, only its size."""

    size: int
    mtime_ns: int | None = None
    sha256: str | None = None


def record(folder: Path, found: list[Source]) -> None:
    """Writes sources.json into a store's folder."""
    local = [file for file in map(_local, found) if file is not None]
    hashed = sum(file.stat().st_size for file in local) <= _HASHED_BYTES
    facts = {name: asdict(_facts(s, hashed=hashed)) for name, s in _by_name(found).items()}
    store.replace_file(folder / SOURCES, json.dumps(facts))


def changes(cfg: Config) -> list[str]:
    """What differs between the text that a local store was made of and that of today, a line each.

    None where the store is of before this was recorded, or where none of its text is here.
    """
    folder = Path(cfg.data.store)
    if not (folder / SOURCES).exists():
        return []
    known = _read(folder / SOURCES)
    held_out = _present(cfg.data.valid_sources)
    found = _by_name(sources.without(_present(cfg.data.sources), held_out) + held_out)
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


def _read(file: Path) -> dict[str, SourceFacts]:
    try:
        return {name: SourceFacts(**facts) for name, facts in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: is damaged ({error}); delete it to use the store unchecked"
        ) from None


def _present(patterns: Sequence[str]) -> list[Source]:
    """The sources of the patterns of which there is something on this machine."""

    def is_present(pattern: str) -> bool:
        try:
            return bool(sources.resolve((pattern,)))
        except DataError:
            return False

    return sources.resolve(list(filter(is_present, patterns)))


def _by_name(found: list[Source]) -> dict[str, Source]:
    """The sources by their names, with a number where several have the same."""
    times: Counter[str] = Counter()
    named = {}
    for source in found:
        times[source.name] += 1
        number = times[source.name]
        named[source.name if number == 1 else f"{source.name} ({number})"] = source
    return named


def _local(source: Source) -> Path | None:
    if isinstance(source, TextFile) and "://" not in str(source.path):
        return Path(source.path)
    return None


def _facts(source: Source, *, hashed: bool) -> SourceFacts:
    file = _local(source)
    if file is None:
        return SourceFacts(source.size_bytes())
    stat = file.stat()
    return SourceFacts(stat.st_size, stat.st_mtime_ns, _sha256(file) if hashed else None)


def _difference(source: Source, then: SourceFacts) -> str:
    """How a source differs from what it was; empty where it does not."""
    now = _facts(source, hashed=False)
    if now.size != then.size:
        return f"has {now.size} bytes, {then.size} when the store was made"
    file = _local(source)
    if file is None or now.mtime_ns == then.mtime_ns:
        return ""
    if then.sha256 is None:
        return "was written to since the store was made"
    return "" if _sha256(file) == then.sha256 else "has other contents than when the store was made"


def _tokenizer_changes(cfg: Config) -> Iterable[str]:
    path = Path(cfg.tokenizer.path).expanduser()
    if cfg.tokenizer.path and cfg.tokenizer.kind != "bytes" and path.exists():
        given = tokenizers.make(cfg.tokenizer, ()).fingerprint
        if given != store.read_manifest(cfg.data.store).tokenizer["sha256"]:
            yield f"tokenizer.path={cfg.tokenizer.path}: is another tokenizer than the store's"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
