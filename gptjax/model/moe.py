"""Mixture of experts: the router, and the two ways to bring tokens to their experts.

Dropless: tokens are sorted by expert, and a product over ragged groups serves them all; where
experts are split over devices, each gathers its group's tokens and serves those that are its own.
With a capacity (in training only), each sequence fills a buffer of fixed size for every expert, the
buffers are exchanged, and what finds no place is dropped and counted. A sequence's capacity and its
balance loss depend on that sequence alone, so both are the same on every mesh and however a batch
is split.

Shapes: B sequences, T positions, N = B*T tokens, k experts of a token, E experts, D embed, F hidden
width of an expert, P places in an expert's buffer, M rows sorted by expert.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from gptjax.config import ModelConfig
from gptjax.model.layers import weight
from gptjax.parallel import sequence, sharding
from gptjax.parallel.matmul import (
    column_parallel,
    gather_rows,
    gather_weight,
    row_parallel,
    rows_of,
    sum_rows,
)


class Routing(NamedTuple):
    """What a layer's router did, as sums over its tokens: divided by their number, means.

    balance: 1 where every expert has its even share, and more otherwise. router_z: the squared
    log-partition. load_E: each expert's assignments, times E/k. dropped: the share of a token's
    assignments that found no place.
    """

    balance: jax.Array
    router_z: jax.Array
    load_E: jax.Array
    dropped: jax.Array


def route(
    cfg: ModelConfig, logits_NE: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array, Routing]:
    """The experts of each token and their weights, [N, k], and the sums for the losses.

    `logits_NE` are float32. The softmax is over all experts; with `normalize` the chosen ones are
    then scaled to sum to one, which is the softmax over their logits alone.
    """
    moe = cfg.moe
    n, e = logits_NE.shape
    p_NE = jax.nn.softmax(logits_NE, -1)
    weights_Nk, ids_Nk = lax.top_k(p_NE, moe.top_k)
    if moe.normalize:
        weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdims=True)
    chosen_NE = (ids_Nk[..., None] == jnp.arange(e)).sum(1).astype(jnp.float32)
    by_row = lambda a_NE: sequence.sequences(a_NE, rows, (e,), (None,), rows_of(a_NE))
    share_BE = by_row(chosen_NE).mean(1) / moe.top_k
    balance_B = e * (lax.stop_gradient(share_BE) * by_row(p_NE).mean(1)).sum(-1)
    routing = Routing(
        balance=balance_B.sum() * (n // rows),
        router_z=jnp.square(jax.nn.logsumexp(logits_NE, -1)).sum(),
        load_E=chosen_NE.sum(0) * (e / moe.top_k),
        dropped=jnp.float32(0),
    )
    return ids_Nk, weights_Nk, routing


# --- products over ragged groups --------------------------------------------------------------


def grouped_product(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows times their group's matrix, [M, F]; rows are sorted by group, and those past the sum of
    `sizes_E` belong to none and give zero.

    Accelerators have an instruction for it. XLA:CPU would multiply every row with every matrix, so
    there rows are laid out in blocks that belong to one group each.
    """
    if sharding.platform() != "cpu":
        y_MF = lax.ragged_dot(x_MD, w_EDF, sizes_E)
        return jnp.where(jnp.arange(len(x_MD))[:, None] < sizes_E.sum(), y_MF, 0)
    m, e = len(x_MD), len(w_EDF)
    block = max(1, m // (2 * e))
    ends_E = jnp.cumsum(sizes_E)
    blocks_E = -(-sizes_E // block)
    block_ends_E = jnp.cumsum(blocks_E)
    group_M = jnp.searchsorted(ends_E, jnp.arange(m), side="right")
    inside_M = jnp.arange(m) - (ends_E - sizes_E)[group_M]
    place_M = (block_ends_E - blocks_E)[group_M] * block + inside_M
    place_M = jnp.where(group_M < e, place_M, -1)
    count = m // block + min(e, m)
    padded = jnp.zeros((count * block, x_MD.shape[1]), x_MD.dtype)
    padded = padded.at[place_M].set(x_MD, mode="drop", wrap_negative_indices=False)
    group_of_block = jnp.searchsorted(block_ends_E, jnp.arange(count), side="right")
    w = w_EDF[jnp.minimum(group_of_block, e - 1)]
    y = jnp.einsum("nbd,ndf->nbf", padded.reshape(count, block, -1), w)
    y = y.reshape(count * block, -1)
    return y.at[place_M].get(mode="fill", fill_value=0, wrap_negative_indices=False)


# --- dispatch: one device's share, inside an island over the mesh -------------------------------


def _dropless(x_nD, ids_nk, weights_nk, gate_eDF, up_eDF, down_eFD):
    """Every token reaches its experts; see the module."""
    axis = sharding.RULES["experts"]
    mine = len(gate_eDF)
    gather = functools.partial(lax.all_gather, axis_name=axis, axis=0, tiled=True)
    x_nD, ids_nk, weights_nk = gather(x_nD), gather(ids_nk), gather(weights_nk)
    n, k = ids_nk.shape
    local_M = ids_nk.reshape(-1) - lax.axis_index(axis) * mine
    group_M = jnp.where((local_M >= 0) & (local_M < mine), local_M, mine)
    order_M = jnp.argsort(group_M)
    sizes_e = jnp.bincount(group_M, length=mine + 1)[:mine]
    rows_MD = x_nD[order_M // k]
    h_MF = jax.nn.silu(grouped_product(rows_MD, gate_eDF, sizes_e))
    h_MF *= grouped_product(rows_MD, up_eDF, sizes_e)
    y_MD = grouped_product(h_MF, down_eFD, sizes_e)
    y_nkD = y_MD[jnp.argsort(order_M)].reshape(n, k, -1)
    y_nD = (y_nkD * weights_nk[..., None].astype(y_nkD.dtype)).sum(1)
    return lax.psum_scatter(y_nD, axis, scatter_dimension=0, tiled=True)


def _with_capacity(x_nD, ids_nk, weights_nk, gate_eDF, up_eDF, down_eFD, *, seq, experts, places):
    """Buffers of `places` for each (sequence, expert); first choices go first. Also the dropped."""
    axis = sharding.RULES["experts"]
    d, k = x_nD.shape[1], ids_nk.shape[1]
    choices_bkT = ids_nk.reshape(-1, seq, k).swapaxes(1, 2)
    b = len(choices_bkT)
    hits_bME = choices_bkT.reshape(b, k * seq, 1) == jnp.arange(experts)
    place_bM = jnp.where(hits_bME, jnp.cumsum(hits_bME, 1) - 1, 0).sum(-1)
    slot_bM = jnp.where(
        place_bM < places, choices_bkT.reshape(b, -1) * places + place_bM, experts * places
    )
    rows_b1 = jnp.arange(b)[:, None]
    x_bMD = jnp.tile(x_nD.reshape(b, seq, d), (1, k, 1))
    buffer = jnp.zeros((b, experts * places, d), x_nD.dtype)
    buffer = buffer.at[rows_b1, slot_bM].set(x_bMD, mode="drop").reshape(b, experts, places, d)
    swap = functools.partial(lax.all_to_all, axis_name=axis, tiled=True)
    x_beP = swap(buffer, split_axis=1, concat_axis=0)
    h = jax.nn.silu(jnp.einsum("bepd,edf->bepf", x_beP, gate_eDF))
    h *= jnp.einsum("bepd,edf->bepf", x_beP, up_eDF)
    y = swap(jnp.einsum("bepf,efd->bepd", h, down_eFD), split_axis=0, concat_axis=1)
    y_bMD = y.reshape(b, experts * places, d).at[rows_b1, slot_bM].get(mode="fill", fill_value=0)
    y_nkD = y_bMD.reshape(b, k, seq, d).swapaxes(1, 2).reshape(-1, k, d)
    return (y_nkD * weights_nk[..., None].astype(y_nkD.dtype)).sum(1), (place_bM >= places).sum()


def _serve(
    x_nD, ids_nk, weights_nk, gate_eDF, up_eDF, down_eFD, *, seq, experts, places, rows, axes
):
    """The island: weights gathered over fsdp, tokens to experts and back, summed over tensor."""
    x_nD = gather_rows(x_nD, rows)
    # Marked as each copy's own before they are gathered, so that gradients are scattered first and
    # their parts summed over the copies, not the reverse.
    copies = tuple(axis for axis in axes if axis in ("data", "stage", "context"))
    own = lambda w: lax.pcast(w.astype(x_nD.dtype), copies, to="varying")
    into = (gather_weight(own(w_eDF), x_nD.dtype, 1) for w_eDF in (gate_eDF, up_eDF))
    args = x_nD, ids_nk, weights_nk, *into, gather_weight(own(down_eFD), x_nD.dtype, 2)
    if places:
        y_nD, dropped = _with_capacity(*args, seq=seq, experts=experts, places=places)
    else:
        y_nD, dropped = _dropless(*args), jnp.int32(0)
    dropped = lax.psum(dropped.astype(jnp.float32), axes)
    return sum_rows(y_nD, rows), dropped


class MoE(nn.Module):
    """The experts, and shared ones beside them. Parameters router, gate, up, down, shared_*."""

    cfg: ModelConfig
    training: bool

    @nn.compact
    def __call__(self, x_ND: jax.Array, rows: int) -> tuple[jax.Array, Routing]:
        cfg, moe = self.cfg, self.cfg.moe
        d, f, e = cfg.embed, cfg.expert_hidden, moe.experts
        std = cfg.init_std / (2 * cfg.layers) ** 0.5
        router_DE = weight(self, "router", (d, e), ("w_embed", None), cfg.init_std)
        into = [
            weight(self, name, (e, d, f), ("experts", "w_embed", "mlp"), cfg.init_std)
            for name in ("gate", "up")
        ]
        down_EFD = weight(self, "down", (e, f, d), ("experts", "mlp", "w_embed"), std)

        rows_axis = rows_of(x_ND)
        x_rows = sharding.spec(rows_axis, None)
        # The choice of experts is discrete: it is made in float32, whatever the compute dtype.
        logits_NE = jnp.einsum(
            "nd,de->ne",
            x_ND.astype(jnp.float32),
            router_DE,
            precision="highest",
            out_sharding=x_rows,
        )
        held = "batch" if rows_axis == "batch" else "tokens"
        logits_NE = jax.sharding.reshard(logits_NE, sharding.spec(held, None))
        ids_Nk, weights_Nk, routing = route(cfg, logits_NE, rows)

        seq, places = len(x_ND) // rows, 0
        if self.training and moe.capacity:
            places = min(seq, -(-int(moe.capacity * moe.top_k * seq) // e))
        tokens = sharding.spec(held, None)
        expert = sharding.spec("experts", "w_embed", "mlp")
        down = sharding.spec("experts", "mlp", "w_embed")
        y_ND, dropped = jax.shard_map(
            functools.partial(
                _serve,
                seq=seq,
                experts=e,
                places=places,
                rows=rows_axis,
                axes=sharding.mesh_axes(held),
            ),
            in_specs=(x_rows, tokens, tokens, expert, expert, down),
            out_specs=(x_rows, jax.P()),
        )(x_ND, ids_Nk, weights_Nk, *into, down_EFD)
        routing = routing._replace(dropped=dropped / moe.top_k)

        if moe.shared:
            width = moe.shared * f
            axes = ("w_embed", "mlp")
            into = tuple(
                weight(self, f"shared_{name}", (d, width), axes, cfg.init_std)
                for name in ("gate", "up")
            )
            gate_NF, up_NF = column_parallel(x_ND, into, "mlp")
            w_FD = weight(self, "shared_down", (width, d), ("w_mlp", None), std)
            y_ND += row_parallel(jax.nn.silu(gate_NF) * up_NF, w_FD, rows_axis)
        return y_ND, routing
