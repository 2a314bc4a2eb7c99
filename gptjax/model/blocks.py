"""A block of the decoder, and the periods of blocks that the stack is scanned over.

Shapes: N tokens, D embed.
"""

import threading
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import layers
from gptjax.model.attention.layer import Cache, SelfAttention
from gptjax.model.attention.vendor import is_cudnn_forward
from gptjax.model.feed_forward import FeedForward
from gptjax.model.layers import Tokens
from gptjax.model.moe import MoE, Routing
from gptjax.parallel import matmul
from gptjax.parallel.matmul import Layout

_REMAT = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(matmul.PRODUCT), is_cudnn_forward
    ),
}


@dataclass(frozen=True)
class Execution:
    """How blocks are executed; it does not change their parameters.

    `backends` are the attention backends of a period's layers.
    """

    compute: ComputeConfig
    backends: tuple[str, ...]
    training: bool
    layout: Layout


class Block(nn.Module):
    """Attention and feed-forward, each on its branch of the residual stream."""

    cfg: ModelConfig
    window: int | None
    backend: str
    training: bool
    layout: Layout

    @nn.compact
    def __call__(
        self,
        x_ND: jax.Array,
        tokens: Tokens,
        cache: Cache | None,
        layer: jax.Array | int,
        period: jax.Array,
    ) -> tuple[jax.Array, Cache | None, Routing | None]:
        cfg = self.cfg
        attn = SelfAttention(cfg, self.window, self.backend, self.layout, name="attn")
        norm_attn = layers.Norm(cfg, name="norm_attn")
        norm_mlp = norm_attn if cfg.shared_norm else layers.Norm(cfg, name="norm_mlp")
        # Three dropouts a block: of attention weights and of both branches. 0 is the embeddings'.
        dropout_id = 3 * layer + 1
        keys_N2 = tokens.keys_N2()
        drop = lambda y_ND, i: layers.dropout(y_ND, cfg.dropout, keys_N2, dropout_id + i)
        attend = lambda h_ND: attn(h_ND, tokens, dropout_id, cache, period)

        def mlp(h_ND: jax.Array) -> tuple[jax.Array, Routing | None]:
            if not cfg.moe.experts:
                return FeedForward(cfg, self.layout, name="mlp")(h_ND), None
            moe = MoE(cfg, self.training, self.layout, name="mlp")
            return moe(h_ND, len(tokens.positions_BT))

        if cfg.norm_position == "post":
            y_ND, cache = attend(x_ND)
            x_ND = norm_attn(x_ND + drop(y_ND, 1))
            y_ND, routing = mlp(x_ND)
            return norm_mlp(x_ND + drop(y_ND, 2)), cache, routing
        h_ND = norm_attn(x_ND)
        y_ND, cache = attend(h_ND)
        if cfg.residual == "parallel":
            m_ND, routing = mlp(h_ND if cfg.shared_norm else norm_mlp(x_ND))
            return x_ND + drop(y_ND, 1) + drop(m_ND, 2), cache, routing
        x_ND = x_ND + drop(y_ND, 1)
        m_ND, routing = mlp(norm_mlp(x_ND))
        return x_ND + drop(m_ND, 2), cache, routing


class Period(nn.Module):
    """The blocks of one period of the attention pattern."""

    cfg: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x_ND: jax.Array, index: jax.Array, tokens: Tokens
    ) -> tuple[jax.Array, Routing | None]:
        cfg, how = self.cfg, self.execution
        block = Block
        if how.compute.remat != "none":
            # Outside a loop, XLA would merge the recomputation with the original.
            block = nn.remat(
                Block, policy=_REMAT[how.compute.remat], prevent_cse=not how.compute.scan_layers
            )
        routings = []
        for j, kind in enumerate(cfg.pattern):
            layer = index * len(cfg.pattern) + j
            x_ND, _, routing = block(
                cfg,
                window_of(cfg, kind),
                how.backends[j],
                how.training,
                how.layout,
                name=f"layer_{j}",
            )(x_ND, tokens, None, layer, index)
            routings.append(routing)
        return x_ND, _stack_routings(routings)


_ONE_AT_A_TIME = threading.Lock()  # flax looks through the class, which other threads change


def scan_periods(
    cfg: ModelConfig, execution: Execution, length: int, name: str | None = None
) -> Any:
    """A module of so many periods, one after another, with stacked parameters."""
    with _ONE_AT_A_TIME:
        scanned = nn.scan(
            Period,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=length,
            unroll=1 if execution.compute.scan_layers else length,
        )
    return scanned(cfg, execution, name=name)


def periods_of(cfg: ModelConfig) -> int:
    """Periods of the attention pattern in the stack."""
    return cfg.layers // len(cfg.pattern)


def window_of(cfg: ModelConfig, kind: str) -> int | None:
    """Keys that a layer of this kind sees, None for all."""
    return cfg.window if kind == "window" else None


def _stack_routings(routings: list[Routing | None]) -> Routing | None:
    """Routing statistics of a period's layers, stacked."""
    return jax.tree.map(lambda *sums: jnp.stack(sums), *routings)
