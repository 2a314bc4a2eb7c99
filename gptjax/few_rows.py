"""Products of few rows on a CPU by code of our own, `few_rows.c`, where there is a C compiler.

A step of decoding reads every weight once for a row or a few, and is as fast as memory is read.
XLA:CPU gets a third to a half of that (LOG.md). The C file is compiled for the processor at hand
when it is first needed, in a second or a few, and kept in the user's cache folder. Where that
cannot be done, XLA's products serve, and `why_not` says what was missing. GPTJAX_FEW_ROWS=0 in the
environment leaves it all to XLA.

Shapes: n rows, at most MOST; K summed, F columns, V rows of a table.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

MOST = 8
"""Rows of a product, and the C file's MOST_ROWS."""
_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_TARGETS = ("gptjax_columns", "gptjax_table")


def columns(x_nK: jax.Array, weights_KF: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x @ w for each of up to four weights, in the dtype of all of them; sums in float32."""
    outs = tuple(jax.ShapeDtypeStruct((len(x_nK), w.shape[1]), x_nK.dtype) for w in weights_KF)
    return tuple(jax.ffi.ffi_call("gptjax_columns", outs)(x_nK, *weights_KF))


def table(x_nK: jax.Array, w_VK: jax.Array) -> jax.Array:
    """x @ w.T in float32, of `x` and `w` in one dtype."""
    out = jax.ShapeDtypeStruct((len(x_nK), len(w_VK)), jnp.float32)
    return jax.ffi.ffi_call("gptjax_table", out)(x_nK, w_VK)


def ready() -> bool:
    """Whether the functions above can be used in this process; the first call compiles."""
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """Why XLA's products are used instead, or None."""
    if os.environ.get("GPTJAX_FEW_ROWS") == "0":
        return "GPTJAX_FEW_ROWS=0"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc"))), None)
    if compiler is None:
        return "no C compiler was found (cc, gcc, or what CC names)"
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not compile {_SOURCE}: {error.stderr.strip()[-300:]}"
    except OSError as error:
        return f"{_SOURCE} was compiled and could not be kept or loaded: {error}"
    for name in _TARGETS:
        capsule = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return None


def _built(compiler: str) -> Path:
    """The compiled file; made for this very source, runtime, compiler and processor."""
    source = _SOURCE.read_bytes()
    made_of = (source, jaxlib.__version__, os.path.realpath(compiler), _FLAGS, _processor())
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptjax/few_rows"
    target = cache / f"{name}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            out = Path(scratch, "few_rows.so")
            command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", out]
            subprocess.run(command, check=True, capture_output=True, text=True)
            out.replace(target)
    return target


def _processor() -> str:
    """What -march=native looks at: a home may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
