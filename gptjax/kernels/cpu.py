"""Decoding on a CPU by code of our own, `cpu.c`, where there is a C compiler.

A step of decoding reads every weight, and the cache, for a row or a few, and is as fast as memory
is read; XLA:CPU gets a third to a half of that (LOG.md). The C file is compiled for the processor
at hand when it is first needed, in a few seconds, and kept in the user's cache folder. Where that
cannot be done XLA's own products serve, and `why_not` says what was missing. GPTJAX_NATIVE=0 in the
environment leaves everything to XLA.

Shapes: N rows, at most ROWS; K summed, F columns, V rows of a table; P caches, B rows, H
heads, K heads of keys, S slots, C head_dim.
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
import numpy as np

ROWS = 8
"""Most rows of a product: MOST_ROWS of cpu_kernels.h."""
WIDTH = 32
"""What head_dim must be a multiple of: PAIR of cpu_kernels.h."""
WEIGHTS = 4
"""Most weights of one call: MOST_WEIGHTS of cpu.c."""
_SOURCE = Path(__file__).with_suffix(".c")
_SOURCES = (_SOURCE, _SOURCE.with_name("cpu_kernels.h"))
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_TARGETS = ("gptjax_columns", "gptjax_table", "gptjax_attention")


def columns(x_NK: jax.Array, weights_KF: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x @ w for each of up to WEIGHTS weights, in the dtype of all of them; sums in float32.

    Raises ValueError for more of them or of rows, other sizes, or other dtypes.
    """
    _check(x_NK, *weights_KF, most=ROWS)
    if any(w.shape[0] != x_NK.shape[1] for w in weights_KF):
        raise ValueError(f"{x_NK.shape} times {[w.shape for w in weights_KF]}")
    if len(weights_KF) > WEIGHTS:
        raise ValueError(f"{len(weights_KF)} weights; at most {WEIGHTS}")
    outs = tuple(jax.ShapeDtypeStruct((len(x_NK), w.shape[1]), x_NK.dtype) for w in weights_KF)
    return tuple(jax.ffi.ffi_call("gptjax_columns", outs)(x_NK, *weights_KF))


def table(x_NK: jax.Array, w_VK: jax.Array) -> jax.Array:
    """x @ w.T in float32, of `x` and `w` in one dtype. Raises ValueError as `columns` does."""
    _check(x_NK, w_VK, most=ROWS)
    if w_VK.shape[1] != x_NK.shape[1]:
        raise ValueError(f"{x_NK.shape} times the transpose of {w_VK.shape}")
    out = jax.ShapeDtypeStruct((len(x_NK), len(w_VK)), jnp.float32)
    return jax.ffi.ffi_call("gptjax_table", out)(x_NK, w_VK)


def attention(
    q_BHC: jax.Array,
    k_BKC: jax.Array,
    v_BKC: jax.Array,
    keys_PBKSC: jax.Array,
    values_PBKSC: jax.Array,
    position_B: jax.Array,
    cache: jax.Array,
    window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one token a row to a cache, [B, H, C], and keys and values of the caches with
    that token's in them; all in one dtype, sums in float32.

    Position p lies in slot p modulo S of cache number `cache`, which must be below P. A row's token
    is at `position_B`; below zero there is none. Caches that are not used after are written in
    place. Raises ValueError where C is no multiple of WIDTH, for other sizes, or other dtypes.
    """
    _check(q_BHC, k_BKC, v_BKC, keys_PBKSC, values_PBKSC)
    (b, h, c), (p, _, k, slots, _) = q_BHC.shape, keys_PBKSC.shape
    fit = k_BKC.shape == v_BKC.shape == (b, k, c) and h % k == 0
    fit &= keys_PBKSC.shape == values_PBKSC.shape == (p, b, k, slots, c)
    if not fit or 0 in (slots, window):
        raise ValueError(f"{q_BHC.shape}, {k_BKC.shape}, caches {keys_PBKSC.shape}, {window=}")
    if c % WIDTH:
        raise ValueError(f"heads of {c}; must be a multiple of {WIDTH}")
    stores = (keys_PBKSC, values_PBKSC)
    outs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BHC, *stores))
    call = jax.ffi.ffi_call("gptjax_attention", outs, input_output_aliases={3: 1, 4: 2})
    most = np.int64(2**62 if window is None else window)
    numbers = (jnp.asarray(x, jnp.int32) for x in (position_B, cache))
    return tuple(call(q_BHC, k_BKC, v_BKC, *stores, *numbers, window=most))


def _check(x: jax.Array, *others: jax.Array, most: int | None = None) -> None:
    """The C file takes its arguments as they are."""
    dtypes = {str(array.dtype) for array in (x, *others)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        raise ValueError(f"dtypes {sorted(dtypes)}; must all be float32, or all bfloat16")
    if most is not None and len(x) > most:
        raise ValueError(f"{len(x)} rows; at most {most}")


def ready() -> bool:
    """Whether the functions above can be used in this process; the first call compiles."""
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """Why XLA's products are used instead, or None."""
    if os.environ.get("GPTJAX_NATIVE") == "0":
        return "GPTJAX_NATIVE=0"
    if jax.process_count() > 1:
        return "of several processes, which must run the same programs, some might have no compiler"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc"))), None)
    if compiler is None:
        return "no C compiler was found (cc, gcc, or what CC names)"
    try:
        library = _library(compiler)
        for name in _TARGETS:
            capsule = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not compile {_SOURCE}: {error.stderr.strip()[-300:]}"
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{_SOURCE} was compiled and could not be kept, loaded or registered: {error}"
    return None


def _library(compiler: str) -> ctypes.CDLL:
    """The compiled file, loaded; a broken one, as a full disk leaves it, is made anew."""
    target = _target(compiler)
    if target.exists():
        try:
            return ctypes.CDLL(str(target))
        except OSError:
            target.unlink()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        out = Path(scratch, target.name)
        command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", out, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
        out.replace(target)
    return ctypes.CDLL(str(target))


def _target(compiler: str) -> Path:
    """Where the file is for this very source, runtime, compiler and processor.

    Raises OSError for a folder that others could put a file of theirs into.
    """
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, errors="replace"
    ).stdout
    sources = [source.read_bytes() for source in _SOURCES]
    made_of = (sources, jaxlib.__version__, version, _FLAGS, _processor())
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (caches if caches.is_absolute() else Path("~/.cache").expanduser()) / "gptjax/native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise PermissionError(f"{folder}: must be this user's, and written by nobody else")
    return folder / f"{name}.so"


def _processor() -> str:
    """What -march=native looks at: a home may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
