"""What a device holds during a step, by formula.

Parameters and optimizer state come from the real `create_state`, traced on a mesh with no devices.
The rest follows from the shapes, and from what the compiled programs were seen to keep (LOG.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import Config
from gptjax.model import decoder
from gptjax.parallel import mesh, sharding
from gptjax.plan import collectives
from gptjax.training import step


@dataclass(frozen=True)
class Tensor:
    """A tensor of the state: its group, its shape, and the mesh axes of each dimension."""

    path: str
    group: str
    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[tuple[str, ...], ...]

    def piece(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one device's part."""
        return tuple(
            n // math.prod(sizes[axis] for axis in axes)
            for n, axes in zip(self.shape, self.axes, strict=True)
        )

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """Of one device's part."""
        return math.prod(self.piece(sizes)) * self.itemsize


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


def held(
    cfg: Config,
    sizes: Mapping[str, int],
    state: list[Tensor],
    attention: Sequence[str] = ("splash",),
) -> dict[str, float]:
    """Bytes of one device by what they hold, at the step's fullest moment.

    `state` are the `tensors` of the configuration, `attention` the backends of a period's layers.
    """
    groups: dict[str, float] = {}
    for tensor in state:
        groups[tensor.group] = groups.get(tensor.group, 0.0) + tensor.bytes(sizes)
    m, c = cfg.model, cfg.compute
    width = 2 if c.dtype == "bfloat16" else 4
    parameters = groups["parameters"] / 4  # in float32
    parts = math.prod(sizes[axis] for axis in sharding.mesh_axes("tokens"))
    tensor_parts = sizes["tensor"]
    all_tokens = cfg.train.batch_tokens / cfg.train.accumulation / parts
    split = tensor_parts > 1 and all_tokens % tensor_parts == 0
    through = collectives.passes(cfg)
    tokens = all_tokens * sizes["stage"] / through.parts  # of a microbatch, where there are stages
    stream = tokens / (tensor_parts if split else 1) * m.embed * width

    # --- kept from the forward to the backward pass ---
    heads = tokens * m.head * (m.heads + 2 * m.kv) / tensor_parts * width
    matrices = 2 if m.activation == "swiglu" else 1
    # An expert's buffer has places for more than its even share, if it has a capacity.
    routed = m.moe.top_k * max(1.0, m.moe.capacity) if m.moe.experts else 0.0
    active = m.expert_hidden * (routed + m.moe.shared) if m.moe.experts else m.hidden
    hidden = tokens * active / tensor_parts * width
    kept = {"block": stream, "dots": 2 * stream + heads, "none": 18 * stream + 3 * heads}[c.remat]
    if c.remat != "block" and not m.moe.experts:
        kept += matrices * hidden * (2 if c.remat == "none" else 1)
    if c.remat == "none" and m.moe.experts:
        kept += _layer_weights(cfg, sizes) * width
    saved = through.runs * kept
    if sizes["stage"] > 1:  # what each tick begins with, and the batch on its way in and out
        saved += (through.ticks + 2 * through.parts) * stream

    # --- a block's backward pass: what it recomputes, its gradients, weights gathered for it ---
    whole = tokens * m.embed * width
    working = 3 * whole + 2 * heads + (2 * matrices + 1) * hidden
    layer = _layer_weights(cfg, sizes) * width
    keys, sequences = tokens * m.head * m.kv / tensor_parts, 0.0
    if sizes["context"] > 1 and set(attention) == {"ring"}:
        # Keys and values here and coming; their gradients here, coming and being added up, and the
        # queries'.
        sequences = 4 * keys * width + (6 * keys + tokens * m.head * m.heads / tensor_parts) * 4
    elif (context := sizes["context"]) > 1:  # of whole sequences, and in their order
        sequences = 4 * context * keys * width
    block = working + layer + sequences + 2 * routed * whole  # and what goes to experts and back

    # --- the loss: the output layer whole, its gradient, a chunk's logits ---
    tokens, whole = all_tokens, all_tokens * m.embed * width
    table = m.table * m.embed / tensor_parts
    chunk = tokens / c.loss_chunks * m.table / tensor_parts
    loss = table * (width + 4) + chunk * (4 + width) + 2 * whole

    # XLA casts the layers' weights once for all layers, and keeps that for both passes.
    if width < 4:
        groups["weights cast"] = parameters * width
    gradients = parameters * 4
    accumulated = gradients if cfg.train.accumulation > 1 else 0.0
    if gradients + block >= loss:
        groups["gradients"] = accumulated + gradients
        groups["activations kept"], groups["a layer's work"] = saved, block
    else:  # the layers have no gradients yet
        groups["gradients"] = accumulated
        groups["activations kept"], groups["the loss"] = saved, loss
    return groups


def _layer_weights(cfg: Config, sizes: Mapping[str, int]) -> float:
    """Elements of one layer's weights, whole but for the tensor and expert axes."""
    m = cfg.model
    attention = m.embed * m.head * (2 * m.heads + 2 * m.kv)
    matrices = 3 if m.activation == "swiglu" else 2
    mlp = matrices * m.embed * m.hidden
    if m.moe.experts:
        mine = m.moe.experts / sizes["expert"] + m.moe.shared
        mlp = matrices * m.embed * m.expert_hidden * mine
    return (attention + mlp) / sizes["tensor"]
