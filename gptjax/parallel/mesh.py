"""The device mesh: its axes, and how devices are arranged along them.

On a TPU, devices lie on a torus, and XLA scatters (on three rings: gathers, too) along one ring at
a time only; along several it sums whole arrays instead, at twice the bytes. So fsdp is up to three
axes of JAX's mesh, a ring each: "fsdp", "fsdp_2" and "fsdp_3", of which the last two have size 1
where devices have no coordinates, or need no second ring.

To add an axis: a field of `MeshConfig`, an entry of `MESH_AXES`, and the logical axes that it
splits in sharding.RULES.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config import Config, MeshConfig
from gptjax.errors import ConfigError
from gptjax.runtime import compilation_cache, distributed


@dataclass(frozen=True)
class MeshAxis:
    """An axis of the mesh as a configuration names it: a field of `MeshConfig`."""

    name: str
    splits: frozenset[str]
    """Among "sequences", "positions", "parameters", "features", "experts" and "layers"."""
    crosses_slices: bool = False
    """Whether slices of a TPU, joined by a slower network, may lie along it."""
    rings: tuple[str, ...] = ()
    """Names in JAX's mesh where it is several axes there, outermost first."""

    @property
    def jax_names(self) -> tuple[str, ...]:
        """Names of its axes in JAX's mesh."""
        return self.rings or (self.name,)


MESH_AXES = (  # outermost first: devices that are neighbours lie along the last ones
    MeshAxis("data", frozenset({"sequences"}), crosses_slices=True),
    MeshAxis("stage", frozenset({"layers"})),
    MeshAxis("fsdp", frozenset({"sequences", "parameters"}), rings=("fsdp", "fsdp_2", "fsdp_3")),
    MeshAxis("expert", frozenset({"sequences", "experts"})),
    MeshAxis("context", frozenset({"positions"})),
    MeshAxis("tensor", frozenset({"features"})),
)


def axes_splitting(kind: str) -> tuple[str, ...]:
    """Names in JAX's mesh of the axes that split this, outermost first; see `MeshAxis.splits`."""
    return tuple(name for axis in MESH_AXES if kind in axis.splits for name in axis.jax_names)


AXES = tuple(name for axis in MESH_AXES for name in axis.jax_names)
FSDP = axes_splitting("parameters")


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, or those given. Raises ConfigError if the sizes do not fit."""
    arranged = arrange(cfg, jax.devices() if devices is None else devices)
    return Mesh(arranged, AXES, (AxisType.Explicit,) * len(AXES))


def arrange(cfg: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array with a dimension for each of AXES.

    Slices of a TPU lie along the data axis. Raises ConfigError if the sizes do not fit.
    """
    sizes = cfg.shape(len(devices))
    # XLA numbers the nodes of GPUs as slices too; a mesh axis may cross those.
    tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    across = [slices if axis.crosses_slices else 1 for axis in MESH_AXES]
    for axis, parts in zip(MESH_AXES, across, strict=True):
        if sizes[axis.name] % parts:
            raise ConfigError(
                [
                    f"mesh.{axis.name}={sizes[axis.name]}: the {slices} slices lie along it; use a "
                    "multiple of them"
                ]
            )
    within = [sizes[axis.name] // n for axis, n in zip(MESH_AXES, across, strict=True)]
    if slices > 1:
        arranged = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    else:
        arranged = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    arranged = _sort_fsdp(arranged)
    fsdp_line = np.moveaxis(arranged, _FSDP_DIM, -1).reshape(-1, sizes["fsdp"])[0]
    sizes |= dict(zip(FSDP, rings(list(fsdp_line)), strict=True))
    return arranged.reshape([sizes[name] for name in AXES])


_FSDP_DIM = [axis.name for axis in MESH_AXES].index("fsdp")


def _sort_fsdp(arranged: np.ndarray) -> np.ndarray:
    """Each line of devices along fsdp in the order of its coordinates: through whole rings one
    after another, where it may have been a snake through them.
    """
    if arranged.flat[0].platform != "tpu":
        return arranged
    lines = np.moveaxis(arranged, _FSDP_DIM, -1)
    ordered = np.empty_like(lines)
    for index in np.ndindex(lines.shape[:-1]):
        key = lambda device: (*device.coords, device.core_on_chip)
        ordered[index][:] = sorted(lines[index], key=key)
    return np.moveaxis(ordered, -1, _FSDP_DIM)


def rings(line: Sequence[Any]) -> tuple[int, int, int]:
    """Sizes of up to three rings of a torus that a line of devices runs through, outermost first.

    (n, 1, 1) where devices are no TPUs, or where a step along the line moves in more than one
    dimension. Whether the rings close is not checked.
    """
    n = len(line)
    if line[0].platform != "tpu":  # GPUs have coordinates too: their host, and place in it
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
    outer, middle, inner, *_ = (*sizes, 1, 1, 1)
    return outer, middle, inner


def abstract_mesh(**sizes: int) -> AbstractMesh:
    """A mesh without devices, by size of each of AXES; 1 for those that are not given."""
    axes = dict.fromkeys(AXES, 1) | sizes
    return AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Explicit,) * len(axes))


@contextmanager
def entered_mesh(cfg: Config) -> Iterator[None]:
    """Makes the configured mesh over all devices the ambient one, with the compilation cache on.

    With compute.dtype=float32, matrix products are float32 on accelerators too, where the default
    precision is lower.
    """
    compilation_cache.enable_cache(cfg.log.compile_cache)
    exact = cfg.compute.dtype == "float32"
    jax.config.update("jax_default_matmul_precision", "float32" if exact else None)
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        if distributed.several() and mesh.devices.flat[0].platform == "cpu":
            _connect(mesh)
        yield


def _connect(mesh: Mesh) -> None:
    """Connects the processes for every group of devices that a collective can have.

    Gloo connects a group at its first collective, and gives up where a process is 30 s late; here
    all have just met.
    """
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [names for n in range(1, len(axes) + 1) for names in itertools.combinations(axes, n)]
    ones = jax.device_put(np.ones(()), NamedSharding(mesh, PartitionSpec()))
    distributed.barrier()
    for names in groups:
        total = jax.shard_map(
            functools.partial(jax.lax.psum, axis_name=names),
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
        )
        jax.block_until_ready(jax.jit(total)(ones))
