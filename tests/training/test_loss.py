"""Chunked, vocabulary-sharded cross-entropy against log_softmax under jax.grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.parallel import sharding
from gptjax.training.loss import cross_entropy

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS, EMBED, VOCAB = 56, 8, 96


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, EMBED)).astype(np.float32)
    w = rng.normal(size=(VOCAB, EMBED)).astype(np.float32)
    targets = rng.integers(0, VOCAB, TOKENS).astype(np.int32)
    weights = rng.choice([0.0, 1.0, 0.5], TOKENS).astype(np.float32)
    return x, w, targets, weights


def plain(x, w, targets, weights, z_loss):
    logits = x @ w.T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]
    z = z_loss * (weights * jax.nn.logsumexp(logits, -1) ** 2).sum()
    return -(weights * picked).sum(), z


def sharded(x, w, targets, weights):
    """The inputs on the ambient mesh."""
    tokens = sharding.spec("tokens")
    specs = (sharding.spec("tokens", "embed"), sharding.spec("vocab", "w_embed"), tokens, tokens)
    mesh = jax.sharding.get_mesh()
    return [
        jax.device_put(a, jax.NamedSharding(mesh, s))
        for a, s in zip((x, w, targets, weights), specs, strict=True)
    ]


def scaled_sum(function):
    """0.5 * (ce + z) with both as aux: a cotangent other than one, as the mean over targets is."""

    def total(*args):
        ce, z = function(*args)
        return 0.5 * (ce + z), (ce, z)

    return jax.value_and_grad(total, (0, 1), has_aux=True)


# The kernel for CPUs takes whole vocabularies; a tensor axis splits them.
@pytest.mark.parametrize(
    "mesh",
    [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 1), (2, 2, 2)],
    ids=["1", "2x2x1", "2x2x2"],
)
@pytest.mark.parametrize(
    ("z_loss", "chunks"),
    [
        (1e-2, 1),
        (1e-2, 5),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((0.0, 1), (1e-2, 2), (1e-2, 7))),
    ],
)
def test_loss_and_gradients_equal_those_of_log_softmax(on_mesh, inputs, mesh, z_loss, chunks):
    (_, want_parts), want = scaled_sum(lambda *a: plain(*a, z_loss))(*map(jnp.asarray, inputs))
    with on_mesh(*mesh):
        args = sharded(*inputs)
        assert (len({str(s.index) for s in args[1].addressable_shards}) > 1) == (np.prod(mesh) > 1)
        lowered = jax.jit(scaled_sum(lambda *a: cross_entropy(*a, z_loss, chunks))).lower(*args)
        (_, parts), got = lowered.compile()(*args)
        primal = jax.jit(lambda *a: cross_entropy(*a, z_loss, chunks))(*args)
    assert ("stablehlo.while" in lowered.as_text()) == (chunks > 1)
    np.testing.assert_allclose(parts, want_parts, rtol=1e-5)
    np.testing.assert_allclose(primal, want_parts, rtol=1e-5)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-5)


def test_number_of_chunks_is_reduced_to_a_divisor_of_the_tokens(on_mesh, inputs):
    with on_mesh(1, 1, 1):
        args = sharded(*inputs)
        text = {
            chunks: jax.jit(lambda *a, c=chunks: cross_entropy(*a, 0.0, c)).lower(*args).as_text()
            for chunks in (4, 6, 1000)
        }
    assert text[6] == text[4]  # 56 tokens
    assert f"tensor<{TOKENS}x1x{EMBED}xf32>" in text[1000]


def test_chunked_loss_never_has_the_logits_of_all_tokens(on_mesh, inputs):
    with on_mesh(1, 1, 1):
        args = sharded(*inputs)

        def shapes(chunks):
            function = scaled_sum(lambda *a: cross_entropy(*a, 0.0, chunks))
            return jax.jit(function).lower(*args).compile().as_text()

        assert f"[{TOKENS},{VOCAB}]" in shapes(1)
        chunked = shapes(8)
    assert f"[{TOKENS},{VOCAB}]" not in chunked
    assert f"[8,{TOKENS // 8},{VOCAB}]" not in chunked


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_what_only_fills_the_table_up_is_not_predicted(on_mesh, inputs, tensor, cap):
    x, w, targets, weights = inputs
    targets = targets % (VOCAB - 3)
    with on_mesh(1, 2, tensor):
        args = sharded(x, w, targets, weights)
        step = scaled_sum(lambda *a: cross_entropy(*a, 1e-2, 2, VOCAB - 3, cap))
        (_, parts), (dx, dw) = jax.jit(step)(*args)

    def plain_capped(x, w):
        logits = x @ w[: VOCAB - 3].T
        logits = cap * jnp.tanh(logits / cap) if cap else logits
        return plain(logits, jnp.eye(VOCAB - 3), targets, weights, 1e-2)

    (_, want_parts), want = scaled_sum(plain_capped)(jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_allclose(parts, want_parts, rtol=1e-5)
    for g, w in zip((dx, dw), want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-5)


def test_tokens_of_weight_zero_contribute_nothing(on_mesh, inputs):
    x, w, targets, weights = inputs
    other = x.copy()
    other[weights == 0] = 50.0
    with on_mesh(1, 1, 1):
        step = jax.jit(scaled_sum(lambda *a: cross_entropy(*a, 1e-2, 1)))
        runs = [jax.device_get(step(*sharded(a, w, targets, weights))) for a in (x, other)]
    ((value, _), (dx, dw)), ((other_value, _), (other_dx, other_dw)) = runs
    assert value == pytest.approx(other_value, rel=1e-6)
    np.testing.assert_allclose(dw, other_dw, atol=1e-6)
    assert not np.any(dx[weights == 0])
    assert not np.any(other_dx[weights == 0])


def test_large_logits_give_a_finite_loss(on_mesh):
    x, w = np.full((8, 2), 100.0, np.float32), np.eye(8, 2, dtype=np.float32) * 100
    targets, weights = np.full(8, 7, np.int32), np.ones(8, np.float32)
    with on_mesh(1, 1, 1):
        step = jax.jit(scaled_sum(lambda *a: cross_entropy(*a, 0.0, 1)))
        (_, (ce, _)), (dx, dw) = step(*sharded(x, w, targets, weights))
    assert float(ce) == pytest.approx(8 * (1e4 + np.log(2)), rel=1e-6)
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("chunks", [1, 2, TOKENS])  # the last: one token in each
def test_gradients_of_bfloat16_activations_are_bfloat16_and_of_weights_float32(
    on_mesh, inputs, tensor, chunks
):
    x, w, targets, weights = inputs
    _, want = scaled_sum(lambda *a: plain(*a, 0.0))(*map(jnp.asarray, inputs))
    with on_mesh(2, 2, tensor):
        args = sharded(x.astype(jnp.bfloat16), w, targets, weights)
        _, (dx, dw) = jax.jit(scaled_sum(lambda *a: cross_entropy(*a, 0.0, chunks)))(*args)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dx.astype(jnp.float32), want[0], atol=0.1, rtol=0.1)
    np.testing.assert_allclose(dw, want[1], atol=0.1, rtol=0.1)
