"""Communication of a training step between devices: its collectives, counted from the shapes.

The matrix products, the look-up and the loss write their collectives out (parallel/matmul.py,
training/loss.py), so their sizes follow from the shapes. `step_collectives` is that count; aot.py
reads the same from the compiled program.

Sizes are of one device. A collective's `bytes` are those of the whole array that its group gathers,
sums or exchanges; `wire_bytes` are what one device of the group must send: (n-1)/n of the array for
an all-gather, a reduce-scatter or an all-to-all, twice that for an all-reduce.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gptjax.config import Config
from gptjax.model.flops import ModelCost
from gptjax.parallel import mesh, sharding
from gptjax.runtime.hardware import Device

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
ALL_TO_ALL, PERMUTE = "all-to-all", "collective-permute"


@dataclass(frozen=True)
class Collective:
    """Like collectives of a step: of one kind over the same mesh axes, for the same purpose.

    group: devices that take part. bytes: of one of them. count: in a step. where: "layers" or
    "outside". overlapped: whether the compiler can run it beside arithmetic.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: float
    count: float
    purpose: str
    where: str = "layers"
    overlapped: bool = True

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in a step."""
        if self.kind == PERMUTE:
            return self.bytes * self.count
        share = (self.group - 1) / self.group
        return self.bytes * share * self.count * (2 if self.kind == ALL_REDUCE else 1)


def by_axes(
    collectives: Sequence[Collective],
) -> dict[tuple[str, tuple[str, ...]], tuple[float, float]]:
    """(count, wire bytes) of a step by (kind, mesh axes)."""
    table: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = {}
    for one in collectives:
        key = one.kind, tuple(axis for axis in mesh.AXES if axis in one.axes)
        count, wire_bytes = table.get(key, (0.0, 0.0))
        table[key] = count + one.count, wire_bytes + one.wire_bytes
    return table


@dataclass(frozen=True)
class PipelineSchedule:
    """The pipeline's schedule within one accumulation step; see parallel/pipeline.py.

    busy_ticks: ticks in which a device computes, one microbatch in one of its virtual stages each.
    ticks: all, those of the bubble included, in which it computes and sends the same for nothing.
    layers: of a virtual stage. Without a pipeline there is one tick, with all layers.
    """

    microbatches: int
    busy_ticks: int
    ticks: int
    layers: float

    @property
    def layer_runs(self) -> float:
        """Number of times that a device runs a layer, forward."""
        return self.ticks * self.layers

    @property
    def bubble(self) -> float:
        """Share of the ticks in which a device is idle."""
        return 1 - self.busy_ticks / self.ticks


def pipeline_schedule(cfg: Config) -> PipelineSchedule:
    """The schedule that the mesh's stages and the configuration give."""
    stages, rounds = cfg.mesh.stage, cfg.compute.rounds
    if stages == 1:
        return PipelineSchedule(1, 1, 1, cfg.model.layers)
    microbatches = cfg.compute.microbatches or stages
    busy = microbatches * rounds
    return PipelineSchedule(
        microbatches, busy, busy + stages - 1, cfg.model.layers / stages / rounds
    )


@dataclass(frozen=True)
class StepShape:
    """Sizes of one accumulation step on one device, which the planner's formulae share.

    sizes: of the mesh by axis. attention: the backends of the layers of a period. itemsize: bytes
    of the compute dtype. tokens: of a device, before the tensor axis splits them. microbatch: those
    of a pipeline's microbatch; without a pipeline, all. split: whether the tensor axis splits
    tokens between the products (sequence parallelism). ring: whether permutes scatter the gradients
    of weights over the first fsdp axis.
    """

    cfg: Config
    sizes: Mapping[str, int]
    attention: Sequence[str]
    itemsize: int
    tokens: float
    microbatch: float
    split: bool
    ring: bool
    schedule: PipelineSchedule
    cost: ModelCost

    @property
    def layer_runs(self) -> float:
        """Number of times that a device runs a layer forward in a whole step."""
        return self.schedule.layer_runs * self.cfg.train.accumulation

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes anything (remat)."""
        return self.cfg.compute.remat != "none"

    def hidden_state(self, tokens: float) -> float:
        """Bytes of the residual stream of so many tokens."""
        return tokens * self.cfg.model.embed * self.itemsize

    def group(self, axes: Sequence[str]) -> int:
        """Number of devices along mesh axes."""
        return math.prod(self.sizes[axis] for axis in axes)


def step_shape(
    cfg: Config,
    sizes: Mapping[str, int],
    attention: Sequence[str] = ("splash",),
    device: Device | None = None,
) -> StepShape:
    """The shape of a configuration's step on a mesh of these sizes by axis."""
    schedule = pipeline_schedule(cfg)
    groups = math.prod(sizes[axis] for axis in sharding.mesh_axes("tokens"))
    tokens = cfg.train.batch_tokens / cfg.train.accumulation / groups
    # Outside the layers the batch is split over the stages too, within them it is not.
    microbatch = tokens * sizes["stage"] / schedule.microbatches
    ring_tokens = device.ring_tokens if device else 0
    return StepShape(
        cfg,
        sizes,
        attention,
        itemsize=2 if cfg.compute.dtype == "bfloat16" else 4,
        tokens=tokens,
        microbatch=microbatch,
        split=sizes["tensor"] > 1 and tokens % sizes["tensor"] == 0,
        ring=sizes[mesh.FSDP[0]] > 1 and 0 < ring_tokens <= microbatch,
        schedule=schedule,
        cost=ModelCost(cfg.model),
    )


def step_collectives(
    cfg: Config,
    sizes: Mapping[str, int],
    attention: Sequence[str] = ("splash",),
    device: Device | None = None,
) -> list[Collective]:
    """The collectives of one optimizer step on a mesh of these sizes by axis.

    `attention` are the backends of the layers of a period.
    """
    shape = step_shape(cfg, sizes, attention, device)
    parts = (
        _layer_weights,
        _tensor_parallel,
        _expert_parallel,
        _pipeline,
        _context_parallel,
        _embedding_tables,
        _vocabulary_parallel,
        _positions,
        _scales_and_biases,
    )
    found = (one for part in parts for one in part(shape))
    return [one for one in found if one.group > 1 and one.count and one.bytes]


RINGS = frozenset({"ring", "cudnn_ring"})
"""Attention backends that send keys and values round the context axis, rather than gather them."""

_REPLICAS = ("data", "expert", "context")  # the axes besides fsdp along which a weight is the same


def _layer_weights(s: StepShape) -> Iterator[Collective]:
    """FSDP of the layers' weights: gathered forward and backward, their gradients scattered."""
    for weight in s.cost.weights:
        if weight.part == "router":  # small, and no product of parallel/matmul.py
            continue
        experts = weight.part == "experts"
        size = weight.size / (s.sizes["expert"] if experts else 1) / s.sizes["tensor"] * s.itemsize
        # Without remat, the experts' gathered weights are kept for the backward pass.
        gathers = 1 if experts and not s.recomputes else 2
        replicas = ("data", "context") if experts else _REPLICAS
        yield from _all_gathers(s, size, gathers * s.layer_runs, weight.name)
        scatters = _reduce_scatters(s, size, s.layer_runs, replicas, weight.name)
        yield from scatters if experts or not s.ring else map(_around_ring, scatters)


def _around_ring(scatter: Collective) -> Collective:
    """The permutes in place of a scatter over the first fsdp axis; any other as it is."""
    n = scatter.group
    if scatter.axes != mesh.FSDP[:1]:
        return scatter
    return replace(scatter, kind=PERMUTE, bytes=scatter.bytes / n, count=scatter.count * (n - 1))


def _tensor_parallel(s: StepShape) -> Iterator[Collective]:
    """Tokens over the tensor axis, into and out of each pair of products, and the router's scores.

    Attention and the feed-forward are a pair each. Shared experts sum their own output, and share
    their input with the other experts.
    """
    moe = s.cfg.model.moe
    pairs, outputs = 2, 2 + (moe.experts > 0 and moe.shared > 0)
    recomputed = pairs - 1 if s.cfg.compute.remat == "block" else 0
    size, runs = s.hidden_state(s.microbatch), s.layer_runs
    yield from _gather_tokens(s, size, 2 * pairs * runs, "tokens into products")
    yield from _reduce_tokens(s, size, outputs * runs, "tokens out of products")
    yield from _reduce_tokens(s, size, outputs * runs, "gradients of tokens")
    yield from _gather_tokens(s, size, pairs * runs, "gradients of tokens")
    yield from _reduce_tokens(s, size, recomputed * runs, "tokens, recomputed")
    if s.split and moe.experts:
        scores = s.microbatch * moe.experts * 4
        count = runs * (2 if s.recomputes else 1)
        yield _over(s, "tensor", ALL_GATHER, scores, count, "the router's scores")


def _expert_parallel(s: StepShape) -> Iterator[Collective]:
    """Tokens to their experts and back: gathered and scattered, or with a capacity exchanged."""
    m, moe = s.cfg.model, s.cfg.model.moe
    if not moe.experts:
        return
    forward_and_backward, recomputed = 2, int(s.recomputes)
    passes = forward_and_backward + recomputed
    if moe.capacity:
        t = s.cfg.train.seq_len
        places = min(t, -(-int(moe.capacity * moe.top_k * t) // moe.experts))
        buffers = s.microbatch / t * moe.experts * places * m.embed * s.itemsize
        for purpose in ("to experts", "from experts"):
            yield _over(s, "expert", ALL_TO_ALL, buffers, s.layer_runs * passes, purpose)
        return
    group = s.microbatch * s.sizes["expert"] * m.embed * s.itemsize
    yield _over(s, "expert", ALL_GATHER, group, s.layer_runs * passes, "tokens to experts")
    count = s.layer_runs * forward_and_backward
    yield _over(s, "expert", REDUCE_SCATTER, group, count, "tokens from experts")


def _pipeline(s: StepShape) -> Iterator[Collective]:
    """Microbatches from stage to stage, and the batch to the first stage and from the last."""
    if s.sizes["stage"] == 1:
        return
    steps = s.cfg.train.accumulation
    share = s.hidden_state(s.microbatch) / (s.sizes["tensor"] if s.split else 1)
    axes, stages = ("stage",), s.sizes["stage"]
    count = 2 * s.schedule.ticks * steps
    yield Collective(PERMUTE, axes, stages, share, count, "to the next stage", overlapped=False)
    batch = share * s.schedule.microbatches
    for kind in (ALL_GATHER, REDUCE_SCATTER):
        yield Collective(kind, axes, stages, batch, 2 * steps, "the batch", "outside")
    tokens = s.hidden_state(s.tokens)
    yield from _gather_tokens(s, tokens, 4 * steps, "tokens into and out of the stages", "outside")


def _context_parallel(s: StepShape) -> Iterator[Collective]:
    """Keys and values over the context axis: around a ring, or gathered for all queries."""
    rings = sum(name in RINGS for name in s.attention) / len(s.attention) * s.layer_runs
    yield from _ring_attention(s, rings)
    keys = s.microbatch * s.sizes["context"] * s.cost.activations.keys
    keys_bytes = keys / s.sizes["tensor"] * s.itemsize
    count = 2 * (s.layer_runs - rings)
    gathers = count * (1 + s.recomputes)
    yield _over(s, "context", ALL_GATHER, keys_bytes, gathers, "keys and values")
    yield _over(s, "context", REDUCE_SCATTER, keys_bytes, count, "gradients of keys and values")


def _ring_attention(s: StepShape, layers: float) -> Iterator[Collective]:
    """So many layers' keys and values, one device further at every step of each pass."""
    context = s.sizes["context"]
    elements = s.microbatch * s.cost.activations.keys / s.sizes["tensor"]
    # What a pass that is recomputed and the backward pass both send first, XLA sends once.
    recomputed = context - 2 if s.cfg.compute.remat == "block" else 0
    steps = layers * (2 * (context - 1) + recomputed)
    yield _over(s, "context", PERMUTE, elements * s.itemsize, 2 * steps, "keys and values")
    ids = (s.cfg.data.documents == "mask") + (s.cfg.model.positions == "alibi")
    purpose = "documents and positions of keys"
    yield _over(s, "context", PERMUTE, s.microbatch * 4, ids * steps, purpose)
    # In float32, and one step more: back to the device that they belong to.
    count = 2 * layers * context
    yield _over(s, "context", PERMUTE, elements * 4, count, "gradients of keys and values")


def _embedding_tables(s: StepShape) -> Iterator[Collective]:
    """The embedding and output tables, once for each part of the batch."""
    m, steps = s.cfg.model, s.cfg.train.accumulation
    table = m.table * m.embed / s.sizes["tensor"]
    # A tied table is gathered once for both of its uses.
    for name in ("embedding",) if m.tied_embeddings else ("embedding", "output layer"):
        yield from _all_gathers(s, table * s.itemsize, steps, name, "outside")
    # Its gradient is scattered for each use, but where there is nothing to scatter summed once.
    once = m.tied_embeddings and s.group(mesh.FSDP) == 1
    for name in ("embedding",) if once else ("embedding", "output layer"):
        yield from _reduce_scatters(s, table * 4, steps, ("stage", *_REPLICAS), name, "outside")


def _vocabulary_parallel(s: StepShape) -> Iterator[Collective]:
    """The look-up and the loss, whose tables are split over the tensor axis by vocabulary."""
    steps, size = s.cfg.train.accumulation, s.hidden_state(s.tokens)
    yield from _reduce_tokens(s, size, steps, "embedded tokens", "outside")
    yield from _gather_tokens(s, size, steps, "gradients of embedded tokens", "outside")
    yield from _gather_tokens(s, size, steps, "tokens into the loss", "outside")
    yield from _reduce_tokens(s, size, steps, "gradients of tokens from the loss", "outside")
    # Largest logit, sum of exponentials and target's logit of each token, in float32.
    sums = _over(s, "tensor", ALL_REDUCE, 3 * 4 * s.tokens, steps, "sums over the vocabulary")
    yield replace(sums, where="outside", overlapped=False)


def _positions(s: StepShape) -> Iterator[Collective]:
    """Learned positions: gathered over fsdp, their gradient summed over all that have tokens."""
    if s.cfg.model.positions != "learned":
        return
    steps, elements = s.cfg.train.accumulation, s.cfg.train.seq_len * s.cfg.model.embed
    axes = tuple(axis for axis in mesh.FSDP if s.sizes[axis] > 1)
    size, purpose = elements * s.itemsize, "positions"
    yield Collective(ALL_GATHER, axes, s.group(axes), size, steps, purpose, "outside")
    axes = _token_axes(s)
    size, purpose = elements * 4, "positions' gradient"
    yield Collective(ALL_REDUCE, axes, s.group(axes), size, steps, purpose, "outside")


def _scales_and_biases(s: StepShape) -> Iterator[Collective]:
    """Gradients of scales and biases, which every device has whole, over all that have tokens."""
    m, a = s.cfg.model, s.cost.activations
    size: float = 2 * m.embed * (2 if m.norm == "layernorm" and m.norm_bias else 1)
    if m.linear_bias:
        size += 2 * m.embed + (a.qkv + m.hidden) / s.sizes["tensor"]
    axes = tuple(axis for axis in _token_axes(s) if axis != "stage")
    purpose = "scales and biases"
    yield Collective(ALL_REDUCE, axes, s.group(axes), size * s.itemsize, s.layer_runs, purpose)


def _token_axes(s: StepShape) -> tuple[str, ...]:
    """The mesh axes over which tokens are split."""
    axes = sharding.mesh_axes("residual" if s.split else "tokens")
    return tuple(axis for axis in axes if s.sizes[axis] > 1)


def _over(
    s: StepShape, axis: str, kind: str, size: float, count: float, purpose: str
) -> Collective:
    """A collective of the layers over one axis."""
    return Collective(kind, (axis,), s.sizes[axis], size, count, purpose)


def _gather_tokens(
    s: StepShape, size: float, count: float, purpose: str, where: str = "layers"
) -> Iterator[Collective]:
    """Tokens that the tensor axis has split; others are everywhere already."""
    if s.split:
        yield Collective(ALL_GATHER, ("tensor",), s.sizes["tensor"], size, count, purpose, where)


def _reduce_tokens(
    s: StepShape, size: float, count: float, purpose: str, where: str = "layers"
) -> Iterator[Collective]:
    """Partial sums of tokens over the tensor axis, each device keeping its share or all of them."""
    kind = REDUCE_SCATTER if s.split else ALL_REDUCE
    yield Collective(kind, ("tensor",), s.sizes["tensor"], size, count, purpose, where)


def _all_gathers(
    s: StepShape, size: float, count: float, purpose: str, where: str = "layers"
) -> Iterator[Collective]:
    """A weight, ring by ring: over the inner rings a part of it, over the outermost the whole."""
    for axis in mesh.FSDP:
        yield Collective(ALL_GATHER, (axis,), s.sizes[axis], size, count, purpose, where)
        size /= s.sizes[axis]


def _reduce_scatters(
    s: StepShape,
    size: float,
    count: float,
    replicas: tuple[str, ...],
    name: str,
    where: str = "layers",
) -> Iterator[Collective]:
    """A weight's gradient, ring by ring, and the sum of what is left over the weight's replicas."""
    purpose = f"{name}'s gradient"
    for axis in mesh.FSDP:
        yield Collective(REDUCE_SCATTER, (axis,), s.sizes[axis], size, count, purpose, where)
        size /= s.sizes[axis]
    axes = tuple(axis for axis in replicas if s.sizes[axis] > 1)
    yield Collective(ALL_REDUCE, axes, s.group(axes), size, count, purpose, where)
