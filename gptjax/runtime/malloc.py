"""Tuning of glibc's malloc to keep the memory that XLA:CPU allocates in every step.

XLA:CPU allocates its temporaries in each step; by default glibc returns their pages and the kernel
zeroes them again, hundreds of thousands of page faults a step. One arena, no mmap and no trimming
keep the pages, and huge pages avoid most TLB misses (docs/lab_log.md has the measurements). It
only works before the first threads allocate, so the command line calls it before any large import.
"""

import ctypes
import os
import platform
from pathlib import Path

_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_TOP_PAD = -8, -4, -1, -2
_MADV_HUGEPAGE, _HUGE = 14, 2 << 20


def keep_memory() -> bool:
    """Tunes malloc on Linux with glibc and without an accelerator; returns whether it did."""
    accelerators = any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0"))
    on_cpu = os.environ.get("JAX_PLATFORMS", "" if accelerators else "cpu") == "cpu"
    if platform.libc_ver()[0] != "glibc" or not on_cpu:
        return False
    libc = ctypes.CDLL(None)
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, -1),  # never
        (_M_TOP_PAD, 256 << 20),
    )
    accepted = [libc.mallopt(option, value) for option, value in settings]
    _request_huge_pages(libc, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return all(accepted)


def _request_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Grows the heap by `size` bytes of untouched addresses that are marked for huge pages.

    They are freed at once, so malloc allocates from them next. If the kernel refuses, nothing
    changes.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if start := libc.malloc(size):
        first = -(-start // _HUGE) * _HUGE
        libc.madvise(first, (start + size - first) // _HUGE * _HUGE, _MADV_HUGEPAGE)
        libc.free(start)
