"""How programs are compiled: options by device, and the cache on disk that says if it helped."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

# On these, collectives run beside arithmetic when they are handed to the SparseCore (LOG.md).
_SPARSE_CORE = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x")
_OFFLOADED = ("all_gather", "reduce_scatter", "all_reduce")


def options(device_kind: str) -> dict[str, str]:
    """Options of XLA for a program of such devices, as `compile` takes them."""
    if device_kind not in _SPARSE_CORE:
        return {}
    return {f"xla_tpu_enable_sparse_core_collective_offload_{k}": "true" for k in _OFFLOADED}


_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_counts = {_HIT: 0, _MISS: 0}


def enable_cache(folder: str) -> None:
    """Keeps compiled programs in a folder of this user's; empty: nowhere."""
    if not folder:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        print(f"gptjax: log.compile_cache={folder}: not used: {error}", file=sys.stderr)
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
    """Gives a function that says what the cache did since: hit, miss, or off."""
    before = dict(_counts)

    def report() -> str:
        hits, misses = (_counts[name] - before[name] for name in (_HIT, _MISS))
        if not jax.config.jax_compilation_cache_dir:
            return "compilation cache: off"
        return f"compilation cache: {'miss' if misses else 'hit' if hits else 'not asked'}"

    yield report
