"""CPU kernels, written in C in `cpu.c`: for decoding, products of few tokens and attention to a
cache; for training, attention of whole sequences and the loss, with their gradients.

A decode step reads all weights and the KV cache for one or a few tokens, so memory bandwidth bounds
its speed; XLA:CPU reaches a third to a half of that bound (docs/lab_log.md). In training, XLA's
small products of attention take three times as long as the kernel, and its loss reads the logits
from memory in each of its passes. The C file is compiled for this
machine's processor at first use, in a few seconds, and kept in the user's cache folder. If that
fails, XLA's own products are used, and `why_not` gives the reason. GPTJAX_NATIVE=0 in the
environment disables the kernels.

Shapes: N tokens, at most ROWS; K input features, F output features, V vocabulary. In
attention: P layers of a cache, B sequences, H heads, K key-value heads, S tokens that the cache
has space for, C head_dim.
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
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

ROWS = 8
"""Most tokens of a product: MOST_ROWS in cpu_kernels.h."""
WIDTH = 32
"""head_dim must be a multiple of this: PAIR in cpu_kernels.h."""
WEIGHTS = 4
"""Most weight matrices of one call: MOST_WEIGHTS in cpu_calls.h."""
_SOURCE = Path(__file__).with_suffix(".c")
_HEADERS = ("cpu_calls.h", "cpu_flash.h", "cpu_flash_bf16.h", "cpu_kernels.h", "cpu_loss.h")
_SOURCES = (_SOURCE, *(_SOURCE.with_name(name) for name in _HEADERS))
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_FLASH = ("gptjax_flash_forward", "gptjax_flash_backward")
_TARGETS = ("gptjax_columns", "gptjax_table", "gptjax_attention", *_FLASH, "gptjax_loss")


def columns(x_NK: jax.Array, weights_KF: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x @ w for each of up to WEIGHTS matrices, in their common dtype, with float32 sums.

    Raises ValueError for too many matrices or tokens, sizes that do not fit, or other dtypes.
    """
    _check(x_NK, *weights_KF, most=ROWS)
    if any(w.shape[0] != x_NK.shape[1] for w in weights_KF):
        raise ValueError(f"{x_NK.shape} times {[w.shape for w in weights_KF]}")
    if len(weights_KF) > WEIGHTS:
        raise ValueError(f"{len(weights_KF)} weight matrices; at most {WEIGHTS}")
    outs = tuple(jax.ShapeDtypeStruct((len(x_NK), w.shape[1]), x_NK.dtype) for w in weights_KF)
    return tuple(jax.ffi.ffi_call("gptjax_columns", outs)(x_NK, *weights_KF))


def table(x_NK: jax.Array, w_VK: jax.Array) -> jax.Array:
    """x @ w.T in float32, for `x` and `w` of one dtype. Raises ValueError as `columns` does."""
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
    """Attention of one token of each sequence to its KV cache [B, H, C], and the cache's keys and
    values with this token's in them; all of one dtype, with float32 sums.

    Uses layer `cache` of the P in the arrays. Position p is at index p modulo S, so that a smaller
    S makes a ring buffer. `position_B` is the token's position; negative for no token. Arrays that
    the caller does not use afterwards are updated in place. Raises ValueError if C is not a
    multiple of WIDTH, sizes do not fit, or the dtypes differ.
    """
    _check(q_BHC, k_BKC, v_BKC, keys_PBKSC, values_PBKSC)
    (b, h, c), (p, _, k, size, _) = q_BHC.shape, keys_PBKSC.shape
    fit = k_BKC.shape == v_BKC.shape == (b, k, c) and h % k == 0
    fit &= keys_PBKSC.shape == values_PBKSC.shape == (p, b, k, size, c)
    if not fit or 0 in (size, window):
        raise ValueError(f"{q_BHC.shape}, {k_BKC.shape}, caches {keys_PBKSC.shape}, {window=}")
    if c % WIDTH:
        raise ValueError(f"heads of {c}; must be a multiple of {WIDTH}")
    stores = (keys_PBKSC, values_PBKSC)
    outs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BHC, *stores))
    call = jax.ffi.ffi_call("gptjax_attention", outs, input_output_aliases={3: 1, 4: 2})
    most = np.int64(2**62 if window is None else window)
    numbers = (jnp.asarray(x, jnp.int32) for x in (position_B, cache))
    out_BHC, keys_PBKSC, values_PBKSC = call(q_BHC, k_BKC, v_BKC, *stores, *numbers, window=most)
    return out_BHC, keys_PBKSC, values_PBKSC


def flash(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segments_BT: jax.Array,
    window: int | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of whole sequences within equal segments, which are runs [B, T, H, C], and
    the logarithm of each softmax's sum, float32 [B, H, T]; of one dtype, with float32 sums.

    Raises ValueError as `attention` does.
    """
    _check_flash(q_BTHC, k_BTKC, v_BTKC, segments_BT, window)
    b, t, h, _ = q_BTHC.shape
    outs = (
        jax.ShapeDtypeStruct(q_BTHC.shape, q_BTHC.dtype),
        jax.ShapeDtypeStruct((b, h, t), jnp.float32),
    )
    arrays = (q_BTHC, k_BTKC, v_BTKC, segments_BT)
    out_BTHC, lse_BHT = jax.ffi.ffi_call(_FLASH[0], outs)(*arrays, **_flash_numbers(window, scale))
    return out_BTHC, lse_BHT


def flash_gradients(
    inputs: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    results: tuple[jax.Array, jax.Array],
    dy_BTHC: jax.Array,
    window: int | None,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, keys and values, from the four arrays that `flash` took, its two
    results, and the gradient of the first of them."""
    _check_flash(*inputs, window)
    _check(inputs[0], results[0], dy_BTHC)
    outs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:3])
    call = jax.ffi.ffi_call(_FLASH[1], outs)
    dq_BTHC, dk_BTKC, dv_BTKC = call(*inputs, *results, dy_BTHC, **_flash_numbers(window, scale))
    return dq_BTHC, dk_BTKC, dv_BTKC


def _flash_numbers(window: int | None, scale: float) -> dict[str, Any]:
    return {"window": np.int64(2**62 if window is None else window), "scale": np.float32(scale)}


def _check_flash(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segments_BT: jax.Array,
    window: int | None,
) -> None:
    _check(q_BTHC, k_BTKC, v_BTKC)
    (b, t, h, c), k = q_BTHC.shape, k_BTKC.shape[2]
    fit = k_BTKC.shape == v_BTKC.shape == (b, t, k, c) and h % k == 0 and t > 0
    fit &= segments_BT.shape == (b, t) and segments_BT.dtype == jnp.int32
    if not fit or window == 0 or c % WIDTH:
        shapes = (q_BTHC.shape, k_BTKC.shape, v_BTKC.shape)
        raise ValueError(f"{shapes}, segments {segments_BT.shape}, {window=}")


def cross_entropy(
    logits_CV: jax.Array,
    targets_C: jax.Array,
    weights_C: jax.Array,
    dtype: jnp.dtype,
    *,
    valid: int,
    z_loss: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient, in a dtype, of the sum over tokens of weight * (lse - logit of the target) and
    weight * z_loss * lse**2 with respect to logits in float32 [C, V]; the logarithm of each
    softmax's sum, and the targets' logits, float32 [C].

    Logits from `valid` on are not predicted. The logits' memory is used again where the dtype is
    float32. Raises ValueError for other dtypes, or sizes that do not fit.
    """
    c, v = logits_CV.shape
    fit = targets_C.shape == weights_C.shape == (c,) and 1 <= valid <= v
    known = logits_CV.dtype == jnp.float32 and dtype in (jnp.float32, jnp.bfloat16)
    if not fit or not known:
        shapes = (logits_CV.shape, targets_C.shape, weights_C.shape)
        raise ValueError(f"{shapes}, {valid=}, dtypes {logits_CV.dtype} and {dtype}")
    numbers = jax.ShapeDtypeStruct((c,), jnp.float32)
    outs = (jax.ShapeDtypeStruct((c, v), dtype), numbers, numbers)
    same = {0: 0} if dtype == jnp.float32 else {}
    call = jax.ffi.ffi_call("gptjax_loss", outs, input_output_aliases=same)
    targets_C, weights_C = targets_C.astype(jnp.int32), weights_C.astype(jnp.float32)
    options = {"valid": np.int64(valid), "z_loss": np.float32(z_loss)}
    gradients_CV, lse_C, target_C = call(logits_CV, targets_C, weights_C, **options)
    return gradients_CV, lse_C, target_C


def _check(x: jax.Array, *others: jax.Array, most: int | None = None) -> None:
    """Raises ValueError for arguments that the C code, which checks nothing, cannot take."""
    dtypes = {str(array.dtype) for array in (x, *others)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        raise ValueError(f"dtypes {sorted(dtypes)}; must all be float32, or all bfloat16")
    if most is not None and len(x) > most:
        raise ValueError(f"{len(x)} tokens; at most {most}")


def ready() -> bool:
    """Whether this process can use the kernels; the first call compiles them."""
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """The reason why XLA's products are used instead, or None."""
    if os.environ.get("GPTJAX_NATIVE") == "0":
        return "GPTJAX_NATIVE=0"
    if jax.process_count() > 1:
        return "several processes must run the same program, and some may have no compiler"
    found = compiler()
    if found is None:
        return "no C compiler was found (cc, gcc, or the one that CC names)"
    try:
        library = _library(found)
        for name in _TARGETS:
            capsule = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except subprocess.CalledProcessError as error:
        return f"{found} could not compile {_SOURCE}: {error.stderr.strip()[-300:]}"
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{_SOURCE} was compiled, but could not be stored, loaded or registered: {error}"
    return None


def compiler() -> str | None:
    """The C compiler of this machine: the one that CC names, cc or gcc; None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc"))), None)


def _library(compiler: str) -> ctypes.CDLL:
    """The compiled library; one that is broken, or not as it was written, is compiled again."""
    target = _target(compiler)
    hash_file = target.with_suffix(".sha256")
    own = _is_own(target) and _is_own(hash_file)
    if own and hash_file.read_text() == _sha256(target):  # one cut short would end the process
        return ctypes.CDLL(str(target))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        out = Path(scratch, target.name)
        include = f"-I{jax.ffi.include_dir()}"
        command = [compiler, *_FLAGS, include, str(_SOURCE), "-o", str(out), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
        written = Path(scratch, hash_file.name)
        written.write_text(_sha256(out))
        out.replace(target)
        written.replace(hash_file)
    return ctypes.CDLL(str(target))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_own(path: Path) -> bool:
    """Whether a file or folder belongs to this user, and nobody else can write to it."""
    if not path.exists():
        return False
    stat = path.stat()
    return stat.st_uid == os.geteuid() and not stat.st_mode & 0o022


def _target(compiler: str) -> Path:
    """The path of the library for this source, jaxlib, compiler and processor.

    Raises OSError for a folder that other users can write to.
    """
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, errors="replace"
    ).stdout
    sources = [source.read_bytes() for source in _SOURCES]
    inputs = (sources, jaxlib.__version__, version, _FLAGS, _processor())
    name = hashlib.sha256(repr(inputs).encode()).hexdigest()[:32]
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (caches if caches.is_absolute() else Path("~/.cache").expanduser()) / "gptjax/native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_own(folder):
        raise PermissionError(f"{folder}: must belong to this user and be writable by no one else")
    return folder / f"{name}.so"


def _processor() -> str:
    """The processor as -march=native sees it: machines of different kinds may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
