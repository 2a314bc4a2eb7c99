"""glibc's malloc, told to keep the memory that XLA:CPU asks for anew at every step.

XLA:CPU allocates its temporaries each step; by default glibc gives the pages back and the kernel
clears them again, hundreds of thousands of page faults a step. One arena, no mmap and no trimming
keep them (LOG.md has the measurement). It works only before the first threads allocate, so the
command line calls it before it imports anything large.
"""

import ctypes
import os
import platform
from pathlib import Path

_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_TOP_PAD = -8, -4, -1, -2


def keep_memory() -> bool:
    """Tunes malloc on Linux with glibc where there is no accelerator; says whether it did."""
    accelerators = any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0"))
    on_cpu = os.environ.get("JAX_PLATFORMS", "" if accelerators else "cpu") == "cpu"
    if platform.libc_ver()[0] != "glibc" or not on_cpu:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 256 << 20),
    )
    taken = [mallopt(option, value) for option, value in settings]
    return all(taken)
