"""The feed-forward layer and its activations.

Shapes: N tokens, D embed, F hidden (config `mlp`).
"""

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model.layers import add_bias, gelu, gelu_tanh, silu, vector, weight
from gptjax.parallel.matmul import Layout, column_parallel, row_parallel

UNGATED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": gelu,
}
GATED: dict[str, Callable[[jax.Array], jax.Array]] = {"swiglu": silu}


def input_projections(activation: str) -> tuple[str, ...]:
    """Names of the projections into the hidden layer: a gated activation has two."""
    return ("gate", "up") if activation in GATED else ("up",)


def activate(activation: str, projected: Sequence[jax.Array]) -> jax.Array:
    """The hidden layer from its `input_projections`.

    "gelu" and "gelu_tanh" (Hendrycks & Gimpel 2016) are act(up); "swiglu" (Shazeer 2020) is
    silu(gate) * up.
    """
    if activation in GATED:
        gate, up = projected
        return GATED[activation](gate) * up
    (up,) = projected
    return UNGATED[activation](up)


class FeedForward(nn.Module):
    """Projection into the hidden layer, activation, projection out of it.

    Parameters up, down, their biases, and with a gated activation gate.
    """

    cfg: ModelConfig
    layout: Layout

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        cfg = self.cfg
        embed, hidden = cfg.embed, cfg.hidden

        names = input_projections(cfg.activation)
        weights_DF = [
            weight(self, name, (embed, hidden), ("w_embed", "mlp"), cfg.init_std) for name in names
        ]
        projected = column_parallel(x_ND, tuple(weights_DF), "mlp", self.layout)
        if cfg.linear_bias:
            projected = tuple(
                add_bias(y_NF, vector(self, f"{name}_bias", (hidden,), ("mlp",), 0.0))
                for name, y_NF in zip(names, projected, strict=True)
            )
        h_NF = activate(cfg.activation, projected)
        std = cfg.init_std / (2 * cfg.layers) ** 0.5
        w_FD = weight(self, "down", (hidden, embed), ("w_mlp", None), std)
        bias_D = vector(self, "down_bias", (embed,), (None,), 0.0) if cfg.linear_bias else None
        return add_bias(row_parallel(h_NF, w_FD, self.layout), bias_D)
