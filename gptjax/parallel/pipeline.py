"""Pipeline parallelism: the stack cut into stages over the mesh axis "stage".

A batch passes the stages in microbatches. The schedule is interleaved, or circular (Narayanan et
al. 2021): each of S stages has R virtual stages, consecutive layers of the model; the r-th of stage
s is virtual stage r*S + s of R*S. Microbatches pass in groups of S: a microbatch passes all S
stages, comes back to the first for its next round, and after R rounds makes room for the next
group. So stages idle only while the pipeline fills and drains, the bubble: of the
M*R + S - 1 ticks each stage works M*R, and more rounds make a tick, hence the bubble, shorter.

`schedule` gives a stage's work at a tick. `run` executes it as one scan over ticks, manual over the
stage axis alone: inside it, every other axis is as usual. Gradients come from
differentiating the scan: they pass the stages in reverse, on the same schedule.

Shapes: B sequences, b of a microbatch, N tokens, n of a microbatch, T positions, D embed, S stages,
G groups, M = G*S microbatches, R rounds, C = R*S virtual stages.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.parallel import sequence, sharding
from gptjax.parallel.matmul import layout_of

_AXIS = "stage"

# Applies consecutive periods of the stack to one microbatch: (blocks, x_nD, the periods' numbers in
# the model, sequences) to x_nD and sums over tokens, stacked by period, or None.
ApplyPeriods = Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


# --- the schedule --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Sizes of an interleaved schedule. `microbatches` is a multiple of `stages`."""

    stages: int
    microbatches: int
    rounds: int

    @property
    def work_ticks(self) -> int:
        """Ticks in which a stage works, one for each of its rounds of each microbatch."""
        return self.microbatches * self.rounds

    @property
    def ticks(self) -> int:
        """Ticks in all, those of the bubble included."""
        return self.work_ticks + self.stages - 1


class Work(NamedTuple):
    """The work of a stage at a tick. Where it is idle, the numbers are valid but mean nothing."""

    active: Any
    """Whether the stage works."""
    microbatch: Any
    """Number of the microbatch."""
    round: Any
    """Number of the virtual stage among those of this stage."""
    virtual_stage: Any
    """Number of the virtual stage in the model."""


def schedule(tick: Any, stage: Any, sizes: Schedule) -> Work:
    """The work of a stage at a tick. Both are integers, or integer arrays of NumPy or JAX."""
    done = tick - stage  # of this stage's work; below zero while the pipeline fills
    active = (done >= 0) & (done < sizes.work_ticks)
    done = done.clip(0, sizes.work_ticks - 1)
    per_group = sizes.stages * sizes.rounds
    group, within = done // per_group, done % per_group
    round_ = within // sizes.stages
    microbatch = group * sizes.stages + within % sizes.stages
    return Work(active, microbatch, round_, round_ * sizes.stages + stage)


def order(periods: int, rounds: int) -> np.ndarray:
    """Number in the model of each period of the stack, in memory order on the ambient mesh.

    A stage's part of a stacked parameter is contiguous: its virtual stages follow one another.
    """
    stages = sharding.axis_size("layers")
    by_virtual_stage = np.arange(periods).reshape(rounds, stages, -1)
    return by_virtual_stage.swapaxes(0, 1).reshape(-1)


def reordered(blocks: Any, order: Sequence[int]) -> Any:
    """Stacked parameters with their leading axis permuted, and the same sharding."""
    if list(order) == list(range(len(order))):
        return blocks

    def permute(w: jax.Array) -> jax.Array:
        axes = jax.typeof(w).sharding.spec
        return w.at[np.array(order)].get(out_sharding=axes)

    return jax.tree.map(permute, blocks)


# --- the program ---------------------------------------------------------------------------------


def run(
    apply_periods: ApplyPeriods,
    blocks: Any,
    x_ND: jax.Array,
    sequences: Any,
    rounds: int,
    microbatches: int,
) -> tuple[jax.Array, Any]:
    """The stack on x_ND, cut into stages; its parameters are in the order of `order`.

    `sequences` is a tree of arrays [B, ...] that go with the sequences. Returns x_ND, and the sums
    of `apply_periods` over all microbatches, by period in the model's order.
    """
    axis, d = layout_of(x_ND).axis, x_ND.shape[1]
    stages = sharding.axis_size("layers")
    b = len(jax.tree.leaves(sequences)[0])
    periods = len(jax.tree.leaves(blocks)[0])

    x_ND = jax.sharding.reshard(x_ND, sharding.spec("tokens", "embed"))
    x_BTD = sequence.unflatten(x_ND, b, (d,), ("embed",))
    inputs = jax.tree.map(lambda a: _by_stage(a, stages), (x_BTD, sequences))
    sizes = Schedule(stages, microbatches, rounds)
    x_SBTD, sums = jax.shard_map(
        functools.partial(_run_stage, apply_periods, sizes, axis),
        in_specs=(jax.P(_AXIS), jax.P(_AXIS)),
        out_specs=(jax.P(_AXIS), jax.P(_AXIS)),
        axis_names={_AXIS},
        check_vma=False,
    )(blocks, inputs)
    x_BTD = lax.reshape(x_SBTD, x_BTD.shape, out_sharding=sharding.spec("batch", "seq", "embed"))
    x_ND = sequence.flatten_zigzag(x_BTD, "embed")
    model_order = np.argsort(order(periods, rounds))
    sums = jax.tree.map(lambda a: jax.sharding.reshard(a, jax.P())[model_order], sums)
    return jax.sharding.reshard(x_ND, sharding.spec(axis, "embed")), sums


def _by_stage(a_BT: jax.Array, stages: int) -> jax.Array:
    """[B, ...] as [S, B/S, ...]: each stage keeps the sequences that it has."""
    b, *rest = a_BT.shape
    axes = jax.typeof(a_BT).sharding.spec[1:]
    out = jax.P(_AXIS, sharding.spec("microbatch")[0], *axes)
    return lax.reshape(a_BT, (stages, b // stages, *rest), out_sharding=out)


def _run_stage(
    apply_periods: ApplyPeriods, sizes: Schedule, axis: str, blocks: Any, inputs: Any
) -> tuple[jax.Array, Any]:
    """One stage's share of `run`: its scan over ticks.

    Microbatch i of each group consists of sequences that stage i has outside the pipeline.
    """
    groups = sizes.microbatches // sizes.stages
    blocks = jax.tree.map(lambda w: w.reshape(sizes.rounds, -1, *w.shape[1:]), blocks)
    x_GbTD, sequences = jax.tree.map(lambda a: _in_groups(a[0], groups), inputs)
    x_GnD = jax.vmap(functools.partial(_to_tokens, axis=axis))(x_GbTD)
    x_GSnD, sequences = _gathered(x_GnD), jax.tree.map(_gather, sequences)
    by_microbatch = lambda a: a.reshape(sizes.microbatches, *a.shape[2:])
    x_MnD, sequences = jax.tree.map(by_microbatch, (x_GSnD, sequences))

    stage = _Stage(apply_periods, sizes, lax.axis_index(_AXIS), blocks, x_MnD, sequences)
    ticks = jnp.arange(sizes.ticks)
    end, _ = lax.scan(lambda carry, tick: (stage.run_tick(carry, tick), None), stage.start(), ticks)

    out_GSnD = end.out_MnD.reshape(groups, sizes.stages, *end.out_MnD.shape[1:])
    x_GnD = _scattered(out_GSnD)  # zeros except the last stage's, so the sum only sends
    x_GbTD = jax.vmap(functools.partial(_to_sequences, like_bTD=x_GbTD[0]))(x_GnD)
    x_BTD = _from_groups(x_GbTD)
    return x_BTD[None], jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), end.sums)


class _Carry(NamedTuple):
    """State of a stage between ticks.

    x_nD: the activations that the stage before sent. out_MnD: results of the last virtual stage.
    sums: by round and period.
    """

    x_nD: jax.Array
    out_MnD: jax.Array
    sums: Any


@dataclass(frozen=True)
class _Stage:
    """A stage: its blocks [R, periods of a virtual stage, ...], and every microbatch's inputs."""

    apply_periods: ApplyPeriods
    sizes: Schedule
    number: jax.Array
    blocks: Any
    x_MnD: jax.Array
    sequences: Any

    @property
    def periods(self) -> int:
        """Periods of a virtual stage."""
        return len(jax.tree.leaves(self.blocks)[0][0])

    def start(self) -> _Carry:
        """The state before the first tick."""
        numbers = jnp.arange(self.periods)
        shapes = jax.eval_shape(
            lambda: self.apply_periods(
                _take(self.blocks, 0), self.x_MnD[0], numbers, _take(self.sequences, 0)
            )[1]
        )
        sums = jax.tree.map(lambda a: jnp.zeros((self.sizes.rounds, *a.shape), a.dtype), shapes)
        return _Carry(jnp.zeros_like(self.x_MnD[0]), jnp.zeros_like(self.x_MnD), sums)

    def run_tick(self, carry: _Carry, tick: jax.Array) -> _Carry:
        """Works on the microbatch that `schedule` gives, and sends its activations on."""
        stages, last_round = self.sizes.stages, self.sizes.rounds - 1
        work = schedule(tick, self.number, self.sizes)
        enters = (self.number == 0) & (work.round == 0)
        x_nD = jnp.where(enters, _take(self.x_MnD, work.microbatch), carry.x_nD)
        y_nD, new = self.apply_periods(
            _take(self.blocks, work.round),
            x_nD,
            work.virtual_stage * self.periods + jnp.arange(self.periods),
            _take(self.sequences, work.microbatch),
        )
        leaves = work.active & (self.number == stages - 1) & (work.round == last_round)
        updated = lax.dynamic_update_index_in_dim(carry.out_MnD, y_nD, work.microbatch, 0)
        out_MnD = jnp.where(leaves, updated, carry.out_MnD)
        add = lambda a, b: a.at[work.round].add(jnp.where(work.active, b, 0))
        sums = jax.tree.map(add, carry.sums, new)
        ring = [(stage, (stage + 1) % stages) for stage in range(stages)]
        return _Carry(lax.ppermute(y_nD, _AXIS, ring), out_MnD, sums)


def _take(tree: Any, index: jax.Array | int) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, False), tree)


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


def _to_tokens(x_bTD: jax.Array, axis: str) -> jax.Array:
    x_nD = sequence.flatten_zigzag(x_bTD, "embed")
    return jax.sharding.reshard(x_nD, sharding.spec(axis, "embed"))


def _to_sequences(x_nD: jax.Array, like_bTD: jax.Array) -> jax.Array:
    b, _, d = like_bTD.shape
    x_nD = jax.sharding.reshard(x_nD, sharding.spec("tokens", "embed"))
    return sequence.unflatten(x_nD, b, (d,), ("embed",))


# --- collectives over the stages ---------------------------------------------------------------
# Each is manual over all axes and the other's gradient, because JAX 0.12 loses track of explicit
# axes in the transposed program.


def _gather(a_GbT: jax.Array) -> jax.Array:
    """[G, ...] of each stage gathered as [G, S, ...]."""
    first, *rest = jax.typeof(a_GbT).sharding.spec
    return jax.shard_map(
        lambda a: lax.all_gather(a, _AXIS, axis=1),
        in_specs=jax.P(first, *rest),
        out_specs=jax.P(first, None, *rest),
        check_vma=False,
    )(a_GbT)


def _scatter(a_GSbT: jax.Array) -> jax.Array:
    """[G, S, ...] summed over the stages, to each one its [G, ...]."""
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
