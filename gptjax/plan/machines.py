"""The machines that a run can be planned for: slices of a TPU or nodes of GPUs, and their devices.

A machine is named by a device of runtime/hardware.py and a size: v5e:16x16, 2xv5p:8x8x8, h100:64.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gptjax.errors import ConfigError
from gptjax.runtime.hardware import DEVICES, Device

_LARGEST = 1_000_000


@dataclass(frozen=True)
class Machine:
    """Devices of one kind: slices of a torus of `shape` chips, or nodes of `shape[0]` GPUs."""

    name: str
    device: Device
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def data_multiple(self) -> int:
        """A divisor of the data axis, along which slices lie; nodes of GPUs may lie along any."""
        return self.slices if self.device.torus_dims else 1

    @property
    def devices(self) -> int:
        """Number of devices, as JAX counts."""
        return self.slices * self.per_slice

    @property
    def per_slice(self) -> int:
        """Devices that one torus, or one node's switch, connects."""
        return math.prod(self.shape) * self.device.devices_per_chip

    @property
    def chips(self) -> int:
        """Number of chips, which is what is paid for."""
        return self.devices // self.device.devices_per_chip

    @property
    def processes(self) -> int:
        """Number of hosts, each with one process."""
        return self.slices * -(-self.per_slice // self.device.devices_per_host)


def parse(text: str) -> Machine:
    """A machine from its name: v5e:16x16, 2xv5p:8x8x8 (two slices), h100:64.

    Raises ConfigError.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]+\d+[a-z]*(?:-\w+)?):(\d+(?:x\d+)*)", text)
    known = ", ".join(DEVICES)
    if match is None:
        raise _problem(text, f"write v5p:8x8x8, 2xv5e:16x16 (slices) or h100:64; known: {known}")
    slices, name, sizes = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
    if name not in DEVICES:
        raise _problem(text, f"unknown device {name}; known: {known}")
    if not min(sizes) or not slices:
        raise _problem(text, "sizes must be at least 1")
    if max(*sizes, slices) > _LARGEST:
        raise _problem(text, f"sizes must be at most {_LARGEST:,}")
    device = DEVICES[name]
    return (_tpu if device.torus_dims else _gpu)(text, device, sizes, slices)


def _tpu(text: str, device: Device, sizes: tuple[int, ...], slices: int) -> Machine:
    name, dims = device.name, device.torus_dims
    if len(sizes) != dims:
        example = "8x8x8" if dims == 3 else "16x16"
        raise _problem(text, f"a {name} slice has {dims} dimensions, such as {name}:{example}")
    machine = Machine(text, device, sizes, slices)
    if machine.per_slice > device.largest_slice:
        too_large = f"a slice of {machine.per_slice} devices"
        raise _problem(text, f"{too_large}; the largest {name} has {device.largest_slice}")
    return machine


def _gpu(text: str, device: Device, sizes: tuple[int, ...], slices: int) -> Machine:
    if len(sizes) != 1 or slices > 1:
        raise _problem(text, f"the size of GPU machines is a number, such as {device.name}:64")
    node = min(sizes[0], device.devices_per_host)
    if sizes[0] % node:
        raise _problem(text, f"nodes have {node} GPUs; use a multiple of {node}")
    return Machine(text, device, (node,), sizes[0] // node)


def _problem(text: str, what: str) -> ConfigError:
    return ConfigError([f"--machine={text}: {what}"])


@dataclass(frozen=True)
class AbstractDevice:
    """A device that is not there, with the attributes that arranging a mesh reads."""

    id: int
    process_index: int
    slice_index: int
    coords: Sequence[int]
    core_on_chip: int
    platform: str
    device_kind: str


def abstract_devices(machine: Machine) -> list[AbstractDevice]:
    """All devices of a machine, in JAX's order. GPUs have no slices: any axis may cross nodes."""
    device = machine.device
    hosts_per_slice = machine.processes // machine.slices
    found: list[AbstractDevice] = []
    for slice_ in range(machine.slices):
        for within in range(machine.per_slice):
            chip, core = divmod(within, device.devices_per_chip)
            coords = []
            for size in machine.shape:  # the first coordinate runs fastest
                chip, coord = divmod(chip, size)
                coords.append(coord)
            found.append(
                AbstractDevice(
                    id=len(found),
                    process_index=slice_ * hosts_per_slice + within // device.devices_per_host,
                    slice_index=slice_ if device.torus_dims else 0,
                    coords=coords + [0] * (3 - len(coords)),
                    core_on_chip=core,
                    platform=device.platform,
                    device_kind=device.kinds[0],
                )
            )
    return found


def set_environment() -> None:
    """Sets what JAX and libtpu read from the environment when they load, to plan without a TPU."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="true",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5p-8",
    )
