"""The pipeline: the stack cut into stages over the mesh axis "stage", which batches pass in parts.

The schedule is circular, with interleaved stretches (Narayanan et al. 2021): each of S stages has R
stretches of layers, the v-th of stage s being stretch v*S + s of the model. The M microbatches go
round in groups of S: a microbatch passes all S stages, comes back to the first for its next round,
and after R rounds makes place for the next group. So no stage ever waits but at the ends: of
M*R + S - 1 ticks each works M*R, and more rounds make a tick, hence the idle share, smaller.

It is one scan over ticks, manual over the stage axis alone, so that inside it every other axis is
as it always is. Gradients come by differentiating the scan: they pass through the stages the other
way round, on the same schedule.

Shapes: B sequences, b of a microbatch, n its rows, N all rows, T positions, D embed, S stages,
G groups, M = G*S microbatches, R rounds.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.parallel import sequence, sharding
from gptjax.parallel.matmul import rows_of

_AXIS = "stage"


def order(periods: int, rounds: int) -> np.ndarray:
    """Number in the model of each period of the stack as it lies in memory on the ambient mesh.

    A stage's part of a stacked parameter is one piece, in which its stretches follow one another.
    """
    stages = sharding.axis_size("layers")
    by_stretch = np.arange(periods).reshape(rounds, stages, -1)
    return by_stretch.swapaxes(0, 1).reshape(-1)


def reordered(blocks: Any, places: Sequence[int]) -> Any:
    """Stacked parameters with their leading axis in another order, laid out as before."""
    if list(places) == list(range(len(places))):
        return blocks

    def move(w: jax.Array) -> jax.Array:
        axes = jax.typeof(w).sharding.spec
        return w.at[np.array(places)].get(out_sharding=axes)

    return jax.tree.map(move, blocks)


def run(
    stretch: Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    blocks: Any,
    x_ND: jax.Array,
    sequences: Any,
    rounds: int,
    microbatches: int,
) -> tuple[jax.Array, Any]:
    """The stack on x_ND, cut into stages; its parameters lie in the order of `order`.

    `stretch(blocks, x_nD, first, sequences)` applies consecutive periods, of which `first` is the
    number of the first, to one microbatch; it also returns sums over tokens, stacked by period, or
    None. `sequences` is a tree of arrays [B, ...] that go with the sequences.

    Returns x_ND, and the sums of all microbatches by period in the model's order.
    """
    rows, d = rows_of(x_ND), x_ND.shape[1]
    stages = sharding.axis_size("layers")
    b = len(jax.tree.leaves(sequences)[0])
    periods = len(jax.tree.leaves(blocks)[0])

    x_ND = jax.sharding.reshard(x_ND, sharding.spec("tokens", "embed"))
    x_BTD = sequence.sequences(x_ND, b, (d,), ("embed",))
    inputs = jax.tree.map(lambda a: _by_stage(a, stages), (x_BTD, sequences))
    local = functools.partial(
        _stages, stretch, rows=rows, stages=stages, rounds=rounds, groups=microbatches // stages
    )
    x_SBTD, sums = jax.shard_map(
        local,
        in_specs=(jax.P(_AXIS), jax.P(_AXIS)),
        out_specs=(jax.P(_AXIS), jax.P(_AXIS)),
        axis_names={_AXIS},
        check_vma=False,
    )(blocks, inputs)
    x_BTD = lax.reshape(x_SBTD, x_BTD.shape, out_sharding=sharding.spec("batch", "seq", "embed"))
    x_ND = sequence.rows_of_sequences(x_BTD, "embed")
    back = np.argsort(order(periods, rounds))
    sums = jax.tree.map(lambda a: jax.sharding.reshard(a, jax.P())[back], sums)
    return jax.sharding.reshard(x_ND, sharding.spec(rows, "embed")), sums


def _by_stage(a_BT: jax.Array, stages: int) -> jax.Array:
    """[B, ...] as [S, B/S, ...]: each stage keeps the sequences that it has."""
    b, *rest = a_BT.shape
    axes = jax.typeof(a_BT).sharding.spec[1:]
    out = jax.P(_AXIS, sharding.spec("microbatch")[0], *axes)
    return lax.reshape(a_BT, (stages, b // stages, *rest), out_sharding=out)


# --- one stage's share -----------------------------------------------------------------------


def _stages(stretch, blocks, inputs, *, rows, stages, rounds, groups):
    """The scan over ticks. Of group g, stage i begins with microbatch i, which is its own."""
    here = lax.axis_index(_AXIS)
    blocks = jax.tree.map(lambda w: w.reshape(rounds, -1, *w.shape[1:]), blocks)
    length = len(jax.tree.leaves(blocks)[0][0])  # periods of a stretch
    x_GbTD, sequences = jax.tree.map(lambda a: _in_groups(a[0], groups), inputs)
    x_GnD = jax.vmap(functools.partial(_rows, rows=rows))(x_GbTD)
    x_GSnD, sequences = _gathered(x_GnD), jax.tree.map(_gather, sequences)
    microbatches = groups * stages
    flat = lambda a: a.reshape(microbatches, *a.shape[2:])
    x_MnD, sequences = jax.tree.map(flat, (x_GSnD, sequences))
    of = lambda tree, i: jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, False), tree)

    def tick(carry: Any, time: jax.Array) -> tuple[Any, None]:
        x_nD, out_MnD, sums = carry
        done = time - here  # of this stage's work; below zero, or past its end, it idles
        works = (done >= 0) & (done < microbatches * rounds)
        done = jnp.clip(done, 0, microbatches * rounds - 1)
        group, within = done // (stages * rounds), done % (stages * rounds)
        turn, microbatch = within // stages, group * stages + within % stages
        x_nD = jnp.where((here == 0) & (turn == 0), of(x_MnD, microbatch), x_nD)
        first = (turn * stages + here) * length
        y_nD, new = stretch(of(blocks, turn), x_nD, first, of(sequences, microbatch))
        ends = works & (here == stages - 1) & (turn == rounds - 1)
        put = lax.dynamic_update_index_in_dim(out_MnD, y_nD, microbatch, 0)
        out_MnD = jnp.where(ends, put, out_MnD)
        sums = jax.tree.map(lambda a, b: a.at[turn].add(jnp.where(works, b, 0)), sums, new)
        ring = [(s, (s + 1) % stages) for s in range(stages)]
        return (lax.ppermute(y_nD, _AXIS, ring), out_MnD, sums), None

    once = lambda: stretch(of(blocks, 0), x_MnD[0], jnp.int32(0), of(sequences, 0))[1]
    shapes = jax.eval_shape(once)
    sums = jax.tree.map(lambda a: jnp.zeros((rounds, *a.shape), a.dtype), shapes)
    ticks = jnp.arange(microbatches * rounds + stages - 1)
    carry = jnp.zeros_like(x_MnD[0]), jnp.zeros_like(x_MnD), sums
    (_, out_MnD, sums), _ = lax.scan(tick, carry, ticks)

    out_GSnD = out_MnD.reshape(groups, stages, *out_MnD.shape[1:])
    # All zeros but the last stage's: the sum only sends.
    x_GnD = _scattered(out_GSnD)  # zeros but for the last stage's, so the sum only sends
    x_GbTD = jax.vmap(functools.partial(_sequences, like_bTD=x_GbTD[0]))(x_GnD)
    x_BTD = _from_groups(x_GbTD)
    return x_BTD[None], jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sums)


def _in_groups(a_BT: jax.Array, groups: int) -> jax.Array:
    """[B, ...] as [G, b, ...], each device its own sequences."""
    b, *rest = a_BT.shape
    axes = jax.typeof(a_BT).sharding.spec
    out = jax.P(axes[0], None, *axes[1:])
    return lax.reshape(a_BT, (b // groups, groups, *rest), out_sharding=out).swapaxes(0, 1)


def _from_groups(a_GbT: jax.Array) -> jax.Array:
    """The inverse of `_in_groups`."""
    groups, b, *rest = a_GbT.shape
    axes = jax.typeof(a_GbT).sharding.spec
    out = jax.P(axes[1], *axes[2:])
    return lax.reshape(a_GbT.swapaxes(0, 1), (groups * b, *rest), out_sharding=out)


def _rows(x_bTD: jax.Array, rows: str) -> jax.Array:
    x_nD = sequence.rows_of_sequences(x_bTD, "embed")
    return jax.sharding.reshard(x_nD, sharding.spec(rows, "embed"))


def _sequences(x_nD: jax.Array, like_bTD: jax.Array) -> jax.Array:
    b, _, d = like_bTD.shape
    x_nD = jax.sharding.reshard(x_nD, sharding.spec("tokens", "embed"))
    return sequence.sequences(x_nD, b, (d,), ("embed",))


# --- collectives over the stages ---------------------------------------------------------------
# As islands over all axes, each the other's gradient: of arrays with other, explicit axes JAX 0.12
# loses track in the transposed program.


def _gather(a_GbT: jax.Array) -> jax.Array:
    """[G, ...] of each stage as [G, S, ...]."""
    first, *rest = jax.typeof(a_GbT).sharding.spec
    return jax.shard_map(
        lambda a: lax.all_gather(a, _AXIS, axis=1),
        in_specs=jax.P(first, *rest),
        out_specs=jax.P(first, None, *rest),
        check_vma=False,
    )(a_GbT)


def _scatter(a_GSbT: jax.Array) -> jax.Array:
    """[G, S, ...], summed over the stages, as each one's [G, ...]."""
    first, _, *rest = jax.typeof(a_GSbT).sharding.spec
    return jax.shard_map(
        lambda a: lax.psum_scatter(a, _AXIS, scatter_dimension=1),
        in_specs=jax.P(first, None, *rest),
        out_specs=jax.P(first, *rest),
        check_vma=False,
    )(a_GSbT)


_gathered, _scattered = jax.custom_vjp(_gather), jax.custom_vjp(_scatter)
_gathered.defvjp(lambda a: (_gather(a), None), lambda _, d: (_scatter(d),))
_scattered.defvjp(lambda a: (_scatter(a), None), lambda _, d: (_gather(d),))
