"""The mesh, and the one table from logical axes to mesh axes.

Everything runs in explicit-sharding mode: an array's sharding is part of its type, initialisers are
given the sharding of what they make, and so no array ever exists unsharded. The mesh is ambient:
`jax.set_mesh(make_mesh(...))` is entered once, by the command that runs.

Logical axes are named beside each parameter and activation; `RULES` alone says where they lie.

On a TPU, devices lie on a torus, and XLA scatters (on three rings: gathers, too) along one ring at
a time only; along several it sums whole arrays instead, at twice the bytes. So fsdp is up to three
mesh axes, a ring each: "fsdp", "fsdp_2" and "fsdp_3", of which the last two are of one part where
devices have no coordinates, or need no second ring.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config import MeshConfig
from gptjax.errors import ConfigError

FSDP = ("fsdp", "fsdp_2", "fsdp_3")
AXES = ("data", "stage", *FSDP, "expert", "context", "tensor")
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


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, or those given. Raises ConfigError if the sizes do not fit."""
    arranged = arrange(cfg, jax.devices() if devices is None else devices)
    return Mesh(arranged, AXES, (AxisType.Explicit,) * len(AXES))


def arrange(cfg: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices by their places along AXES; slices of a TPU lie along the data axis.

    Raises ConfigError if the sizes do not fit.
    """
    sizes = cfg.shape(len(devices))
    # XLA numbers the nodes of GPUs as slices too; a mesh axis may cross those.
    tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    if sizes["data"] % slices:
        raise ConfigError(
            [f"mesh.data={sizes['data']}: the {slices} slices lie along it; use a multiple of them"]
        )
    rest = [sizes[axis] for axis in ("expert", "context", "tensor")]
    within = (sizes["data"] // slices, sizes["stage"], sizes["fsdp"], *rest)
    if slices > 1:
        arranged = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        arranged = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    arranged = _boxes(arranged)
    along = rings(arranged[0, 0, :, 0, 0, 0])
    return arranged.reshape(sizes["data"], sizes["stage"], *along, *rest)


def _boxes(arranged: np.ndarray) -> np.ndarray:
    """The same, each line of devices along fsdp in the order of its coordinates: through whole
    rings one after another, where it may have been a snake through them.
    """
    if arranged.flat[0].platform != "tpu":
        return arranged
    lines = np.moveaxis(arranged, 2, -1)
    ordered = np.empty_like(lines)
    for index in np.ndindex(lines.shape[:-1]):
        place = lambda device: (*device.coords, device.core_on_chip)
        ordered[index][:] = sorted(lines[index], key=place)
    return np.moveaxis(ordered, -1, 2)


def rings(line: Sequence[Any]) -> tuple[int, int, int]:
    """Sizes of up to three rings of a torus that a line of devices runs through, outermost first.

    (n, 1, 1) where devices have no coordinates, or where a step along the line moves in more than
    one dimension. Whether the rings are whole is the machine's affair.
    """
    n = len(line)
    if not all(hasattr(device, "coords") for device in line):
        return n, 1, 1
    coordinates = np.array([device.coords for device in line])
    changes = [np.flatnonzero(np.diff(column)) for column in coordinates.T]
    strides = sorted((int(at[0]) + 1 for at in changes if len(at)), reverse=True)
    sizes = tuple(a // b for a, b in zip([n, *strides], strides, strict=False))
    runs = coordinates.reshape(*sizes, -1)
    moving = [i for i, at in enumerate(changes) if len(at)]
    along = [
        {i for i in moving if (np.diff(runs[..., i], axis=axis) != 0).any()}
        for axis in range(len(sizes))
    ]
    if math.prod(sizes) != n or len(sizes) > 3 or any(len(one) != 1 for one in along):
        return n, 1, 1
    return (*sizes, 1, 1, 1)[:3]


def abstract_mesh(**sizes: int) -> AbstractMesh:
    """A mesh with no devices behind it, of one part along every axis that is not given."""
    axes = dict.fromkeys(AXES, 1) | sizes
    return AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Explicit,) * len(axes))


def axis_size(logical: str) -> int:
    """Parts into which the ambient mesh splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical))


def mesh_axes(logical: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis lies on, outermost first."""
    axes = entry(logical) or ()
    return (axes,) if isinstance(axes, str) else axes


# --- sequences and rows --------------------------------------------------------------------------


def places(length: int) -> np.ndarray:
    """The place within its sequence of each position, as they lie over the context axis.

    Of c parts, part i holds the i-th and the i-th last of 2c stretches, so that causal attention is
    the same work for each.
    """
    parts = axis_size("seq")
    if parts == 1:
        return np.arange(length)
    stretches = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([stretches[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


def placed(a_BT: jax.Array) -> jax.Array:
    """Whole sequences [B, T, ...] in the order of `places`: 2c stretches, moved as such."""
    parts = axis_size("seq")
    return _stretches(a_BT, [s for i in range(parts) for s in (i, 2 * parts - 1 - i)])


def in_order(a_BT: jax.Array) -> jax.Array:
    """The inverse of `placed`."""
    parts = axis_size("seq")
    at = [2 * s if s < parts else 2 * (2 * parts - 1 - s) + 1 for s in range(2 * parts)]
    return _stretches(a_BT, at)


def _stretches(a_BT: jax.Array, order: Sequence[int]) -> jax.Array:
    if len(order) == 2:  # of one part: their own order
        return a_BT
    stretches = jnp.split(a_BT, len(order), axis=1)
    return jnp.concatenate([stretches[i] for i in order], axis=1)


def to_rows(a_BT: jax.Array, rows: str = "tokens") -> jax.Array:
    """Sequences [B, T, ...] as rows [N, ...] on the logical axis `rows`: "tokens", or "batch" for
    few positions, which are not split over the context axis.

    Over that axis a row is a position in the order of `places`, with every device's part together.
    """
    b, t, *rest = a_BT.shape
    whole = [None] * len(rest)
    parts = axis_size("seq") if rows == "tokens" else 1
    if parts == 1:
        return lax.reshape(a_BT, (b * t, *rest), out_sharding=spec(rows, *whole))
    a_BcT = lax.reshape(
        placed(a_BT), (b, parts, t // parts, *rest), out_sharding=spec("batch", None, None, *whole)
    )
    a_cBT = jax.sharding.reshard(a_BcT, spec("batch", "seq", None, *whole)).swapaxes(0, 1)
    return lax.reshape(a_cBT, (b * t, *rest), out_sharding=spec(rows, *whole))


def sequences(
    a_NF: jax.Array, b: int, shape: Sequence[int], axes: Sequence[str | None], rows: str = "tokens"
) -> jax.Array:
    """Rows [N, F] as `b` sequences [B, T, *shape], in the order of `places`.

    `axes` are the logical axes of `shape`, into which F is cut.
    """
    n, parts = len(a_NF), axis_size("seq") if rows == "tokens" else 1
    if parts == 1:
        seq = "seq" if rows == "tokens" else None
        return lax.reshape(a_NF, (b, n // b, *shape), out_sharding=spec("batch", seq, *axes))
    a_cBT = lax.reshape(
        a_NF, (parts, b, n // b // parts, *shape), out_sharding=spec("seq", "batch", None, *axes)
    )
    return lax.reshape(
        a_cBT.swapaxes(0, 1), (b, n // b, *shape), out_sharding=spec("batch", "seq", *axes)
    )


def rows_of_sequences(a_BTF: jax.Array, axis: str | None, rows: str = "tokens") -> jax.Array:
    """The inverse of `sequences`: [B, T, ...] in the order of `places` as rows [N, F] on `axis`."""
    b, t = a_BTF.shape[:2]
    parts = axis_size("seq") if rows == "tokens" else 1
    width = math.prod(a_BTF.shape[2:])
    if parts == 1:
        return lax.reshape(a_BTF, (b * t, width), out_sharding=spec(rows, axis))
    a_BcTF = lax.reshape(
        a_BTF, (b, parts, t // parts, width), out_sharding=spec("batch", "seq", None, axis)
    )
    return lax.reshape(a_BcTF.swapaxes(0, 1), (b * t, width), out_sharding=spec(rows, axis))


def natural(a_BT: jax.Array) -> jax.Array:
    """Sequences in the order of `places` in their own order, whole on each device of the axis."""
    return in_order(jax.sharding.reshard(a_BT, spec("batch", *[None] * (a_BT.ndim - 1))))


# --- parameters ----------------------------------------------------------------------------------


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """The middles of 2**16 equally likely stretches of N(0, 1), float32."""
    half = [-NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**15)]
    return np.float32([-x for x in half] + half[::-1])


def normal(std: float) -> Callable[..., jax.Array]:
    """Initialiser: N(0, std**2), bit for bit the same numbers on every mesh.

    Random bits do not depend on the layout (partitionable threefry), but the logarithm that turns
    them into normal numbers does in its last bit, by how a device's share fills vector registers.
    So 16 bits choose one of as many quantiles, made on the host; the largest is 4.2 std.
    """

    def init(key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        out = spec(*axes)
        bits = jax.random.bits(key, shape, jnp.uint16, out_sharding=out)
        return std * jnp.asarray(_normal_quantiles()).at[bits].get(out_sharding=out)

    return init


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float, out: Any) -> jax.Array:
    """Uniform over +-bound, laid out by the partition `out`: 2**16 values, the same on every mesh.

    The integers are exact in float32 and each is rounded once, in the product.
    """
    bits = jax.random.bits(key, shape, jnp.uint16, out_sharding=out)
    return (2 * bits.astype(jnp.float32) - (2**16 - 1)) * jnp.float32(bound / 2**16)


def constant(value: float) -> Callable[..., jax.Array]:
    """Initialiser: one value everywhere."""

    def init(key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        return jnp.full(shape, value, jnp.float32, out_sharding=spec(*axes))

    return init


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


def host_rows(rows: int) -> np.ndarray:
    """This process's rows of a global batch of `rows` on the ambient mesh, ascending, int64."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    slices = [s[0] for s in sharding.addressable_devices_indices_map((rows,)).values()]
    return np.unique(np.concatenate([np.arange(rows)[s] for s in slices]))


def to_host(tree: Any) -> Any:
    """Whole arrays as numpy's, in every process, from wherever their parts lie."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.device_get(_everywhere(tree))


@jax.jit
def _everywhere(tree: Any) -> Any:
    return jax.sharding.reshard(tree, PartitionSpec())


def global_batch(local: Any, rows: int) -> Any:
    """Global arrays [rows, ...] of which the leaves of `local` hold this process's `host_rows`."""
    own = host_rows(rows)

    def make(array: np.ndarray) -> jax.Array:
        axes = spec("batch", *[None] * (array.ndim - 1))
        sharding = NamedSharding(jax.sharding.get_mesh(), axes)
        part = lambda index: array[np.searchsorted(own, np.arange(rows)[index[0]])]
        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

    return jax.tree.map(make, local)
