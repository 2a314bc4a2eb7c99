"""New token stores in buckets: made on this machine's disk, then copied to their places.

CACHE/new/NAME-HASH/        a store that is being made, named after its place
CACHE/new/NAME-HASH.lock    held by the process that makes it

What a killed preparation had done is kept there, and the same command on this machine goes on.
"""

import hashlib
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from gptjax import bucket
from gptjax.config import Config
from gptjax.data import provenance, store
from gptjax.data.journal import LOCK
from gptjax.data.mixture import part_configs
from gptjax.errors import ConfigError, OutputError
from gptjax.runtime import file_lock

_WRITER = "being-made.json"  # in the place from the beginning to the end
_OF_THIS_MACHINE = {LOCK, provenance.SOURCES}

Tell = Callable[[str, int, int | None], None]


@contextmanager
def on_disk(
    cfg: Config, tell: Tell = lambda *_: None, say: Callable[[str], None] = lambda line: None
) -> Iterator[Config]:
    """The configuration with its missing stores in buckets as folders of this machine, which are
    copied to their places at the end.

    Raises OutputError where a place cannot be written, or has other files by then.
    """
    with ExitStack() as stack:
        parts = part_configs(cfg)
        missing = [c.data.store for c in parts.values() if _is_missing(c.data.store)]
        if cfg.data.mixture and bucket.remote(cfg.data.store) and missing:
            missing.append(cfg.data.store)  # for the tokenizer
        made = {
            place: stack.enter_context(made_here(place, cfg.data.cache, tell, say))
            for place in dict.fromkeys(missing)
        }
        folders = {place: folder for place, folder in made.items() if folder is not None}
        here = lambda place: str(folders.get(place, place))
        mixture = {
            name: replace(part, store=here(parts[name].data.store))
            for name, part in cfg.data.mixture.items()
        }
        if not folders:
            yield cfg
        else:
            data = replace(cfg.data, store=here(cfg.data.store), mixture=mixture)
            yield replace(cfg, data=data)


@contextmanager
def made_here(
    place: str, cache: str, tell: Tell, say: Callable[[str], None], setting: str = "data.store"
) -> Iterator[Path | None]:
    """A folder on this machine, whose files are copied to a place in a bucket at the end.

    None where the place has a finished store, made by another process meanwhile perhaps. Raises
    ConfigError without a `cache`, OutputError where the place cannot be written.
    """
    if not cache:
        raise ConfigError([f"{setting}={place}: is made on this machine's disk; give data.cache"])
    digest = hashlib.sha256(place.rstrip("/").encode()).hexdigest()[:16]
    folder = Path(cache).expanduser() / "new" / f"{bucket.path_of(place).name}-{digest}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file_lock.held(folder.with_suffix(".lock"), f"{setting}={place}", say):
            if not _is_missing(place):
                yield None
                return
            folder.mkdir(exist_ok=True)  # whoever had the lock before removed it
            writer = bucket.path_of(place) / _WRITER
            writer.write_text(f'{{"on": "{socket.gethostname()}"}}\n')  # it can be written to
            say(f"{place}: is made in {folder}, then copied")
            yield folder
            told = lambda done, total: tell(f"copy to {place}", done, total)
            bucket.upload(folder, place, store.MANIFEST, _OF_THIS_MACHINE, told)
            writer.unlink()
            shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"{setting}={place}: {folder}: cannot be written: {error}") from None


def _is_missing(place: str) -> bool:
    return bucket.remote(place) and not (bucket.path_of(place) / store.MANIFEST).exists()
