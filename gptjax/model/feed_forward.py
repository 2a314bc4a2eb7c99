"""The feed-forward layer.

Shapes: N tokens, D embed, F hidden (config `mlp`).
"""

import jax
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model.layers import add_bias, gelu_tanh, vector, weight
from gptjax.parallel.matmul import column_parallel, row_parallel, rows_of

_PLAIN = {
    "gelu_tanh": gelu_tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class FeedForward(nn.Module):
    """act(x up) down, or with swiglu (silu(x gate) * (x up)) down (Shazeer 2020)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        cfg = self.cfg
        embed, hidden = cfg.embed, cfg.hidden

        names = ("gate", "up") if cfg.activation == "swiglu" else ("up",)
        weights_DF = [
            weight(self, name, (embed, hidden), ("w_embed", "mlp"), cfg.init_std) for name in names
        ]
        projected = column_parallel(x_ND, tuple(weights_DF), "mlp")
        if cfg.linear_bias:
            projected = [
                add_bias(y_NF, vector(self, f"{name}_bias", (hidden,), ("mlp",), 0.0))
                for name, y_NF in zip(names, projected, strict=True)
            ]
        *gate, up_NF = projected
        h_NF = jax.nn.silu(gate[0]) * up_NF if gate else _PLAIN[cfg.activation](up_NF)
        std = cfg.init_std / (2 * cfg.layers) ** 0.5
        w_FD = weight(self, "down", (hidden, embed), ("w_mlp", None), std)
        bias_D = vector(self, "down_bias", (embed,), (None,), 0.0) if cfg.linear_bias else None
        return add_bias(row_parallel(h_NF, w_FD, rows_of(x_ND)), bias_D)
