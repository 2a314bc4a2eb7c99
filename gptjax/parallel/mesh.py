"""The device mesh: its axes, and how devices are arranged along them.

On a TPU, devices lie on a torus, and XLA scatters (on three rings: gathers, too) along one ring at
a time only; along several it sums whole arrays instead, at twice the bytes. So fsdp is up to three
mesh axes, a ring each: "fsdp", "fsdp_2" and "fsdp_3", of which the last two are of one part where
devices have no coordinates, or need no second ring.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from gptjax.config import Config, MeshConfig
from gptjax.errors import ConfigError
from gptjax.runtime import compilation_cache

FSDP = ("fsdp", "fsdp_2", "fsdp_3")


AXES = ("data", "stage", *FSDP, "expert", "context", "tensor")


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


@contextmanager
def entered_mesh(cfg: Config) -> Iterator[None]:
    """The configured mesh over all devices as the ambient one, and the compilation cache on.

    With compute.dtype=float32, matrix products are float32 on accelerators too, whose default is
    less.
    """
    compilation_cache.enable_cache(cfg.log.compile_cache)
    exact = cfg.compute.dtype == "float32"
    jax.config.update("jax_default_matmul_precision", "float32" if exact else None)
    with jax.set_mesh(make_mesh(cfg.mesh)):
        yield
