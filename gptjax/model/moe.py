"""Mixture of experts: the router, and two ways to dispatch tokens to their experts.

Dropless: tokens are sorted by expert, and a grouped (ragged) matrix product serves all of them;
where experts are split over devices, each device gathers its group's tokens and serves those of its
own experts. With a capacity (in training only; GShard, Lepikhin et al. 2020), each sequence fills a
buffer of fixed size for every expert, the buffers are exchanged, and assignments beyond the
capacity are dropped and counted. A sequence's capacity and its balance loss depend on that sequence
alone, so both are the same on every mesh and however a batch is split.

Shapes: B sequences, T positions, N = B*T tokens, K experts of a token, E experts, D embed, F hidden
width of an expert, P capacity of an expert's buffer, M assignments of tokens to experts; in lower
case, one device's share.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from gptjax.config import ModelConfig
from gptjax.model.feed_forward import activate, input_projections
from gptjax.model.layers import weight
from gptjax.parallel import sequence, sharding
from gptjax.parallel.matmul import (
    Layout,
    column_parallel,
    gather_tokens,
    gather_weight,
    row_parallel,
    sum_tokens,
)

_EXPERT = "expert"


class Routing(NamedTuple):
    """Statistics of a layer's router, summed over its tokens; divided by their number, means.

    balance: the load-balancing loss (Fedus et al. 2021), 1 where every expert has its even share
    and more otherwise. router_z: the squared log-partition (Zoph et al. 2022). load_E: each
    expert's assignments, times E/K. dropped: the share of a token's assignments that were dropped.
    """

    balance: jax.Array
    router_z: jax.Array
    load_E: jax.Array
    dropped: jax.Array


def route(
    cfg: ModelConfig, logits_NE: jax.Array, sequences: int, axis: str = "tokens"
) -> tuple[jax.Array, jax.Array, Routing]:
    """The experts of each token and their weights, [N, K], and the sums for the losses.

    `logits_NE` are float32, of so many sequences, their tokens on the logical axis `axis`. The
    softmax is over all experts; with `moe.normalize` the weights of the chosen ones are then scaled
    to sum to one, which is the softmax over their logits alone.
    """
    moe = cfg.moe
    n, e = logits_NE.shape
    p_NE = jax.nn.softmax(logits_NE, -1)
    weights_NK, ids_NK = lax.top_k(p_NE, moe.top_k)
    if moe.normalize:
        weights_NK = weights_NK / weights_NK.sum(-1, keepdims=True)
    chosen_NE = (ids_NK[..., None] == jnp.arange(e)).sum(1).astype(jnp.float32)
    by_sequence = lambda a_NE: sequence.unflatten(a_NE, sequences, (e,), (None,), axis)
    share_BE = by_sequence(chosen_NE).mean(1) / moe.top_k
    balance_B = e * (lax.stop_gradient(share_BE) * by_sequence(p_NE).mean(1)).sum(-1)
    routing = Routing(
        balance=balance_B.sum() * (n // sequences),
        router_z=jnp.square(jax.nn.logsumexp(logits_NE, -1)).sum(),
        load_E=chosen_NE.sum(0) * (e / moe.top_k),
        dropped=jnp.float32(0),
    )
    return ids_NK, weights_NK, routing


# --- grouped products -----------------------------------------------------------------------------


def grouped_product(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows times their group's matrix, [M, F].

    Rows are sorted by group; those past the sum of `sizes_E` belong to none and give zero.
    TPUs have a grouped product (`lax.ragged_dot`), as which XLA multiplies every row with every
    matrix on CPUs and NVIDIA GPUs. There rows are padded into blocks that belong to one group each,
    but for a few rows on a GPU, where reading the matrices takes longer than all products.
    """
    platform = sharding.platform()
    m, e = len(x_MD), len(w_EDF)
    if platform == "tpu" or (platform != "cpu" and m <= _FEW_ROWS):
        y_MF = lax.ragged_dot(x_MD, w_EDF, sizes_E)
        return jnp.where(jnp.arange(m)[:, None] < sizes_E.sum(), y_MF, 0)
    block = max(1, m // (2 * e))
    if platform != "cpu":
        block = min(block, _LARGEST_BLOCK)
    ends_E = jnp.cumsum(sizes_E)
    blocks_E = -(-sizes_E // block)
    block_ends_E = jnp.cumsum(blocks_E)
    group_M = jnp.searchsorted(ends_E, jnp.arange(m), side="right")
    offset_M = jnp.arange(m) - (ends_E - sizes_E)[group_M]
    slot_M = (block_ends_E - blocks_E)[group_M] * block + offset_M
    slot_M = jnp.where(group_M < e, slot_M, -1)
    count = m // block + min(e, m)
    padded = jnp.zeros((count * block, x_MD.shape[1]), x_MD.dtype)
    padded = padded.at[slot_M].set(x_MD, mode="drop", wrap_negative_indices=False)
    blocks = padded.reshape(count, block, -1)
    if platform == "cpu":
        group_of_block = jnp.searchsorted(block_ends_E, jnp.arange(count), side="right")
        w = w_EDF[jnp.minimum(group_of_block, e - 1)]
        y = jnp.einsum("nbd,ndf->nbf", blocks, w)
    else:
        y = _block_products(blocks, w_EDF, block_ends_E)
    y = y.reshape(count * block, -1)
    return y.at[slot_M].get(mode="fill", fill_value=0, wrap_negative_indices=False)


_FEW_ROWS = 256  # as many FLOPs for each byte of the matrices; a GPU can do that many meanwhile
_LARGEST_BLOCK = 2048  # rows enough to fill a GPU


@jax.custom_vjp
def _block_products(x_nbD: jax.Array, w_EDF: jax.Array, ends_E: jax.Array) -> jax.Array:
    """Blocks of rows times their group's matrix, one by one; group e has those from ends_E[e-1].

    No matrix is copied for its blocks, as a batched product of them all would have to, and blocks
    of no group cost nothing and are zero. A matrix's gradient is summed in float32.
    """

    def group(e: Any, y_nbF: jax.Array) -> jax.Array:
        one = lambda i, y_nbF: y_nbF.at[i].set(x_nbD[i] @ w_EDF[e])
        return lax.fori_loop(*_bounds(ends_E, e), one, y_nbF)

    zeros = jnp.zeros_like(x_nbD, shape=(*x_nbD.shape[:2], w_EDF.shape[2]))
    return lax.fori_loop(0, len(w_EDF), group, zeros)


def _bounds(ends_E: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(e > 0, ends_E[e - 1], 0), ends_E[e]


def _block_products_fwd(*args: jax.Array) -> Any:
    return _block_products(*args), args


def _block_products_bwd(args: Any, dy_nbF: jax.Array) -> Any:
    x_nbD, w_EDF, ends_E = args

    def group(e: Any, gradients: Any) -> Any:
        def one(i: Any, partial: Any) -> Any:
            dx_nbD, dw_DF = partial
            product = jnp.einsum(
                "bd,bf->df", x_nbD[i], dy_nbF[i], preferred_element_type=jnp.float32
            )
            return dx_nbD.at[i].set(dy_nbF[i] @ w_EDF[e].T), dw_DF + product

        dx_nbD, dw_EDF = gradients
        zeros_DF = jnp.zeros_like(w_EDF[0], jnp.float32)
        dx_nbD, dw_DF = lax.fori_loop(*_bounds(ends_E, e), one, (dx_nbD, zeros_DF))
        return dx_nbD, dw_EDF.at[e].set(dw_DF.astype(w_EDF.dtype))

    zeros = jnp.zeros_like(x_nbD), jnp.zeros_like(w_EDF)
    return *lax.fori_loop(0, len(w_EDF), group, zeros), None


_block_products.defvjp(_block_products_fwd, _block_products_bwd)


# --- dispatch, on one device's share inside a shard_map -------------------------------------------


@dataclass(frozen=True)
class _Dispatch:
    """Sizes of a dispatch: positions of a sequence, experts, and their capacity (0: dropless)."""

    positions: int
    experts: int
    capacity: int
    activation: str


class _Assigned(NamedTuple):
    """Tokens, and the experts and weights of each."""

    x_nD: jax.Array
    ids_nK: jax.Array
    weights_nK: jax.Array


class _Experts(NamedTuple):
    """Weights of the experts at hand."""

    gate_eDf: jax.Array
    up_eDf: jax.Array
    down_efD: jax.Array


def _dropless(tokens: _Assigned, experts: _Experts, activation: str) -> jax.Array:
    """The experts' output for every token, [n, D]; see the module."""
    local_experts = len(experts.gate_eDf)
    gather = functools.partial(lax.all_gather, axis_name=_EXPERT, axis=0, tiled=True)
    x_ND, ids_NK, weights_NK = map(gather, tokens)
    n, k = ids_NK.shape
    expert_M = ids_NK.reshape(-1) - lax.axis_index(_EXPERT) * local_experts
    local_M = (expert_M >= 0) & (expert_M < local_experts)
    group_M = jnp.where(local_M, expert_M, local_experts)
    order_M = jnp.argsort(group_M)
    sizes_e = jnp.bincount(group_M, length=local_experts + 1)[:local_experts]
    x_MD = x_ND[order_M // k]
    projected = [grouped_product(x_MD, w_eDf, sizes_e) for w_eDf in experts[:2]]
    h_Mf = activate(activation, projected)
    y_MD = grouped_product(h_Mf, experts.down_efD, sizes_e)
    y_NKD = y_MD[jnp.argsort(order_M)].reshape(n, k, -1)
    y_ND = (y_NKD * weights_NK[..., None].astype(y_NKD.dtype)).sum(1)
    return lax.psum_scatter(y_ND, _EXPERT, scatter_dimension=0, tiled=True)


def _with_capacity(
    tokens: _Assigned, experts: _Experts, sizes: _Dispatch
) -> tuple[jax.Array, jax.Array]:
    """The experts' output for every token, [n, D], and the number of dropped assignments.

    Each sequence has a buffer of P slots for each expert; all first choices take slots before any
    second choice.
    """
    t, e, p = sizes.positions, sizes.experts, sizes.capacity
    x_nD, ids_nK, weights_nK = tokens
    d, k = x_nD.shape[1], ids_nK.shape[1]
    choices_bKT = ids_nK.reshape(-1, t, k).swapaxes(1, 2)
    b = len(choices_bKT)
    hits_bME = choices_bKT.reshape(b, k * t, 1) == jnp.arange(e)
    place_bM = jnp.where(hits_bME, jnp.cumsum(hits_bME, 1) - 1, 0).sum(-1)
    slot_bM = jnp.where(place_bM < p, choices_bKT.reshape(b, -1) * p + place_bM, e * p)
    b_b1 = jnp.arange(b)[:, None]
    x_bMD = jnp.tile(x_nD.reshape(b, t, d), (1, k, 1))
    buffer = jnp.zeros((b, e * p, d), x_nD.dtype)
    buffer_bEPD = buffer.at[b_b1, slot_bM].set(x_bMD, mode="drop").reshape(b, e, p, d)
    exchange = functools.partial(lax.all_to_all, axis_name=_EXPERT, tiled=True)
    x_BePD = exchange(buffer_bEPD, split_axis=1, concat_axis=0)
    projected = [jnp.einsum("bepd,edf->bepf", x_BePD, w_eDf) for w_eDf in experts[:2]]
    h_BePf = activate(sizes.activation, projected)
    y_BePD = jnp.einsum("bepf,efd->bepd", h_BePf, experts.down_efD)
    y_bEPD = exchange(y_BePD, split_axis=0, concat_axis=1)
    y_bMD = y_bEPD.reshape(b, e * p, d).at[b_b1, slot_bM].get(mode="fill", fill_value=0)
    y_nKD = y_bMD.reshape(b, k, t, d).swapaxes(1, 2).reshape(-1, k, d)
    return (y_nKD * weights_nK[..., None].astype(y_nKD.dtype)).sum(1), (place_bM >= p).sum()


def _dispatch(
    tokens: _Assigned,
    experts: _Experts,
    *,
    sizes: _Dispatch,
    axis: str,
    token_axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Gathers weights over fsdp, dispatches tokens to experts, sums their outputs over tensor.

    `axis` is the tokens' logical axis, `token_axes` are the mesh axes of its gathered form. Returns
    the output, [n, D], and the number of dropped assignments on all devices.
    """
    x_nD = gather_tokens(tokens.x_nD, axis)
    if sharding.platform() == "gpu" and axis != "residual":
        # `_block_products` takes operands that vary alike, and the gathered ones do already.
        x_nD = lax.pcast(x_nD, "tensor", to="varying")
    tokens = tokens._replace(x_nD=x_nD)
    dtype = x_nD.dtype
    # Marked as varying over the copies before they are gathered, so that gradients are scattered
    # first and their parts summed over the copies, not the reverse.
    copies = tuple(name for name in token_axes if name in ("data", "stage", "context"))
    # A GPU's reduce-scatter has the scattered dimension outermost. XLA would keep the gradients of
    # all layers so, and transpose them for the optimizer: a second copy of them all.
    vary = lambda w: lax.pcast(sharding.row_major(w.astype(dtype)), copies, to="varying")
    gate_eDf, up_eDf = (gather_weight(vary(w_edf), dtype, 1) for w_edf in experts[:2])
    down_efD = gather_weight(vary(experts.down_efD), dtype, 2)
    whole = _Experts(gate_eDf, up_eDf, down_efD)
    if sizes.capacity:
        y_nD, dropped = _with_capacity(tokens, whole, sizes)
    else:
        y_nD, dropped = _dropless(tokens, whole, sizes.activation), jnp.int32(0)
    dropped = lax.psum(dropped.astype(jnp.float32), token_axes)
    return sum_tokens(y_nD, axis), dropped


class MoE(nn.Module):
    """The router and its experts, and shared experts beside them.

    Parameters router, gate, up, down, shared_gate, shared_up, shared_down. `__call__` takes the
    number of sequences, and returns [N, D] and the routing statistics.
    """

    cfg: ModelConfig
    training: bool
    layout: Layout

    @nn.compact
    def __call__(self, x_ND: jax.Array, sequences: int) -> tuple[jax.Array, Routing]:
        cfg, moe, axis = self.cfg, self.cfg.moe, self.layout.gathered
        d, f, e = cfg.embed, cfg.expert_hidden, moe.experts
        router_DE = weight(self, "router", (d, e), ("w_embed", None), cfg.init_std)
        in_axes, out_axes = ("experts", "w_embed", "mlp"), ("experts", "mlp", "w_embed")
        weights = [
            weight(self, name, (e, d, f), in_axes, cfg.init_std)
            for name in input_projections(cfg.activation)
        ]
        weights.append(weight(self, "down", (e, f, d), out_axes, self._out_std))

        x_spec = sharding.spec(self.layout.axis, None)
        # The choice of experts is discrete: it is made in float32, whatever the compute dtype.
        logits_NE = jnp.einsum(
            "nd,de->ne",
            x_ND.astype(jnp.float32),
            router_DE,
            precision="highest",
            out_sharding=x_spec,
        )
        token_spec = sharding.spec(axis, None)
        logits_NE = jax.sharding.reshard(logits_NE, token_spec)
        ids_NK, weights_NK, routing = route(cfg, logits_NE, sequences, axis)

        t, capacity = len(x_ND) // sequences, 0
        if self.training and moe.capacity:
            capacity = min(t, -(-int(moe.capacity * moe.top_k * t) // e))
        token_specs: list[Any] = [x_spec, token_spec, token_spec]
        weight_specs: list[Any] = [sharding.spec(*axes) for axes in (in_axes, in_axes, out_axes)]
        y_ND, dropped = jax.shard_map(
            functools.partial(
                _dispatch,
                sizes=_Dispatch(t, e, capacity, cfg.activation),
                axis=self.layout.axis,
                token_axes=sharding.mesh_axes(axis),
            ),
            in_specs=(_Assigned(*token_specs), _Experts(*weight_specs)),
            out_specs=(x_spec, jax.P()),
        )(_Assigned(x_ND, ids_NK, weights_NK), _Experts(*weights))
        if moe.shared:
            y_ND += self._shared_experts(x_ND)
        return y_ND, routing._replace(dropped=dropped / moe.top_k)

    @property
    def _out_std(self) -> float:
        return self.cfg.init_std / (2 * self.cfg.layers) ** 0.5

    def _shared_experts(self, x_ND: jax.Array) -> jax.Array:
        """The experts that every token goes to, as one feed-forward layer."""
        cfg = self.cfg
        width = cfg.moe.shared * cfg.expert_hidden
        in_weights = tuple(
            weight(self, f"shared_{name}", (cfg.embed, width), ("w_embed", "mlp"), cfg.init_std)
            for name in input_projections(cfg.activation)
        )
        projected = column_parallel(x_ND, in_weights, "mlp", self.layout)
        shape = (width, cfg.embed)
        w_FD = weight(self, "shared_down", shape, ("w_mlp", None), self._out_std)
        return row_parallel(activate(cfg.activation, projected), w_FD, self.layout)
