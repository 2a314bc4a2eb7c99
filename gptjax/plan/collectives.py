"""What a step sends between devices: the collectives of the scheme, counted.

The products, the look-up and the loss write their collectives out (matmul.py, loss.py), so
what a step sends follows from the shapes. `expected` is that count; plan/compiled.py reads the same
from the compiled program.

Sizes are of one device. A collective's `bytes` are those of the whole array that its group gathers,
sums or exchanges; `wire` is what one device of the group must send: (n-1)/n of it for a gather, a
scatter or an exchange, twice that for a sum everywhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptjax.config import Config, ModelConfig
from gptjax.parallel import mesh, sharding

GATHER, SCATTER, SUM = "all-gather", "reduce-scatter", "all-reduce"
EXCHANGE, SHIFT = "all-to-all", "collective-permute"


@dataclass(frozen=True)
class Collective:
    """Like collectives of a step: of one kind over the same mesh axes, for the same purpose.

    bytes: of one of them; count: in a step; where: "layers" or "outside"; hidden: whether the
    compiler can run it beside arithmetic.
    """

    kind: str
    axes: tuple[str, ...]
    parts: int
    bytes: float
    count: float
    what: str
    where: str = "layers"
    hidden: bool = True

    @property
    def wire(self) -> float:
        """Bytes that one device sends in a step."""
        if self.kind == SHIFT:
            return self.bytes * self.count
        share = (self.parts - 1) / self.parts
        return self.bytes * share * self.count * (2 if self.kind == SUM else 1)


def by_axes(
    collectives: list[Collective],
) -> dict[tuple[str, tuple[str, ...]], tuple[float, float]]:
    """(count, wire bytes) of a step by (kind, mesh axes)."""
    table: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = {}
    for one in collectives:
        key = one.kind, tuple(axis for axis in mesh.AXES if axis in one.axes)
        count, wire = table.get(key, (0.0, 0.0))
        table[key] = count + one.count, wire + one.wire
    return table


_COPIES = ("data", "expert", "context")  # the axes beside fsdp that hold a layer's same weight


@dataclass(frozen=True)
class Passes:
    """How an accumulation step goes through the layers that a device has.

    parts: microbatches of a pipeline, or one. works: how often a device takes up a stretch of its
    layers; ticks: idle turns included, in which it does and sends the same for nothing. layers: of
    a stretch.
    """

    parts: int
    works: int
    ticks: int
    layers: float

    @property
    def runs(self) -> float:
        """How often a device goes through a layer."""
        return self.ticks * self.layers

    @property
    def idle(self) -> float:
        """Share of the ticks in which a device works for nothing."""
        return 1 - self.works / self.ticks


def passes(cfg: Config) -> Passes:
    """As the mesh and the schedule have it; see parallel/pipeline.py."""
    stages, rounds = cfg.mesh.stage, cfg.compute.rounds
    if stages == 1:
        return Passes(1, 1, 1, cfg.model.layers)
    parts = cfg.compute.microbatches or stages
    works, stretch = parts * rounds, cfg.model.layers / stages / rounds
    return Passes(parts, works, works + stages - 1, stretch)


@dataclass(frozen=True)
class _Weight:
    """A weight of a layer, or a table: bytes in the compute dtype after the tensor axis."""

    name: str
    elements: float
    copies: tuple[str, ...]  # axes beside fsdp over which its gradient is summed


def expected(
    cfg: Config, sizes: Mapping[str, int], attention: Sequence[str] = ("splash",)
) -> list[Collective]:
    """The collectives of one optimizer step on a mesh of these sizes by mesh axis.

    `attention` are the backends of the layers of a period.
    """
    return [one for one in _all(cfg, sizes, attention) if one.parts > 1 and one.count and one.bytes]


def _all(cfg: Config, sizes: Mapping[str, int], attention: Sequence[str]) -> Iterator[Collective]:
    m, moe = cfg.model, cfg.model.moe
    width = 2 if cfg.compute.dtype == "bfloat16" else 4
    steps = cfg.train.accumulation
    expert, tensor, stages = sizes["expert"], sizes["tensor"], sizes["stage"]
    groups = math.prod(sizes[axis] for axis in sharding.mesh_axes("tokens"))
    all_tokens = cfg.train.batch_tokens / steps / groups  # a device's rows, before the tensor axis
    split = tensor > 1 and cfg.train.batch_tokens / steps % (groups * tensor) == 0
    through = passes(cfg)
    layers = through.runs
    tokens = all_tokens * stages / through.parts  # those of a microbatch, where there are stages
    rows = tokens * m.embed * width
    gather_rows = GATHER if split else None
    sum_rows = SCATTER if split else SUM

    def over_tensor(kind: str | None, count: float, what: str, where: str = "layers") -> Iterator:
        if kind is not None:
            yield Collective(kind, ("tensor",), tensor, rows, count * steps, what, where)

    # --- weights of the layers: gathered forward and backward, gradients scattered ---
    for weight in _weights(m, tensor, expert):
        whole = weight.elements * width
        # Without remat, the experts' gathered weights are kept for the backward pass.
        times = 1 if weight.name.startswith("experts") and cfg.compute.remat == "none" else 2
        yield from _gathers(whole, times * layers * steps, sizes, weight.name)
        yield from _scatters(whole, layers * steps, sizes, weight.copies, weight.name)

    # --- rows over the tensor axis: into and out of each pair of products ---
    # Attention and the feed-forward. Shared experts sum their own rows, but have those that come in
    # with the other experts.
    pairs, sums = 2, 2 + (m.moe.experts > 0 and m.moe.shared > 0)
    again = {"none": 0, "dots": 0, "block": 1}[cfg.compute.remat]
    yield from over_tensor(gather_rows, 2 * pairs * layers, "rows into products")
    yield from over_tensor(sum_rows, sums * layers, "rows out of products")
    yield from over_tensor(sum_rows, sums * layers, "gradients of rows")
    yield from over_tensor(gather_rows, pairs * layers, "gradients of rows")
    yield from over_tensor(sum_rows, again * (pairs - 1) * layers, "rows, recomputed")
    if split and moe.experts:
        scores = tokens * moe.experts * 4
        count = layers * steps * (1 if cfg.compute.remat == "none" else 2)
        yield Collective(GATHER, ("tensor",), tensor, scores, count, "the router's scores")

    # --- experts: tokens to them and back ---
    if moe.experts and expert > 1:
        yield from _dispatch(cfg, expert, tokens, layers * steps, width)

    # --- rows from stage to stage, and the batch to the first and from the last ---
    if stages > 1:
        share = rows / (tensor if split else 1)
        over_stages = ("stage",), stages
        count = 2 * through.ticks * steps
        yield Collective(SHIFT, *over_stages, share, count, "rows onwards", hidden=False)
        whole = share * through.parts
        for kind in (GATHER, SCATTER):
            yield Collective(kind, *over_stages, whole, 2 * steps, "the batch's rows", "outside")
        rows = all_tokens * m.embed * width
        yield from over_tensor(gather_rows, 4, "rows into and out of the stages", "outside")

    # --- keys and values over the context: round a ring, or of whole sequences for each part ---
    if sizes["context"] > 1:
        rings = attention.count("ring") / len(attention) * layers * steps
        yield from _ring(cfg, sizes, rings, tokens)
        keys = tokens * sizes["context"] * m.kv * m.head / tensor * width
        again = 0 if cfg.compute.remat == "none" else 1
        count = 2 * (layers * steps - rings)
        over = (("context",), sizes["context"], keys)
        yield Collective(GATHER, *over, count * (1 + again), "keys and values")
        yield Collective(SCATTER, *over, count, "gradients of keys and values")

    # --- outside the layers the batch is split over the stages too ---
    tokens, rows = all_tokens, all_tokens * m.embed * width

    # --- the tables, once for each part of the batch; a tied one is gathered once for both uses ---
    table = m.table * m.embed / tensor
    outside = {"where": "outside"}
    for name in ("embedding",) if m.tied_embeddings else ("embedding", "output layer"):
        yield from _gathers(table * width, steps, sizes, name, **outside)
    # Its gradient is scattered for each use, but where there is nothing to scatter summed once.
    once = m.tied_embeddings and all(sizes[axis] == 1 for axis in mesh.FSDP)
    for name in ("embedding",) if once else ("embedding", "output layer"):
        yield from _scatters(table * 4, steps, sizes, ("stage", *_COPIES), name, **outside)
    if tensor > 1:
        yield from over_tensor(sum_rows, 1, "embedded rows", "outside")
        yield from over_tensor(gather_rows, 1, "gradients of embedded rows", "outside")
        yield from over_tensor(gather_rows, 1, "rows into the loss", "outside")
        yield from over_tensor(sum_rows, 1, "gradients of rows from the loss", "outside")
        yield Collective(
            *(SUM, ("tensor",), tensor, 3 * 4 * tokens, steps, "sums over the vocabulary"),
            **outside,
            hidden=False,
        )
    axes = tuple(a for a in sharding.mesh_axes("residual" if split else "tokens") if sizes[a] > 1)
    parts = math.prod(sizes[a] for a in axes)
    if m.positions == "learned":
        places = cfg.train.seq_len * m.embed
        over = tuple(axis for axis in mesh.FSDP if sizes[axis] > 1)
        n = math.prod(sizes[axis] for axis in over)
        yield Collective(GATHER, over, n, places * width, steps, "positions", **outside)
        yield Collective(SUM, axes, parts, places * 4, steps, "positions' gradient", **outside)

    # --- scales and biases: whole everywhere, summed over every device that has rows ---
    small = 2 * m.embed * (2 if m.norm == "layernorm" and m.norm_bias else 1)
    if m.linear_bias:
        small += 2 * m.embed + (m.head * (m.heads + 2 * m.kv) + m.hidden) / tensor
    axes = tuple(axis for axis in axes if axis != "stage")
    parts = math.prod(sizes[a] for a in axes)
    yield Collective(SUM, axes, parts, small * width, layers * steps, "scales and biases")


def _weights(m: ModelConfig, tensor: int, expert: int) -> Iterator[_Weight]:
    """The matrices of one layer, as one device of the tensor and expert axes has them whole."""
    d, c = m.embed, m.head
    yield _Weight("q", d * m.heads * c / tensor, _COPIES)
    yield _Weight("k", d * m.kv * c / tensor, _COPIES)
    yield _Weight("v", d * m.kv * c / tensor, _COPIES)
    yield _Weight("o", d * m.heads * c / tensor, _COPIES)
    names = ("gate", "up", "down") if m.activation == "swiglu" else ("up", "down")
    if not m.moe.experts:
        for name in names:
            yield _Weight(name, d * m.hidden / tensor, _COPIES)
        return
    for name in names:
        experts = m.moe.experts / expert
        yield _Weight(
            f"experts' {name}", experts * d * m.expert_hidden / tensor, ("data", "context")
        )
        if m.moe.shared:
            width = m.moe.shared * m.expert_hidden
            yield _Weight(f"shared {name}", d * width / tensor, _COPIES)


def _gathers(
    whole: float, count: float, sizes: Mapping[str, int], what: str, **more: str
) -> Iterator[Collective]:
    """Ring by ring: over the innermost ring a part, over the outermost the whole."""
    for axis in mesh.FSDP:
        yield Collective(GATHER, (axis,), sizes[axis], whole, count, what, **more)
        whole /= sizes[axis]


def _scatters(
    whole: float,
    count: float,
    sizes: Mapping[str, int],
    copies: tuple[str, ...],
    what: str,
    **more: str,
) -> Iterator[Collective]:
    for axis in mesh.FSDP:
        yield Collective(SCATTER, (axis,), sizes[axis], whole, count, f"{what}'s gradient", **more)
        whole /= sizes[axis]
    axes = tuple(axis for axis in copies if sizes[axis] > 1)
    parts = math.prod(sizes[axis] for axis in axes)
    yield Collective(SUM, axes, parts, whole, count, f"{what}'s gradient", **more)


def _ring(
    cfg: Config, sizes: Mapping[str, int], rings: float, tokens: float
) -> Iterator[Collective]:
    """So many layers' keys and values, a device further at every step in each of their passes."""
    m, context = cfg.model, sizes["context"]
    elements = tokens * m.kv * m.head / sizes["tensor"]
    # What a pass that is recomputed and the backward pass both send first, XLA sends once.
    steps = rings * (2 * (context - 1) if cfg.compute.remat == "none" else 3 * (context - 1) - 1)
    over = (SHIFT, ("context",), context)
    width = 2 if cfg.compute.dtype == "bfloat16" else 4
    yield Collective(*over, elements * width, 2 * steps, "keys and values")
    ids = (cfg.data.documents == "mask") + (m.positions == "alibi")
    yield Collective(*over, tokens * 4, ids * steps, "documents and positions of keys")
    # In float32, and once more, home.
    yield Collective(*over, elements * 4, 2 * rings * context, "gradients of keys and values")


def _dispatch(
    cfg: Config, expert: int, tokens: float, count: float, width: int
) -> Iterator[Collective]:
    m, moe = cfg.model, cfg.model.moe
    again = 0 if cfg.compute.remat == "none" else 1
    if moe.capacity:
        t = cfg.train.seq_len
        places = min(t, -(-int(moe.capacity * moe.top_k * t) // moe.experts))
        buffer = tokens / t * moe.experts * places * m.embed * width
        for what, times in (("to experts", 2 + again), ("from experts", 2 + again)):
            yield Collective(EXCHANGE, ("expert",), expert, buffer, count * times, what)
        return
    group = tokens * expert * m.embed * width
    yield Collective(GATHER, ("expert",), expert, group, count * (2 + again), "tokens to experts")
    yield Collective(SCATTER, ("expert",), expert, group, count * 2, "tokens from experts")
