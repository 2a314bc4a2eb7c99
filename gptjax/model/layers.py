"""Leaf layers: pure functions on arrays, and the modules that own their parameters.

Activations are two-dimensional, [tokens, embed]: the gradient of a weight is then one matrix
product, where with [batch, sequence, embed] XLA:CPU first copies a transposed operand (a sixth of a
step). LayerNorm and GELU have their own backward passes, which keep small residuals and recompute
the rest.

Shapes: N tokens (batch x sequence), B batch, T sequence, D embed, F out features, V vocabulary,
H heads, C head_dim.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from gptjax.config import ModelConfig, RopeConfig
from gptjax.model import init
from gptjax.parallel import sequence, sharding

NEVER = -1e30  # a masked score: finite, so that the softmax of a fully masked row is not NaN


class Tokens(NamedTuple):
    """Positions, segments and dropout keys of the tokens that pass the blocks.

    Tokens are in zigzag order (parallel/sequence.py) except with a cache. Segments number the
    documents of a packed sequence; each token attends within its own. Keys are key data and turn
    dropout on.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None = None
    keys_BT2: jax.Array | None = None

    def keys_N2(self) -> jax.Array | None:
        """The dropout keys of flat tokens."""
        if self.keys_BT2 is None:
            return None
        return sequence.flatten_zigzag(self.keys_BT2, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float
) -> jax.Array:
    """Layer normalisation (Ba et al. 2016), computed in float32, in the dtype of `x_ND`."""
    return _layer_norm_fwd(x_ND, scale_D, bias_D, eps)[0]


def _layer_norm_fwd(
    x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float
) -> tuple[jax.Array, Any]:
    x32_ND = x_ND.astype(jnp.float32)
    mean_N1 = x32_ND.mean(-1, keepdims=True)
    rstd_N1 = lax.rsqrt(jnp.square(x32_ND - mean_N1).mean(-1, keepdims=True) + eps)
    y_ND = (x32_ND - mean_N1) * rstd_N1 * scale_D
    if bias_D is not None:
        y_ND += bias_D
    return y_ND.astype(x_ND.dtype), (x_ND, mean_N1, rstd_N1, scale_D, bias_D)


def _layer_norm_bwd(
    eps: float, residuals: Any, dy_ND: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
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


def normalize(
    cfg: ModelConfig, x_ND: jax.Array, scale: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """The configured normalisation, with the parameters of a `Norm`."""
    if cfg.norm == "rmsnorm":
        return rms_norm(x_ND, scale, cfg.norm_eps)
    return layer_norm(x_ND, scale, bias, cfg.norm_eps)


_GELU_A, _GELU_B = 0.7978845608028654, 0.044715  # sqrt(2/pi), and the cubic's coefficient


def _in_float32(
    function: Callable[[jax.Array], jax.Array], slope: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    """An activation computed in float32 and rounded once, which keeps its input for its gradient.

    As PyTorch does. In bfloat16, each of its operations would be rounded.
    """

    @jax.custom_vjp
    def activation(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    def backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        return ((dy.astype(jnp.float32) * slope(x.astype(jnp.float32))).astype(x.dtype),)

    activation.defvjp(lambda x: (activation(x), x), backward)
    return activation


def _gelu_tanh_slope(x: jax.Array) -> jax.Array:
    t = jnp.tanh(_GELU_A * (x + _GELU_B * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _GELU_A * (1 + 3 * _GELU_B * x * x)


def _gelu_slope(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + lax.erf(x * 0.5**0.5)) + x * jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5


def _silu_slope(x: jax.Array) -> jax.Array:
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


gelu_tanh = _in_float32(jax.nn.gelu, _gelu_tanh_slope)
"""The tanh approximation of GELU (Hendrycks & Gimpel 2016), as GPT-2 has it."""
gelu = _in_float32(functools.partial(jax.nn.gelu, approximate=False), _gelu_slope)
"""GELU (Hendrycks & Gimpel 2016): x times the normal distribution's cumulative function."""
silu = _in_float32(jax.nn.silu, _silu_slope)
"""x times its sigmoid (Elfwing et al. 2018)."""


def add_bias(y_NF: jax.Array, bias_F: jax.Array | None) -> jax.Array:
    """y + bias in the dtype of `y_NF`."""
    return y_NF if bias_F is None else y_NF + bias_F.astype(y_NF.dtype)


def rope_frequencies(cfg: RopeConfig, width: int) -> tuple[np.ndarray, float]:
    """The frequency of each pair of `width` rotated dimensions in radians per position, float32
    [width/2], and the factor on sine and cosine.

    Every step is float32, as the public models were trained: at position 10**5 the last bit of a
    frequency is a hundredth of a radian. Only the power is rounded from float64, which is what
    PyTorch's float32 power gives; NumPy's is off by a bit in every sixth.
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
        factor = cfg.attention_factor
        scale = 0.1 * math.log(cfg.factor) + 1 if factor is None else factor
        return _yarn_frequencies(cfg, base), scale
    return base, 1.0


def _yarn_frequencies(cfg: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Frequencies of YaRN (Peng et al. 2023): slow pairs interpolated, fast ones kept."""
    f32 = np.float32
    width = 2 * len(base)

    def pair_of_turns(turns: float) -> float:
        """The index of the pair that makes so many turns within the original context."""
        wavelengths = cfg.original_context / (turns * 2 * math.pi)
        return width * math.log(wavelengths) / (2 * math.log(cfg.theta))

    low = max(math.floor(pair_of_turns(cfg.beta_fast)), 0)
    high = min(math.ceil(pair_of_turns(cfg.beta_slow)), width - 1)
    ramp = (np.arange(width // 2, dtype=f32) - f32(low)) / f32(max(high - low, 1e-3))
    keep = 1 - np.clip(ramp, 0, 1)
    return (base / f32(cfg.factor) * (1 - keep) + base * keep).astype(f32)


def rope(x_BTHC: jax.Array, positions_BT: jax.Array, cfg: RopeConfig) -> jax.Array:
    """Rotary positions (Su et al. 2021) of the first `cfg.fraction` of a head, half-split layout.

    Angles are float32.
    """
    width = int(x_BTHC.shape[-1] * cfg.fraction)
    frequencies, factor = rope_frequencies(cfg, width)
    angle_BT1C = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle_BT1C) * factor, jnp.sin(angle_BT1C) * factor
    a, b = jnp.split(x_BTHC[..., :width].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHC.dtype)
    if width == x_BTHC.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x_BTHC[..., width:]], -1)


def alibi_slopes(heads: int) -> jax.Array:
    """Slope of each head (Press et al. 2021): powers of 2**(-8/n), for n the power of two below."""
    n = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    slopes += [2 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)]
    return jnp.array(slopes, jnp.float32)


def alibi_bias(
    cfg: ModelConfig, slopes_H: jax.Array, query_BT: jax.Array, key_BS: jax.Array
) -> jax.Array:
    """ALiBi's bias on the scores of queries and keys at these positions, [B, H, T or 1, S].

    `slopes_H` are the slopes of the heads of the scores, which may be one device's share.
    """
    slopes_H11 = slopes_H[:, None, None]
    if cfg.alibi == "exact":
        distance_BTS = key_BS[:, None, :] - query_BT[:, :, None]
        return slopes_H11 * distance_BTS[:, None].astype(jnp.float32)
    # A softmax is invariant to a shift of a whole row; the rounding depends on absolute positions.
    rounded = slopes_H11.astype(jnp.bfloat16) * key_BS[:, None, None, :].astype(jnp.float32).astype(
        jnp.bfloat16
    )
    return rounded.astype(jnp.float32) * cfg.attention_scale


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """`x` bounded smoothly to +-cap by tanh; a cap of 0 is no bound."""
    return cap * jnp.tanh(x / cap) if cap else x


def position_keys(keys_B2: jax.Array, length: int) -> jax.Array:
    """A dropout key for each position of each sequence, [B, T, 2], from one for each sequence.

    Both are key data. Dropout then depends on the sequence's key, the position and the feature
    alone, and not on how a batch is split over devices, microbatches or stages.
    """

    def local(keys_b2: jax.Array) -> jax.Array:
        keys_b = jax.random.wrap_key_data(keys_b2)
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        return jax.random.key_data(fold(keys_b, jnp.arange(length)))

    in_spec = sharding.spec("batch", None)
    out_spec = sharding.spec("batch", None, None)
    keys_B2 = jax.sharding.reshard(keys_B2, in_spec)
    return jax.shard_map(local, in_specs=in_spec, out_specs=out_spec, check_vma=False)(keys_B2)


def local_dropout(
    x: jax.Array, rate: float, keys: jax.Array, dropout_id: jax.Array | int
) -> jax.Array:
    """Dropout on one device's share, for use inside a shard_map.

    `keys` [..., 2] has key data for each vector along the last dimension of `x`; `dropout_id`
    numbers the model's dropout layers.
    """

    def draw_bits(key_2: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_2), dropout_id)
        return jax.random.bits(key, x.shape[-1:], jnp.uint32)

    bits = jax.vmap(draw_bits)(keys.reshape(-1, 2)).reshape(x.shape)
    keep = bits >= jnp.uint32(rate * 2**32)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def dropout(
    x_ND: jax.Array, rate: float, keys_N2: jax.Array | None, dropout_id: jax.Array | int
) -> jax.Array:
    """Dropout (Srivastava et al. 2014) with a key for each token; without keys, the identity.

    `dropout_id` numbers the model's dropout layers; see `position_keys`.
    """
    if keys_N2 is None or rate == 0:
        return x_ND
    tokens = jax.typeof(x_ND).sharding.spec
    keys_N2 = jax.sharding.reshard(keys_N2, tokens)
    return jax.shard_map(
        lambda x_nD, keys_n2, dropout_id: local_dropout(x_nD, rate, keys_n2, dropout_id),
        in_specs=(tokens, tokens, jax.P()),
        out_specs=tokens,
        check_vma=False,
    )(x_ND, keys_N2, jnp.uint32(dropout_id))


def weight(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str | None], std: float
) -> jax.Array:
    """A float32 parameter drawn from N(0, std**2), laid out by its logical axes."""
    return module.param(name, init.normal(std), tuple(shape), tuple(axes))


def vector(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str | None], value: float
) -> jax.Array:
    """A float32 parameter that is initialised to one value, laid out by its logical axes."""
    return module.param(name, init.constant(value), tuple(shape), tuple(axes))


class Norm(nn.Module):
    """The configured normalisation. Parameters `scale`, and `bias` for LayerNorm with a bias."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        cfg = self.cfg
        scale_D, bias_D = vector(self, "scale", (cfg.embed,), (None,), 1.0), None
        if cfg.norm == "layernorm" and cfg.norm_bias:
            bias_D = vector(self, "bias", (cfg.embed,), (None,), 0.0)
        return normalize(cfg, x_ND, scale_D, bias_D)
