"""Memory use of a training step on one device, by formula.

Parameters and optimizer state come from the real `create_state`, traced on a mesh with no devices.
The rest follows from the shapes, and from the memory that compiled programs were seen to use
(docs/lab_log.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gptjax.config import Config
from gptjax.model import decoder
from gptjax.parallel import mesh
from gptjax.param_tree import leaves_by_path
from gptjax.plan import collectives
from gptjax.plan.collectives import StepShape
from gptjax.runtime.hardware import Device
from gptjax.training import step


@dataclass(frozen=True)
class Tensor:
    """A tensor of the state: its group, its shape, and the mesh axes of each dimension."""

    path: str
    group: str
    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[tuple[str, ...], ...]

    def shard_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one device's shard, on a mesh of these sizes by axis."""
        return tuple(
            n // math.prod(sizes[axis] for axis in axes)
            for n, axes in zip(self.shape, self.axes, strict=True)
        )

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of one device's shard."""
        return math.prod(self.shard_shape(sizes)) * self.itemsize


KEPT_BY_DOTS = frozenset({"cudnn", "splash", "ring", "cudnn_ring"})
"""Attention backends whose output remat=dots keeps, so that their forward pass runs once."""

_GROUPS = {"params": "parameters", "opt_state": "optimizer", "ema": "moving average"}


def tensors(cfg: Config) -> list[Tensor]:
    """Every tensor of the state that training keeps between steps."""

    def leaf(path: str, value: Any) -> Tensor:
        spec = tuple(value.sharding.spec if value.sharding else ()) + (None,) * len(value.shape)
        axes = tuple(
            () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            for entry in spec[: len(value.shape)]
        )
        group = _GROUPS.get(path.split("/")[0], "parameters")
        return Tensor(path, group, value.shape, np.dtype(value.dtype).itemsize, axes)

    # Only a mesh with stages has the layers split over them.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh(stage=cfg.mesh.stage)):
        state = jax.eval_shape(
            lambda: step.create_state(cfg, lambda key: decoder.init(cfg.model, key))
        )
    return [leaf(path, value) for path, value in leaves_by_path(state).items()]


def memory_use(
    cfg: Config,
    sizes: Mapping[str, int],
    state: list[Tensor],
    attention: Sequence[str] = ("splash",),
    device: Device | None = None,
) -> dict[str, float]:
    """Bytes of one device by category, at the step's peak.

    `state` are the `tensors` of the configuration, `attention` the backends of a period's layers.
    """
    use: dict[str, float] = {}
    for tensor in state:
        use[tensor.group] = use.get(tensor.group, 0.0) + tensor.bytes(sizes)
    shape = collectives.step_shape(cfg, sizes, attention, device)
    parameters = use["parameters"] / 4  # in float32
    layer, loss = _layer_workspace(shape), _loss_workspace(shape)
    # XLA casts the layers' weights once for all layers, and keeps that for both passes.
    if shape.itemsize < 4:
        use["cast weights"] = parameters * shape.itemsize
    gradients = parameters * 4
    accumulated = gradients if cfg.train.accumulation > 1 else 0.0
    layers_are_peak = gradients + layer >= loss  # during the loss, layers have no gradients yet
    use["gradients"] = accumulated + (gradients if layers_are_peak else 0.0)
    use["saved activations"] = _saved_activations(shape)
    if "cudnn" in attention and cfg.data.documents == "mask":  # [b, 1, T, T], once for all layers
        use["document mask"] = shape.microbatch * cfg.train.seq_len * shape.itemsize
    use["layer workspace" if layers_are_peak else "loss workspace"] = (
        layer if layers_are_peak else loss
    )
    return use


def cudnn_workspace(s: StepShape, device: Device) -> float:
    """Bytes that cuDNN's backward pass asks for; 0 with other backends.

    As the graphs of cuDNN 9.23 say: float32 gradients of the queries, those of keys and values of
    every query head where heads are grouped, and a sum for each row. On GPUs that are neither
    Hopper nor B200 and its kin, more. With `compute.deterministic`, two bytes for each score of a
    layer in place of the queries' gradients, but on B200 and its kin nothing for them unless heads
    are grouped; nor have wide heads there, which ask for three times as much where grouped.
    """
    if not {"cudnn", "cudnn_ring"} & set(s.attention):
        return 0.0
    m, a, family = s.cfg.model, s.cost.activations, (device.capability or (8, 0))[0]
    grouped = 4 * a.queries * (a.keys < a.queries)
    queries = 4 * a.queries * (1 if family in (9, 10) else 2)
    if family == 10 and m.head > 128:
        grouped, queries = 3 * grouped, 0
    elif family == 10:
        queries *= bool(grouped) or not s.cfg.compute.deterministic
    elif s.cfg.compute.deterministic:
        in_ring = 1 if "cudnn" in s.attention else 2 * s.sizes["context"]
        queries = max(queries, 2 * m.heads * s.cfg.train.seq_len // in_ring)
    return s.microbatch * (queries + grouped + 4 * m.heads) / s.sizes["tensor"]


def _saved_activations(s: StepShape) -> float:
    """Bytes kept from the forward to the backward pass."""
    a, remat, m = s.cost.activations, s.cfg.compute.remat, s.cfg.model
    stream = s.hidden_state(s.microbatch) / (s.sizes["tensor"] if s.split else 1)
    attention_output = _split(s, a.queries)
    if remat == "block":
        layer = stream
    elif remat == "dots":
        layer = 2 * stream + _split(s, a.qkv)
        if KEPT_BY_DOTS & set(s.attention):  # their output, the log-sum-exp of its scores
            padded = -(-m.head // 128) * 128 if "splash" in s.attention else m.head
            layer += _split(s, m.heads * padded) + _split(s, m.heads) / s.itemsize * 4
        layer += 0 if m.moe.experts else a.projections * _split(s, a.hidden)
    else:
        # As compiled programs have it: two norms in float32, and more of them on TPUs.
        layer = (5 if "cudnn" in s.attention else 8.5) * stream + _split(s, a.qkv)
        layer += attention_output + (8 * stream if m.norm == "rmsnorm" else 0)
        layer += (6 if a.projections == 2 else 2) * _split(s, a.routed_hidden)
        if m.moe.experts:
            layer += 6 * a.routed * stream + _gathered_weights(s)
    saved = s.schedule.layer_runs * layer
    if s.sizes["stage"] > 1:  # the input of each tick, and the batch on its way in and out
        saved += (s.schedule.ticks + 2 * s.schedule.microbatches) * stream
    return saved


def _layer_workspace(s: StepShape) -> float:
    """Bytes of one layer's backward pass: recomputed activations, gradients, gathered weights."""
    a, context = s.cost.activations, s.sizes["context"]
    tokens = s.hidden_state(s.microbatch)
    activations = 3 * tokens + 2 * _split(s, a.qkv)
    # Where permutes scatter gradients, their products read from memory what others compute as they
    # need it: the gradients of the projections.
    activations += ((3 if s.ring else 2) * a.projections + 1) * _split(s, a.routed_hidden)
    keys, sequences = s.microbatch * a.keys / s.sizes["tensor"], 0.0
    if context > 1 and set(s.attention) <= collectives.RINGS:
        # Keys and values here and arriving; their gradients here, arriving and being summed, and
        # those of the queries.
        queries = s.microbatch * a.queries / s.sizes["tensor"]
        sequences = 4 * keys * s.itemsize + (6 * keys + queries) * 4
    elif context > 1:  # of whole sequences, and in their order
        sequences = 4 * context * keys * s.itemsize
    routed = 2 * a.routed * tokens  # to the experts and back
    return activations + _gathered_weights(s) + sequences + routed


def _loss_workspace(s: StepShape) -> float:
    """Bytes of the loss: the output table gathered, its gradient, and one chunk's logits."""
    table = s.cfg.model.table / s.sizes["tensor"]
    logits = s.tokens / s.cfg.compute.loss_chunks * table
    tables = table * s.cfg.model.embed * (s.itemsize + 4)
    return tables + logits * (4 + s.itemsize) + 2 * s.hidden_state(s.tokens)


def _split(s: StepShape, width: float) -> float:
    """Bytes of a microbatch's activations of a width that the tensor axis splits."""
    return s.microbatch * width / s.sizes["tensor"] * s.itemsize


def _gathered_weights(s: StepShape) -> float:
    """Bytes of one layer's weights, gathered over fsdp, split over the tensor and expert axes."""
    whole = s.cost.weight_size("attention", "feed-forward", "shared experts")
    experts = s.cost.weight_size("experts") / s.sizes["expert"]
    return (whole + experts) / s.sizes["tensor"] * s.itemsize
