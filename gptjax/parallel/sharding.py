"""Sharding: the table from logical axes to mesh axes, and partitions made from it.

Everything runs in explicit-sharding mode: an array's sharding is part of its type, and initialisers
are given the sharding of their result, so no array ever exists unsharded. The mesh (mesh.py) is
ambient: `mesh.entered_mesh(cfg)` is entered once, by the command that runs.

Logical axes are named beside each parameter and activation; `RULES` maps them to axes of the mesh.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.parallel.mesh import axes_splitting
from gptjax.runtime import hardware
from gptjax.runtime.hardware import Target

_FSDP = axes_splitting("parameters")
_REPLICAS = axes_splitting("sequences")  # without the stages, over which a batch is split as well
_TOKENS = (*axes_splitting("positions"), "stage", *_REPLICAS)

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("stage", *_REPLICAS),  # sequences
    "microbatch": _REPLICAS,  # sequences that are in one stage of the pipeline
    "tokens": _TOKENS,  # positions x sequences, flat: see sequence.py
    "residual": (*_TOKENS, "tensor"),  # tokens of the residual stream, between products
    "seq": "context",  # positions
    "embed": None,  # the residual stream's width
    "w_embed": _FSDP,  # the same width, of a parameter
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "w_mlp": (
        "tensor",
        *_FSDP,
    ),  # the feed-forward's width, of its last matrix: never the minor one
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
    """The entry of a logical axis in a partition: its mesh axes as RULES has them.

    Inside the pipeline, which is manual over the stages' axis, that axis is left out.
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
    """Number of parts into which the ambient mesh splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical))


def mesh_axes(logical: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis, outermost first."""
    axes = entry(logical) or ()
    return (axes,) if isinstance(axes, str) else axes


def abstract(function: Callable[..., Any], *args: Any) -> Any:
    """Shapes, dtypes and shardings on the ambient mesh of the result of `function(*args)`."""
    mesh = jax.sharding.get_mesh()

    def concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(concrete, jax.eval_shape(function, *args))


def platform() -> str:
    """The platform of the ambient mesh: "cpu", "gpu" or "tpu"; "cpu" if it has no devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "cpu" if device is None else device.platform


def target() -> Target:
    """What programs on the ambient mesh are compiled for."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != "gpu":
        return Target(platform())
    if known := hardware.find(device.device_kind):
        return known.target
    if jax.default_backend() != "gpu":
        return Target("gpu")
    here: Any = jax.local_devices()[0]
    numbers = re.fullmatch(r"(\d+)\.(\d+)", str(here.compute_capability))  # of NVIDIA's alone
    return Target("gpu", (int(numbers[1]), int(numbers[2])) if numbers else None)


def ring_tokens() -> int:
    """`hardware.Device.ring_tokens` of the ambient mesh's devices."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    known = None if device is None else hardware.find(device.device_kind)
    return known.ring_tokens if known else 0


def row_major(x: jax.Array) -> jax.Array:
    """The same array; on GPUs, it and its gradient lie in memory in the order of their dimensions.

    Elsewhere XLA's choice of the layout serves.
    """
    if platform() != "gpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def transposed(x: jax.Array, *, left: bool = False) -> jax.Array:
    """x.T, as the left or the right operand of a matrix product."""
    if not copies_transposed(x.dtype, left=left):
        return x.T
    return with_layout_constraint(x.T, Layout((0, 1)))


def copies_transposed(dtype: Any, *, left: bool = False) -> bool:
    """Whether `transposed` copies arrays of a dtype.

    XLA:CPU takes a plain transpose into the product, which is slower then: in bfloat16 for either
    operand, in float32 for the left one, from JAX 0.12 on.
    """
    slower = bool(dtype == jnp.bfloat16) or (left and jax.__version_info__ >= (0, 12))
    return platform() == "cpu" and slower


def kept_form(y: jax.Array) -> jax.Array:
    """The same product, which XLA:CPU then does not turn around.

    It would take a transpose of the result into the product. Of bfloat16 with a float32 result it
    has the product for operands in row-major order alone; turned around, it fails when it runs.
    """
    return with_layout_constraint(y, Layout(tuple(range(y.ndim))))


def wide(dtype: Any) -> Any:
    """The `preferred_element_type` of a matrix product whose result is to be float32.

    Matrix units accumulate in float32 anyway; XLA:CPU does not support it for every shape.
    """
    return dtype if platform() == "cpu" else jnp.float32
