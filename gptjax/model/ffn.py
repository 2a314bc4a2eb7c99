"""The feed-forward layer.

Shapes: N tokens, D embed, F hidden (config `mlp`).
"""

import jax
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model.layers import dense, gelu_tanh, vector, weight

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

        def project(name: str) -> jax.Array:
            w_DF = weight(self, name, (embed, hidden), ("w_embed", "mlp"), cfg.init_std)
            bias_F = None
            if cfg.linear_bias:
                bias_F = vector(self, f"{name}_bias", (hidden,), ("mlp",), 0.0)
            return dense(x_ND, w_DF, bias_F, ("tokens", "mlp"))

        if cfg.activation == "swiglu":
            h_NF = jax.nn.silu(project("gate")) * project("up")
        else:
            h_NF = _PLAIN[cfg.activation](project("up"))
        std = cfg.init_std / (2 * cfg.layers) ** 0.5
        w_FD = weight(self, "down", (hidden, embed), ("mlp", "w_embed"), std)
        bias_D = vector(self, "down_bias", (embed,), (None,), 0.0) if cfg.linear_bias else None
        return dense(h_NF, w_FD, bias_D, ("tokens", "embed"))
