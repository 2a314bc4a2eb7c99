"""Leaf layers: pure functions on arrays, and the modules that own their parameters.

Activations are two-dimensional, a row a token: the gradient of a weight is then one matrix product,
where with [batch, sequence, embed] XLA:CPU first copies a transposed operand (a sixth of a step).
LayerNorm and GELU carry their own backward passes, which keep what is small and recompute the rest.

Shapes: N tokens (batch x sequence), B batch, T sequence, D embed, F out features, V vocabulary,
H heads, C head_dim.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from gptjax.config import ModelConfig, RopeConfig
from gptjax.model import init
from gptjax.parallel import sharding

NEVER = -1e30  # a score that is masked out: finite, so that a fully masked row stays a number


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float
) -> jax.Array:
    """Layer normalisation (Ba et al. 2016), computed in float32, in the dtype of `x_ND`."""
    return _layer_norm_fwd(x_ND, scale_D, bias_D, eps)[0]


def _layer_norm_fwd(x_ND, scale_D, bias_D, eps):
    x32_ND = x_ND.astype(jnp.float32)
    mean_N1 = x32_ND.mean(-1, keepdims=True)
    rstd_N1 = lax.rsqrt(jnp.square(x32_ND - mean_N1).mean(-1, keepdims=True) + eps)
    y_ND = (x32_ND - mean_N1) * rstd_N1 * scale_D
    if bias_D is not None:
        y_ND += bias_D
    return y_ND.astype(x_ND.dtype), (x_ND, mean_N1, rstd_N1, scale_D, bias_D)


def _layer_norm_bwd(eps, residuals, dy_ND):
    x_ND, mean_N1, rstd_N1, scale_D, bias_D = residuals
    dy_ND = dy_ND.astype(jnp.float32)
    unit_ND = (x_ND.astype(jnp.float32) - mean_N1) * rstd_N1
    g_ND = dy_ND * scale_D
    dx_ND = rstd_N1 * (
        g_ND - g_ND.mean(-1, keepdims=True) - unit_ND * (g_ND * unit_ND).mean(-1, keepdims=True)
    )
    dscale_D = (dy_ND * unit_ND).sum(0)
    return dx_ND.astype(x_ND.dtype), dscale_D, None if bias_D is None else dy_ND.sum(0)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def rms_norm(x_ND: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation (Zhang & Sennrich 2019), float32 inside."""
    x32_ND = x_ND.astype(jnp.float32)
    rrms_N1 = lax.rsqrt(jnp.square(x32_ND).mean(-1, keepdims=True) + eps)
    return (x32_ND * rrms_N1).astype(x_ND.dtype) * scale_D.astype(x_ND.dtype)


_GELU_A, _GELU_B = 0.7978845608028654, 0.044715  # sqrt(2/pi), and the cubic's coefficient


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016), as GPT-2 has it."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_tanh_bwd(x, dy):
    x32 = x.astype(jnp.float32)
    t = jnp.tanh(_GELU_A * (x32 + _GELU_B * x32**3))
    slope = 0.5 * (1 + t) + 0.5 * x32 * (1 - t * t) * _GELU_A * (1 + 3 * _GELU_B * x32 * x32)
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_tanh_bwd)


def add_bias(y_NF: jax.Array, bias_F: jax.Array | None) -> jax.Array:
    """y + bias in the dtype of `y_NF`."""
    return y_NF if bias_F is None else y_NF + bias_F.astype(y_NF.dtype)


def rope_frequencies(cfg: RopeConfig, width: int) -> tuple[np.ndarray, float]:
    """Radians a position of each pair of `width` rotated dimensions, float32 [width/2], and the
    factor on sine and cosine.

    In float32 step by step, as the public models were trained: at position 10**5 the last bit of a
    frequency is a hundredth of a radian. The power alone is rounded from float64, which is what
    PyTorch's float32 power gives; numpy's is off by a bit in every sixth.
    """
    f32 = np.float32
    exponent = np.arange(0, width, 2, dtype=f32) / f32(width)
    base = f32(1) / np.power(cfg.theta, exponent, dtype=np.float64).astype(f32)
    if cfg.scaling == "linear":
        return base / f32(cfg.factor), 1.0
    if cfg.scaling == "low_frequency":
        turns = f32(cfg.original_context) / (f32(2 * math.pi) / base)
        low, high = f32(cfg.low_freq_factor), f32(cfg.high_freq_factor)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return ((1 - keep) * base / f32(cfg.factor) + keep * base).astype(f32), 1.0
    if cfg.scaling == "yarn":

        def dimension(turns: float) -> float:
            """The pair that makes so many turns within the original context."""
            wavelengths = cfg.original_context / (turns * 2 * math.pi)
            return width * math.log(wavelengths) / (2 * math.log(cfg.theta))

        low = max(math.floor(dimension(cfg.beta_fast)), 0)
        high = min(math.ceil(dimension(cfg.beta_slow)), width - 1)
        ramp = (np.arange(width // 2, dtype=f32) - f32(low)) / f32(max(high - low, 1e-3))
        keep = 1 - np.clip(ramp, 0, 1)
        frequencies = base / f32(cfg.factor) * (1 - keep) + base * keep
        factor = cfg.attention_factor
        return frequencies.astype(f32), 0.1 * math.log(cfg.factor) + 1 if factor is None else factor
    return base, 1.0


def rope(x_BTHC: jax.Array, positions_BT: jax.Array, cfg: RopeConfig) -> jax.Array:
    """Rotary positions (Su et al. 2021) of the first `cfg.fraction` of a head, half-split layout.

    Angles are float32.
    """
    width = int(x_BTHC.shape[-1] * cfg.fraction)
    frequencies, factor = rope_frequencies(cfg, width)
    angle_BT1C = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle_BT1C) * factor, jnp.sin(angle_BT1C) * factor
    a, b = jnp.split(x_BTHC[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHC.dtype)
    if width == x_BTHC.shape[-1]:
        return turned
    return jnp.concatenate([turned, x_BTHC[..., width:]], -1)


def alibi_slopes(heads: int) -> jax.Array:
    """Slope of each head (Press et al. 2021): powers of 2**(-8/n), for n the power of two below."""
    n = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    slopes += [2 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)]
    return jnp.array(slopes, jnp.float32)


def alibi_bias(
    cfg: ModelConfig, slopes_H: jax.Array, query_BT: jax.Array, key_BS: jax.Array
) -> jax.Array:
    """What ALiBi adds to the scores of queries and keys at these positions, [B, H, T or 1, S].

    `slopes_H` are those of the heads at hand.
    """
    slopes_H11 = slopes_H[:, None, None]
    if cfg.alibi == "exact":
        distance_BTS = key_BS[:, None, :] - query_BT[:, :, None]
        return slopes_H11 * distance_BTS[:, None].astype(jnp.float32)
    # The softmax takes a shift of a whole row for none; the rounding goes by the place itself.
    rounded = slopes_H11.astype(jnp.bfloat16) * key_BS[:, None, None, :].astype(jnp.float32).astype(
        jnp.bfloat16
    )
    return rounded.astype(jnp.float32) * cfg.head**-0.5


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Smoothly bounded to +-cap; 0 is no bound."""
    return cap * jnp.tanh(x / cap) if cap else x


def place_keys(keys_B2: jax.Array, length: int) -> jax.Array:
    """A dropout key for each place of sequences that have keys; both as key data, [B, T, 2].

    What is dropped so depends on the sequence's key, the place and the feature alone: not on how a
    batch is split over devices, parts, or stages.
    """

    def local(keys_b2):
        keys_b = jax.random.wrap_key_data(keys_b2)
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        return jax.random.key_data(fold(keys_b, jnp.arange(length)))

    rows = sharding.spec("batch", None)
    out = sharding.spec("batch", None, None)
    keys_B2 = jax.sharding.reshard(keys_B2, rows)
    return jax.shard_map(local, in_specs=rows, out_specs=out, check_vma=False)(keys_B2)


def dropped(x: jax.Array, rate: float, keys: jax.Array, site: jax.Array | int) -> jax.Array:
    """On one device's share: zeroes a share of `x` and scales up the rest.

    `keys` [..., 2] has key data for each row of the last axis of `x`; `site` numbers the layer, and
    the place in it where this is done.
    """

    def row(key_2: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_2), site)
        return jax.random.bits(key, x.shape[-1:], jnp.uint32)

    bits = jax.vmap(row)(keys.reshape(-1, 2)).reshape(x.shape)
    keep = bits >= jnp.uint32(rate * 2**32)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def dropout(
    x_ND: jax.Array, rate: float, keys_N2: jax.Array | None, site: jax.Array | int
) -> jax.Array:
    """Dropout of rows that have a key each (see `place_keys`); without keys, the identity."""
    if keys_N2 is None or rate == 0:
        return x_ND
    rows = jax.typeof(x_ND).sharding.spec
    keys_N2 = jax.sharding.reshard(keys_N2, rows)
    return jax.shard_map(
        lambda x_nD, keys_n2, site: dropped(x_nD, rate, keys_n2, site),
        in_specs=(rows, rows, jax.P()),
        out_specs=rows,
        check_vma=False,
    )(x_ND, keys_N2, jnp.uint32(site))


def weight(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str | None], std: float
) -> jax.Array:
    """A float32 parameter drawn from N(0, std**2), laid out by its logical axes."""
    return module.param(name, init.normal(std), tuple(shape), tuple(axes))


def vector(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str | None], value: float
) -> jax.Array:
    """A float32 parameter that starts at one value, laid out by its logical axes."""
    return module.param(name, init.constant(value), tuple(shape), tuple(axes))


class Norm(nn.Module):
    """The normalisation that the configuration asks for. Parameters `scale`, and perhaps `bias`."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        cfg = self.cfg
        scale_D = vector(self, "scale", (cfg.embed,), (None,), 1.0)
        if cfg.norm == "rmsnorm":
            return rms_norm(x_ND, scale_D, cfg.norm_eps)
        bias_D = vector(self, "bias", (cfg.embed,), (None,), 0.0) if cfg.norm_bias else None
        return layer_norm(x_ND, scale_D, bias_D, cfg.norm_eps)
