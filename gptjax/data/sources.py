"""Data sources: files, TFDS datasets and the Python library, read as one stream of documents.

A source is anything with the methods of `Source`. The stream has the order of the configured
patterns, and of sorted paths within a pattern, so it is the same on every machine, and a position
in it is a count of documents. Files in gs:// and s3:// read as local ones do (bucket.py).

A further kind of source is a scheme, registered from outside the package:

    from gptjax.config.registry import DATA_SOURCES

    @DATA_SOURCES.register("sql")
    def sql(rest: str) -> list[Source]:
        "The sources that the pattern sql:REST in data.sources names."
"""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from etils import epath

from gptjax import bucket
from gptjax.config import DataConfig
from gptjax.config.limits import unknown_scheme
from gptjax.config.registry import DATA_SOURCES
from gptjax.data.files import Counts, Decoder, Document, TextFile, record
from gptjax.data.tf_import import import_tensorflow
from gptjax.errors import DataError
from gptjax.runtime import regular_file

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Source(Protocol):
    """A sequence of documents with a name: the interface of all data sources.

    A source is hashable, and two equal sources have the same documents.
    """

    @property
    def name(self) -> str:
        """A name that does not depend on the machine.

        Names and sizes identify the data of an unfinished store.
        """
        ...

    def size_bytes(self) -> int:
        """Estimated bytes of text, for progress. Raises DataError."""
        ...

    def documents(self, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
        """Yields the documents, always in the same order, and counts what it skips or changes.

        Raises DataError naming the place of what cannot be read.
        """
        ...


@dataclass(frozen=True)
class TfdsDataset:
    """A split of a TFDS dataset, which is given by its name or by the folder that holds it."""

    dataset: str
    split: str

    @property
    def name(self) -> str:
        """The pattern, with its split."""
        return f"tfds:{self.dataset}@{self.split}"

    def size_bytes(self) -> int:
        """Bytes of the split, as the dataset's metadata has them."""
        return self._builder().info.splits[self.split].num_bytes

    def documents(self, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
        """One document for each record."""
        tf = import_tensorflow()
        import tensorflow_datasets as tfds

        builder = self._builder()
        decode = Decoder(cfg, counts)
        number = 0
        try:
            if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:
                records = iter(builder.as_data_source(split=self.split))
            else:
                config = tfds.ReadConfig(interleave_cycle_length=1)
                dataset = builder.as_dataset(
                    split=self.split, shuffle_files=False, read_config=config
                )
                records = iter(tfds.as_numpy(dataset))
            for number, value in enumerate(records):
                place = f"{self.name}:{number}"
                yield from record(value, place, place, decode)
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            first = str(error).strip().split("\n")[0]
            raise DataError(f"{self.name}: cannot be read after record {number}: {first}") from None

    def _builder(self) -> Any:
        """The TFDS builder; never downloads."""
        option = f"data.sources=tfds:{self.dataset}"
        try:
            import_tensorflow()  # before the package does it
            import tensorflow_datasets as tfds
            from google.protobuf.json_format import ParseError
        except ImportError as error:
            raise DataError(f"{option}: needs the package {error.name}; install it") from None
        try:
            folder = epath.Path(self.dataset).expanduser()
            if folder.is_dir():
                builder = tfds.builder_from_directory(folder)
            else:
                builder = tfds.builder(self.dataset, try_gcs=False)
        except (tfds.core.DatasetNotFoundError, OSError, ValueError, ParseError) as error:
            first = str(error).strip().split("\n")[0]
            raise DataError(f"{option}: no such dataset ({first})") from None
        if self.split not in builder.info.splits:
            found = ", ".join(builder.info.splits) or "none on this machine; prepare it with TFDS"
            raise DataError(f"{option}@{self.split}: no such split; available: {found}")
        return builder


@DATA_SOURCES.register("tfds")
def _tfds(rest: str) -> list[TfdsDataset]:
    """The dataset of a pattern tfds:DATASET@SPLIT; without @SPLIT, its split train."""
    dataset, _, split = rest.partition("@")
    return [TfdsDataset(dataset, split or "train")]


def resolve(
    patterns: Sequence[str], option: str = "data.sources", counts: Counts | None = None
) -> list[Source]:
    """The sources that patterns name, in order; a file that several of them name once.

    A pattern is SCHEME:REST with a registered scheme, python-library, or a path or glob of files.
    Hidden files are left out unless a pattern names them, and counted, as repeated ones are.
    Raises DataError naming `option`, the field or flag that holds the patterns.
    """
    counts = counts or Counts()
    found: list[Source] = []
    for pattern in patterns:
        scheme, colon, rest = pattern.partition(":")
        if colon and scheme in DATA_SOURCES.names():
            found += DATA_SOURCES[scheme](rest)
        elif pattern == "python-library":
            found += _python_library()
        elif files := _glob(pattern, counts):
            found += files
        else:
            schemes = ", ".join(f"{name}:" for name in DATA_SOURCES.names())
            raise DataError(
                f"{option}={pattern}: no such file; give a path, a quoted glob, or a pattern that "
                f"begins with a scheme ({schemes})"
            )
    distinct = once(found)
    counts.repeated_files += len(found) - len(distinct)
    return distinct


def once(found: list[Source]) -> list[Source]:
    """The sources without those that came before, under whatever path or link."""
    distinct = {_identity(source): source for source in reversed(found)}
    return list(reversed(distinct.values()))


def without(found: list[Source], others: list[Source]) -> list[Source]:
    """The sources that are not among the others, under whatever path or link."""
    excluded = {_identity(source) for source in others}
    return [source for source in found if _identity(source) not in excluded]


def _identity(source: Source) -> Any:
    """What two sources of the same documents share: of a local file its path without links."""
    if isinstance(source, TextFile) and "://" not in str(source.path):
        return os.path.realpath(source.path)
    return source


def _python_library() -> list[TextFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for suffix in ("py", "txt", "rst")
        for path in Path(root).rglob(f"*.{suffix}")
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    )
    if not files:
        raise DataError(
            f"data.sources=python-library: {root} has no source files; give files instead"
        )
    return [TextFile(path, path.relative_to(root).as_posix()) for path in files]


def _glob(pattern: str, counts: Counts) -> list[TextFile]:
    """The files of a path, a folder or a glob, sorted; none where there is no such file."""
    if why := unknown_scheme(pattern):
        raise DataError(f"{pattern}: {why}")
    path = bucket.text_path_of(pattern).expanduser()
    if path.is_dir():
        return _below(path, "**/*", counts)
    if path.exists():  # before the glob, for names that contain one of its characters
        if "://" not in pattern:
            regular_file.check(Path(path), f"data.sources={pattern}")
        return [TextFile(path, path.name)]
    parts = str(path).split("/")
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if first is None:
        return []
    root = bucket.text_path_of("/".join(parts[:first]) or ("/" if first else "."))
    return _below(root, "/".join(parts[first:]), counts) if root.exists() else []


def _below(root: Any, pattern: str, counts: Counts) -> list[TextFile]:
    """The files of a glob below a folder, sorted by path; hidden ones are counted only, unless the
    pattern names them. Links to folders are followed, into each folder once."""
    parts = tuple(pattern.split("/"))
    if "://" in str(root):
        if "**" in parts:  # which is slow on a remote store
            raise DataError(
                f"data.sources={root}/{pattern}: remote folders are not searched; name the files, "
                "or give a glob without **"
            )
        above = len(str(root).rstrip("/")) + 1
        paths = [p for p in root.glob(pattern) if not p.is_dir()]
        names = [tuple(str(path)[above:].split("/")) for path in paths]
    elif "**" in parts:
        names = [name for name in _walk(Path(root)) if _matches(name, parts)]
    else:
        paths = [p for p in Path(root).glob(pattern) if not p.is_dir()]
        names = [path.relative_to(root).parts for path in paths]
    names.sort(key="/".join)
    if any(part.startswith(".") for part in parts):
        shown = names
    else:
        shown = [n for n in names if not any(part.startswith(".") for part in n)]
    counts.hidden_files += len(names) - len(shown)
    return [TextFile(root.joinpath(*name), "/".join(name)) for name in shown]


def _walk(root: Path) -> Iterator[tuple[str, ...]]:
    """The files below a folder and the folders that it links to, as parts of their paths."""
    entered = {os.path.realpath(root)}
    for folder, below, files in os.walk(root, followlinks=True):
        above = Path(folder).relative_to(root).parts
        yield from ((*above, file) for file in files)
        kept = []
        for name in sorted(below):
            real = os.path.realpath(os.path.join(folder, name))
            if real not in entered:
                entered.add(real)
                kept.append(name)
        below[:] = kept


def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the parts of a path match those of a glob, where ** is any number of folders."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        rest = pattern[1:] or ("*",)
        return any(_matches(path[i:], rest) for i in range(len(path)))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
