"""Leaf layers against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from gptjax.config import RopeConfig
from gptjax.model import feed_forward, layers
from gptjax.parallel import sharding

pytestmark = pytest.mark.usefixtures("quick_compile")


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain_layer_norm(x, scale, bias, eps):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    y = (x - mean) / jnp.sqrt(variance + eps) * scale
    return y if bias is None else y + bias


def plain_gelu_tanh(x):
    return 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm_and_its_gradients_equal_the_formula(with_bias):
    x = 2 * normal(0, 6, 16) + 1
    scale, bias = normal(1, 16), normal(2, 16) if with_bias else None
    dy = normal(3, 6, 16)
    value, pull = jax.vjp(lambda *a: layers.layer_norm(*a, 1e-2), x, scale, bias)
    expected, plain_pull = jax.vjp(lambda *a: plain_layer_norm(*a, 1e-2), x, scale, bias)
    np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(pull(dy), plain_pull(dy), strict=True):
        if want is None:
            assert got is None
        else:
            np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_layer_norm_in_bfloat16_keeps_dtypes_and_computes_in_float32():
    x = 2 * normal(0, 6, 16, dtype=jnp.bfloat16) + 100  # 100 leaves bfloat16 no bits to average
    scale, bias, dy = normal(1, 16), normal(2, 16), normal(3, 6, 16, dtype=jnp.bfloat16)
    value, pull = jax.vjp(lambda *a: layers.layer_norm(*a, 1e-5), x, scale, bias)
    dx, dscale, dbias = pull(dy)
    assert [a.dtype for a in (value, dx, dscale, dbias)] == ["bfloat16"] * 2 + ["float32"] * 2
    expected, plain_pull = jax.vjp(
        lambda *a: plain_layer_norm(*a, 1e-5), x.astype(jnp.float32), scale, bias
    )
    gradients = zip((dx, dscale, dbias), plain_pull(dy.astype(jnp.float32)), strict=True)
    for got, want in [(value, expected), *gradients]:
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-2, atol=1e-4)


def test_rms_norm_equals_the_formula_and_keeps_dtype():
    x, scale = normal(0, 6, 16), normal(1, 16)
    expected = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale
    np.testing.assert_allclose(layers.rms_norm(x, scale, 1e-2), expected, atol=1e-6, rtol=1e-6)
    assert layers.rms_norm(x.astype(jnp.bfloat16), scale, 1e-2).dtype == jnp.bfloat16


ACTIVATIONS = {
    "gelu_tanh": plain_gelu_tanh,
    "gelu": lambda x: 0.5 * x * (1 + jax.scipy.special.erf(x / jnp.sqrt(2))),
    "silu": lambda x: x / (1 + jnp.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_gradient_equal_the_formula(name):
    x, dy = 3 * normal(0, 500), normal(1, 500)
    value, pull = jax.vjp(getattr(layers, name), x)
    expected, plain_pull = jax.vjp(ACTIVATIONS[name], x)
    np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(pull(dy)[0], plain_pull(dy)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_in_bfloat16_is_computed_in_float32_and_rounded_once(name):
    activation = getattr(layers, name)
    x = 3 * normal(0, 500, dtype=jnp.bfloat16)
    value, pull = jax.vjp(activation, x)
    (dx,) = pull(jnp.ones_like(value))
    assert value.dtype == dx.dtype == jnp.bfloat16
    exact, exact_pull = jax.vjp(activation, x.astype(jnp.float32))
    (exact_dx,) = exact_pull(jnp.ones(500))
    for got, want in ((value, exact), (dx, exact_dx)):
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_rope_does_not_rotate_position_zero():
    x = normal(0, 2, 3, 4, 8)
    assert jnp.array_equal(layers.rope(x, jnp.zeros((2, 3), jnp.int32), RopeConfig()), x)


def test_rope_rotates_pair_i_by_position_times_theta_to_the_minus_i_over_half():
    half, theta, position = 4, 100.0, 7
    x = jnp.eye(2 * half)[:half].reshape(half, 1, 1, 2 * half)  # row i: 1 in the pair's first half
    turned = layers.rope(x, jnp.full((half, 1), position), RopeConfig(theta=theta))
    turned = turned.reshape(half, 2 * half)
    for i in range(half):
        angle = position * theta ** (-i / half)
        expected = np.zeros(2 * half)
        expected[i], expected[i + half] = np.cos(angle), np.sin(angle)
        np.testing.assert_allclose(turned[i], expected, atol=1e-6)


def test_rope_scores_depend_only_on_the_distance():
    q, k = normal(0, 1, 5, 2, 8), normal(1, 1, 5, 2, 8)

    def scores(shift):
        at = jnp.arange(5)[None] + shift
        turned = (layers.rope(x, at, RopeConfig()) for x in (q, k))
        return jnp.einsum("bthc,bshc->bhts", *turned)

    np.testing.assert_allclose(scores(0), scores(91), atol=1e-4)
    assert not np.allclose(scores(0), jnp.einsum("bthc,bshc->bhts", q, k), atol=1e-2)


def keys_of(rows, seed=0):
    """A key for each of so many tokens."""
    return jax.random.key_data(jax.random.split(jax.random.key(seed), rows))


def test_dropout_without_keys_or_a_rate_is_the_identity():
    x = normal(0, 8, 8)
    assert layers.dropout(x, 0.5, None, 0) is x
    assert layers.dropout(x, 0.0, keys_of(8), 0) is x


def test_dropout_zeroes_its_rate_and_preserves_the_mean(on_mesh):
    with on_mesh(1, 1, 1):
        x = jnp.ones((400, 100), out_sharding=sharding.spec("tokens", "embed"))
        y, other_key, other_id = (
            layers.dropout(x, 0.3, keys_of(400, seed), dropout_id)
            for seed, dropout_id in ((0, 0), (1, 0), (0, 1))
        )
    assert set(np.unique(y).tolist()) == {0.0, float(np.float32(1 / 0.7))}
    assert abs(float((y == 0).mean()) - 0.3) < 0.01  # 4 standard deviations
    assert abs(float(y.mean()) - 1) < 0.015
    assert not jnp.array_equal(y, other_key)
    assert not jnp.array_equal(y, other_id)
    assert len(np.unique(np.asarray(y), axis=0)) == 400  # no two rows alike


def test_dropout_keeps_bfloat16(on_mesh):
    with on_mesh(1, 1, 1):
        x = jnp.ones((8, 8), jnp.bfloat16, out_sharding=sharding.spec("tokens", "embed"))
        assert layers.dropout(x, 0.5, keys_of(8), 0).dtype == jnp.bfloat16


def test_dropout_keys_of_positions_are_the_same_on_every_mesh(on_mesh):
    def keys(*mesh):
        with on_mesh(*mesh):
            keys_B2 = jax.device_put(keys_of(8), sharding.spec("batch", None))
            return jax.device_get(jax.jit(layers.position_keys, static_argnums=1)(keys_B2, 16))

    whole = keys()
    assert len(np.unique(whole.reshape(-1, 2), axis=0)) == 8 * 16
    np.testing.assert_array_equal(keys(2, 2, 1, 1, 1, 2), whole)


@pytest.mark.parametrize(
    ("activation", "names", "formula"),
    [
        ("gelu_tanh", ("up",), lambda up: jax.nn.gelu(up, approximate=True)),
        ("gelu", ("up",), lambda up: up * (1 + erf(up / np.sqrt(2))) / 2),
        ("swiglu", ("gate", "up"), lambda gate, up: gate / (1 + np.exp(-gate)) * up),
    ],
)
def test_every_activation_equals_its_formula(activation, names, formula):
    assert feed_forward.input_projections(activation) == names
    projected = [normal(seed, 4, 8) for seed in range(len(names))]
    got = feed_forward.activate(activation, projected)
    np.testing.assert_allclose(got, formula(*projected), rtol=1e-5, atol=1e-6)
