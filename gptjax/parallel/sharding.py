"""Sharding: the one table from logical axes to mesh axes, and layouts made from it.

Everything runs in explicit-sharding mode: an array's sharding is part of its type, initialisers are
given the sharding of what they make, and so no array ever exists unsharded. The mesh (mesh.py) is
ambient: `mesh.entered_mesh(cfg)` is entered once, by the command that runs.

Logical axes are named beside each parameter and activation; `RULES` alone says where they lie.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.parallel.mesh import FSDP

_COPIES = ("data", *FSDP, "expert")  # axes that sequences are split over, beside the stages

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("stage", *_COPIES),  # sequences
    "microbatch": _COPIES,  # those that are in one stage of the pipeline
    "tokens": ("context", "stage", *_COPIES),  # positions x sequences, flat: see `to_rows`
    "stream": ("context", "stage", *_COPIES, "tensor"),  # the same between products
    "seq": "context",  # positions
    "embed": None,  # the residual stream's width
    "w_embed": FSDP,  # the same width, of a parameter
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "w_mlp": ("tensor", *FSDP),  # the feed-forward's width, of its last matrix: never the minor one
    "experts": "expert",
    "vocab": "tensor",
    "layers": "stage",
}


def spec(*logical: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes.

    Raises ValueError where two dimensions would lie on one mesh axis.
    """
    entries = [None if name is None else entry(name) for name in logical]
    used = [axis for e in entries if e for axis in ((e,) if isinstance(e, str) else e)]
    if len(used) != len(set(used)):
        raise ValueError(f"{logical}: two dimensions on one mesh axis: {entries}")
    return PartitionSpec(*entries)


def entry(logical: str) -> str | tuple[str, ...] | None:
    """What stands for a logical axis in a partition: its mesh axes as RULES has them.

    Inside the pipeline, where each stage is alone with its layers, none lies on the stages' axis.
    """
    axes = RULES[logical]
    if not axes or "stage" not in axes:
        return axes
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("stage") != AxisType.Manual:
        return axes
    return None if isinstance(axes, str) else tuple(axis for axis in axes if axis != "stage")


def axis_size(logical: str) -> int:
    """Parts into which the ambient mesh splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical))


def mesh_axes(logical: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis lies on, outermost first."""
    axes = entry(logical) or ()
    return (axes,) if isinstance(axes, str) else axes


# --- sequences and rows --------------------------------------------------------------------------


# --- parameters ----------------------------------------------------------------------------------


def abstract(function: Callable[..., Any], *args: Any) -> Any:
    """Shapes, dtypes and shardings, on the ambient mesh, of what `function(*args)` would return."""
    mesh = jax.sharding.get_mesh()

    def concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(concrete, jax.eval_shape(function, *args))


def platform() -> str:
    """The platform of the ambient mesh: "cpu", "gpu" or "tpu"; of a mesh with no devices, "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "cpu" if device is None else device.platform


def wide(dtype: Any) -> Any:
    """The element type to ask of a matrix product whose result is wanted in float32.

    Matrix units add up in float32 anyway; XLA:CPU cannot give that out for every shape.
    """
    return dtype if platform() == "cpu" else jnp.float32
