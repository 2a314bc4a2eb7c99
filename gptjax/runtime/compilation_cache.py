"""JAX's persistent compilation cache, and whether it was hit."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_counts = {_HIT: 0, _MISS: 0}


def enable_cache(folder: str) -> None:
    """Turns on JAX's persistent compilation cache in a folder, for this user alone; empty: none."""
    if not folder:
        return
    path = Path(folder).expanduser()
    why_not = ""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        stat = path.stat()
        if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
            why_not = (
                "programs are loaded from it, so it must belong to this user and be writable by "
            )
            why_not += "no one else"
    except OSError as error:
        why_not = str(error)
    if why_not:
        print(f"gptjax: log.compile_cache={folder}: not used: {why_not}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.monitoring.register_event_listener(_count)


def _count(event: str, **_: object) -> None:
    if event in _counts:
        _counts[event] += 1


@contextmanager
def cache_report() -> Iterator[Callable[[], str]]:
    """Yields a function that tells whether the cache was hit, missed, not asked or off since."""
    before = dict(_counts)

    def report() -> str:
        hits, misses = (_counts[name] - before[name] for name in (_HIT, _MISS))
        if not jax.config.jax_compilation_cache_dir:
            return "compilation cache: off"
        return f"compilation cache: {'miss' if misses else 'hit' if hits else 'not asked'}"

    yield report
