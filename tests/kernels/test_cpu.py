"""The CPU kernels against numpy, and the fallback without a compiler."""

import hashlib
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.kernels import cpu

pytestmark = pytest.mark.skipif(
    cpu.why_not() is not None, reason=f"products are left to XLA: {cpu.why_not()}"
)

DTYPES = ("float32", "bfloat16")
# Sizes that are whole vectors, that are not, that fill more than one block, and that are tiny.
SIZES = [(576, (576, 192, 192)), (33, (70,)), (101, (31, 1, 64, 33)), (64, (7000, 7000)), (3, (5,))]


def normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Drawn by numpy, since JAX compiles a program for each shape."""
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(numbers.astype(jnp.dtype(dtype)))


def attend(q_BHC, keys, size, width, window=None):
    """Attention of ones to an empty KV cache of `size` tokens."""
    new, cache = jnp.ones((1, keys, width)), jnp.ones((1, 1, keys, size, width))
    return cpu.attention(q_BHC, new, new, cache, cache, jnp.zeros(1, "int32"), 0, window)


def lose(logits_CV, tokens=2, valid=4, dtype="float32"):
    targets, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)
    return cpu.cross_entropy(logits_CV, targets, weights, jnp.dtype(dtype), valid=valid, z_loss=0.0)


def exact(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(a).astype(np.float64) for a in arrays]


def close(found: jax.Array, wanted: np.ndarray, terms: int) -> None:
    """Asserts equality up to the rounding of `terms` summands of size one, and of the result."""
    own = 2**-8 if found.dtype == jnp.bfloat16 else 0
    (found,) = exact(found)
    bound = own * np.abs(wanted) + 4e-7 * terms**0.5 * max(1, np.abs(wanted).max())
    assert (np.abs(found - wanted) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, cpu.ROWS + 1))
@pytest.mark.parametrize(("summed", "widths"), SIZES)
def test_columns_equal_matmul(dtype, rows, summed, widths):
    x = normal(0, (rows, summed), dtype)
    weights = tuple(normal(1 + i, (summed, width), dtype) for i, width in enumerate(widths))
    found = jax.jit(cpu.columns)(x, weights)
    for y, w in zip(found, weights, strict=True):
        assert y.dtype == x.dtype
        close(y, np.matmul(*exact(x, w)), summed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(("length", "summed"), [(5000, 576), (1, 3), (1025, 37), (6, 64)])
def test_table_products_are_float32(dtype, rows, length, summed):
    x, w = normal(0, (rows, summed), dtype), normal(1, (length, summed), dtype)
    found = jax.jit(cpu.table)(x, w)
    assert found.dtype == jnp.float32
    x64, w64 = exact(x, w)
    close(found, x64 @ w64.T, summed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "window"), [(24, None), (24, 5), (600, None), (600, 300)])
@pytest.mark.parametrize(("heads", "keys", "width"), [(9, 3, 64), (4, 4, 32), (8, 1, 96)])
def test_attention_reads_and_updates_full_and_ring_buffer_caches(
    dtype, size, window, heads, keys, width
):
    which = 1
    positions = [0, 3, size - 1, size, 3 * size + 7, -1]
    rows = len(positions)
    q = normal(0, (rows, heads, width), dtype)
    new = [normal(i, (rows, keys, width), dtype) for i in (1, 2)]
    caches = [normal(i, (2, rows, keys, size, width), dtype) for i in (3, 4)]
    # What has not been written yet is not read.
    unwritten = np.arange(size) > np.array(positions)[:, None]
    for i, cache in enumerate(map(np.array, caches)):
        cache[:, unwritten.nonzero()[0], :, unwritten.nonzero()[1]] = np.nan
        caches[i] = jnp.asarray(cache)
    found, *written = jax.jit(cpu.attention, static_argnums=7)(
        q, *new, *caches, jnp.array(positions, jnp.int32), which, window
    )
    caches, new = exact(*caches), exact(*new)
    for cache, one in zip(caches, new, strict=True):
        for row, position in enumerate(positions[:-1]):
            cache[which, row, :, position % size] = one[row]
    for cache, store in zip(caches, exact(*written), strict=True):
        np.testing.assert_array_equal(cache, store)  # in its slot, and nowhere else
    (q64,), k64, v64 = exact(q), *(cache[which] for cache in caches)
    wanted = np.zeros((rows, heads, width))
    for row, position in enumerate(positions):
        first = max(0, position - size + 1, position - (window or size) + 1)
        seen = [p % size for p in range(first, position + 1)]
        for head in range(heads if seen else 0):
            group = head // (heads // keys)
            scores = k64[row, group, seen] @ q64[row, head] / width**0.5
            weights = np.exp(scores - scores.max())
            wanted[row, head] = weights / weights.sum() @ v64[row, group, seen]
    close(found, wanted, size)


def test_softmax_is_exact_for_scores_far_apart():
    """Scores far apart: the weights are those of float64 to a few units of float32's last place."""
    width = size = 64
    scores = np.linspace(0, -86, size).astype(np.float32)
    q = jnp.zeros((1, 1, width)).at[0, 0, 0].set(width**0.5)
    k = jnp.zeros((1, 1, 1, size, width)).at[..., 0].set(scores)
    v = jnp.eye(size)[None, None, None]
    last = (cache[0, :, :, -1] for cache in (k, v))
    found, *_ = cpu.attention(q, *last, k, v, jnp.array([size - 1], jnp.int32), 0, None)
    weights = np.exp(scores.astype(np.float64))
    np.testing.assert_allclose(found[0, 0], weights / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_columns(dtype):
    x, w = normal(0, (2, 64), dtype), normal(1, (64, 96), dtype)
    w = w.at[5, 40].set(jnp.nan).at[6, 50].set(jnp.inf)
    (found,) = exact(cpu.columns(x, (w,))[0])
    assert np.isnan(found[:, 40]).all()
    assert np.isinf(found[:, 50]).all()
    assert np.isfinite(np.delete(found, [40, 50], 1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "valid"), [(64, 64), (50, 50), (50, 41), (5, 3), (1000, 990)])
def test_cross_entropy_and_its_gradient_equal_the_formula(dtype, vocab, valid):
    logits = 4 * normal(0, (6, vocab), "float32")
    targets = np.array([0, valid - 1, 1, vocab, -1, 2], np.int32)  # two that are not predicted
    weights = np.array([1.0, 0.5, 0.0, 1.0, 1.0, 2.0], np.float32)
    call = jax.jit(lambda *a: cpu.cross_entropy(*a, jnp.dtype(dtype), valid=valid, z_loss=1e-2))
    found, lse, picked = call(logits, targets, weights)
    (exact_logits,) = exact(logits)
    wanted_lse = np.log(np.exp(exact_logits[:, :valid]).sum(1))
    wanted = np.exp(exact_logits - wanted_lse[:, None])
    wanted *= (weights * (1 + 2e-2 * wanted_lse))[:, None]
    wanted[:, valid:] = 0
    known = [0, 1, 2, 5]
    wanted[known, targets[known]] -= weights[known]
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)
    np.testing.assert_array_equal(picked, np.where(np.isin(range(6), known), picked, 0))
    np.testing.assert_array_equal(picked[jnp.array(known)], logits[known, targets[known]])
    assert found.dtype == dtype
    close(found, wanted, vocab)


def test_a_token_with_nan_among_its_logits_has_no_other_loss():
    logits = normal(0, (3, 40), "float32").at[1, 7].set(jnp.nan)
    arrays = (logits, jnp.zeros(3, jnp.int32), jnp.ones(3))
    found, lse, _ = cpu.cross_entropy(*arrays, jnp.dtype("float32"), valid=40, z_loss=0.0)
    assert np.isnan(lse[1])
    assert np.isnan(found[1]).all()
    assert np.isfinite(lse[jnp.array([0, 2])]).all()
    assert np.isfinite(found[jnp.array([0, 2])]).all()


def test_concurrent_calls_have_the_bits_of_one():
    """Calls from several devices and threads share the helper threads."""
    x, w = normal(0, (1, 576), "bfloat16"), normal(1, (576, 1536), "bfloat16")
    run = jax.jit(lambda x, w: cpu.columns(x, (w,))[0])
    wanted = np.asarray(run(x, w))
    devices = jax.devices()
    placed = [jax.device_put((x, w), device) for device in devices]

    def repeat(i: int) -> bool:
        return all(
            np.array_equal(np.asarray(run(*placed[i % len(devices)])), wanted) for _ in range(50)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(repeat, range(16)))


@pytest.mark.slow
def test_results_are_independent_of_the_number_of_threads(tmp_path):
    """The order of summation depends on shapes alone."""
    code = (
        "import sys, jax, numpy as np\n"
        "from gptjax.kernels import cpu\n"
        "assert cpu.ready(), cpu.why_not()\n"
        "x = jax.random.normal(jax.random.key(0), (3, 576))\n"
        "w = jax.random.normal(jax.random.key(1), (576, 960))\n"
        "np.save(sys.argv[1], cpu.columns(x, (w,))[0])\n"
    )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        pytest.skip("needs two cores, and a system that can leave one out")
    results = []
    for some in (cores, cores[:1]):
        target = tmp_path / f"{len(some)}.npy"
        env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        limit = f"import os; os.sched_setaffinity(0, {some})\n"
        subprocess.run([sys.executable, "-c", limit + code, target], check=True, env=env)
        results.append(np.load(target))
    assert np.array_equal(*results)


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"GPTJAX_NATIVE": "0"}, "GPTJAX_NATIVE=0"),
        ({"PATH": "", "CC": "no-such-compiler"}, "no C compiler was found"),
        ({"CC": "false"}, "could not compile"),
        ({"HOME": "/proc/nowhere", "XDG_CACHE_HOME": ""}, "could not be stored, loaded or reg"),
    ],
)
@pytest.mark.slow
def test_reason_of_the_fallback_is_given(tmp_path, env, why):
    code = "from gptjax.kernels import cpu; print(cpu.ready(), cpu.why_not())"
    whole = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)} | env
    done = subprocess.run(
        [sys.executable, "-c", code], env=whole, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("False")
    assert why in done.stdout


def in_a_process(folder, code="print(cpu.why_not())", **more):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder)} | more
    command = [sys.executable, "-c", f"from gptjax.kernels import cpu; {code}"]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_broken_library_is_compiled_again(tmp_path):
    compiler = tmp_path / "quick_cc"  # which optimises nothing, and takes a fifth of the time
    compiler.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    compiler.chmod(0o755)
    assert in_a_process(tmp_path, CC=str(compiler)) == "None\n"
    hash_file, file = sorted((tmp_path / "gptjax/native").iterdir())
    assert (hash_file.suffix, file.suffix) == (".sha256", ".so")
    whole = file.read_bytes()

    def flipped() -> bytes:
        return whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]

    def foreign() -> None:
        os.chown(file, 12345, -1)

    def writable() -> None:
        file.chmod(0o777)

    damages = [  # a library cut short ends a process that calls it with SIGBUS
        lambda: file.write_bytes(whole[: len(whole) * 3 // 4]),
        lambda: file.write_bytes(flipped()),
        lambda: hash_file.unlink(),
        writable,
        *([foreign] if os.geteuid() == 0 else []),
    ]
    for damage in damages:
        damage()
        before = file.stat().st_ino
        assert in_a_process(tmp_path, CC=str(compiler)) == "None\n"
        assert file.stat().st_ino != before
        assert len(file.read_bytes()) == len(whole)
        assert hashlib.sha256(file.read_bytes()).hexdigest() == hash_file.read_text()
        assert sorted(file.parent.iterdir()) == [hash_file, file]
    before = file.stat().st_ino
    assert in_a_process(tmp_path, CC=str(compiler)) == "None\n"
    assert file.stat().st_ino == before


@pytest.mark.slow
def test_library_is_not_loaded_from_a_folder_writable_by_others(tmp_path):
    folder = tmp_path / "gptjax/native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "must belong to this user and be writable by no one else" in in_a_process(tmp_path)
    assert not list(folder.iterdir())


def test_missing_home_directory_is_a_reason(tmp_path, monkeypatch):
    def fail(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(cpu.Path, "expanduser", fail)
    assert "Could not determine home" in cpu.why_not.__wrapped__()


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: cpu.columns(jnp.ones((1, 4)), (jnp.ones((5, 4)),)), r"\(1, 4\) times"),
        (lambda: cpu.table(jnp.ones((1, 4)), jnp.ones((4, 5))), r"\(1, 4\) times"),
        (lambda: attend(jnp.ones((1, 3, 32)), 2, 4, 32), "caches"),
        (lambda: attend(jnp.ones((1, 2, 32)), 2, 0, 32), "caches"),
        (lambda: attend(jnp.ones((1, 2, 32)), 2, 4, 32, window=0), "window=0"),
        (lambda: attend(jnp.ones((1, 2, 16)), 2, 4, 16), "heads of 16; must be a multiple of 32"),
        (lambda: cpu.columns(jnp.ones((9, 4)), (jnp.ones((4, 4)),)), "9 tokens; at most 8"),
        (
            lambda: cpu.columns(jnp.ones((1, 4)), (jnp.ones((4, 4)),) * 5),
            "5 weight matrices; at most 4",
        ),
        (lambda: cpu.table(jnp.ones((1, 4), "float16"), jnp.ones((4, 4))), "dtypes"),
        (lambda: lose(jnp.ones((2, 4)), tokens=3), r"\(\(2, 4\), \(3,\), \(3,\)\)"),
        (lambda: lose(jnp.ones((2, 4)), valid=5), "valid=5"),
        (lambda: lose(jnp.ones((2, 4)), valid=0), "valid=0"),
        (lambda: lose(jnp.ones((2, 4), "bfloat16")), "dtypes bfloat16 and float32"),
        (lambda: lose(jnp.ones((2, 4)), dtype="float16"), "dtypes float32 and float16"),
    ],
)
def test_invalid_arguments_are_refused(call, problem):
    with pytest.raises(ValueError, match=problem):
        call()


FLASH = """
import jax, jax.numpy as jnp, numpy as np
assert cpu.ready(), cpu.why_not()
shapes = ((2, 77, 4, 32), (2, 77, 2, 32), (2, 77, 2, 32), (2, 77, 4, 32))
keys = jax.random.split(jax.random.key(0), 4)
q, k, v, dy = (jax.random.normal(a, s, jnp.bfloat16) for a, s in zip(keys, shapes))
inputs = (q, k, v, jnp.arange(154).reshape(2, 77) // 50)
results = cpu.flash(*inputs, 40, 0.2)
found = (*results, *cpu.flash_gradients(inputs, results, dy, 40, 0.2))
np.savez(target, *(np.float32(x) for x in found))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of another processor")
@pytest.mark.parametrize("flag", ["-mno-avx512bf16", "-mno-avx512f"])
def test_attention_in_bfloat16_is_the_same_on_processors_with_less(tmp_path, flag):
    """Pairs of bfloat16 are multiplied where the processor can: as near as their rounding."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {cpu.compiler()} "$@" {flag}\n')
    compiler.chmod(0o755)
    here, less = tmp_path / "here.npz", tmp_path / "less.npz"
    exec(FLASH, {"cpu": cpu, "target": here})
    in_a_process(tmp_path / "cache", f"target = {str(less)!r}\n{FLASH}", CC=str(compiler))
    with np.load(here) as one, np.load(less) as other:
        found = [[arrays[name] for name in one.files] for arrays in (one, other)]
    for one, other in zip(*found, strict=True):
        size = np.sqrt(np.mean(np.square(other)))
        assert np.sqrt(np.mean(np.square(one - other))) < 2**-8 * size
