"""The machines that a run can be planned for: their figures, and how their devices lie.

Figures are those that the vendors publish, of one device as JAX counts them. What a program reaches
of them is another matter, see roofline.py.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device, as JAX counts them.

    kind: its name in JAX. tflops: dense bfloat16 peak. memory: bytes that a program can have.
    hbm: bytes/s. link: bytes/s one way, of one link of the torus, or of all of a GPU's links to its
    node. network: bytes/s one way between slices or nodes, a device's share. rings: dimensions of
    the torus; 0 for a switched node. wraps: a dimension of this many, or a multiple, is a ring;
    shorter ones are lines. node: devices of a host. per_chip: devices of a chip. largest: devices
    of the largest slice.
    """

    kind: str
    tflops: float
    memory: float
    hbm: float
    link: float
    network: float
    rings: int
    wraps: int
    node: int
    per_chip: int = 1
    largest: int = 0

    @property
    def platform(self) -> str:
        """As JAX names it."""
        return "tpu" if self.rings else "gpu"


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: peaks, memory, its bandwidth, slices.
# Memory is what XLA says it has ("of 15.75G hbm") for v5e, v5p, v6e (here, too), v4 and 7x. Links,
# wrapping and network: jax-ml.github.io/scaling-book/tpus (the attainable figures, a tenth below
# those of the documentation); a v7x chip's six links are shared by its two devices.
# GPU: NVIDIA's data sheets as cited by jax-ml.github.io/scaling-book/gpus and glennklockwood.com;
# memory is what nvidia-smi shows; network is one 200 (A100) or 400 Gb/s adapter a GPU.
DEVICES: Mapping[str, Device] = {
    "v4": Device("TPU v4", 275, 30.75 * GIB, 1.2e12, 45e9, 6.25e9, 3, 4, 4, 1, 4096),
    "v5e": Device("TPU v5 lite", 197, 15.75 * GIB, 8.19e11, 45e9, 3.125e9, 2, 16, 4, 1, 256),
    "v5p": Device("TPU v5p", 459, 95.74 * GIB, 2.765e12, 90e9, 6.25e9, 3, 4, 4, 1, 8960),
    "v6e": Device("TPU v6 lite", 918, 31.25 * GIB, 1.638e12, 90e9, 12.5e9, 2, 16, 4, 1, 256),
    "v7x": Device("TPU7x", 1153.5, 94.75 * GIB, 3.69e12, 45e9, 6.25e9, 3, 4, 8, 2, 18432),
    "a100": Device("NVIDIA A100 80GB", 312, 80 * GIB, 2.039e12, 3e11, 2.5e10, 0, 0, 8),
    "h100": Device("NVIDIA H100", 989.4, 79.6 * GIB, 3.35e12, 4.5e11, 5e10, 0, 0, 8),
    "h200": Device("NVIDIA H200", 989.4, 140.4 * GIB, 4.8e12, 4.5e11, 5e10, 0, 0, 8),
    "b200": Device("NVIDIA B200", 2250, 179.1 * GIB, 8e12, 9e11, 5e10, 0, 0, 8),
}


@dataclass(frozen=True)
class Machine:
    """Devices of a kind: slices of a torus of `shape` chips, or so many GPUs."""

    name: str
    device: Device
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def generation(self) -> str:
        """The name in DEVICES."""
        return next(name for name, device in DEVICES.items() if device.kind == self.device.kind)

    @property
    def islands(self) -> int:
        """Slices that the data axis has to run through; a mesh may run through nodes of GPUs."""
        return self.slices if self.device.rings else 1

    @property
    def devices(self) -> int:
        """All of them, as JAX counts."""
        return self.slices * self.per_slice

    @property
    def per_slice(self) -> int:
        """Devices that the torus, or a node's switch, connects."""
        chips = 1
        for size in self.shape:
            chips *= size
        return chips * self.device.per_chip

    @property
    def chips(self) -> int:
        """What is paid for."""
        return self.devices // self.device.per_chip

    @property
    def processes(self) -> int:
        """Hosts, each with a process."""
        return self.slices * -(-self.per_slice // self.device.node)


def parse(text: str) -> Machine:
    """A machine from its name: v5e:16x16, 2xv5p:8x8x8 (two slices), h100:64.

    Raises ConfigError.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]+\d+[a-z]*):(\d+(?:x\d+)*)", text)
    known = ", ".join(DEVICES)
    if match is None:
        raise ConfigError(
            [f"--machine={text}: write v5p:8x8x8, 2xv5e:16x16 (slices) or h100:64; known: {known}"]
        )
    slices, name, sizes = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
    if name not in DEVICES:
        raise ConfigError([f"--machine={text}: no figures for {name}; known: {known}"])
    device = DEVICES[name]
    if not min(sizes) or not slices:
        raise ConfigError([f"--machine={text}: sizes must be at least 1"])
    if device.rings:
        if len(sizes) != device.rings:
            example = "8x8x8" if device.rings == 3 else "16x16"
            raise ConfigError(
                [f"--machine={text}: a {name} has {device.rings} dimensions: {name}:{example}"]
            )
        machine = Machine(text, device, sizes, slices)
        if machine.per_slice > device.largest:
            raise ConfigError(
                [
                    f"--machine={text}: a slice of {machine.per_slice} devices; the largest {name} "
                    f"has {device.largest}"
                ]
            )
        return machine
    if len(sizes) != 1 or slices > 1:
        raise ConfigError([f"--machine={text}: GPUs are a number, such as {name}:64"])
    node = min(sizes[0], device.node)
    if sizes[0] % node:
        raise ConfigError([f"--machine={text}: nodes have {node} GPUs; use a multiple of that"])
    return Machine(text, device, (node,), sizes[0] // node)


@dataclass(frozen=True)
class Place:
    """A device that is not there, with what arranging a mesh asks of one."""

    id: int
    process_index: int
    slice_index: int
    coords: Sequence[int]
    core_on_chip: int
    platform: str
    device_kind: str


def places(machine: Machine) -> list[Any]:
    """Every device of a machine, as far as its place goes. Nodes of GPUs are no slices: a mesh axis
    may run through them.
    """
    device = machine.device
    kind = {"TPU v5p": "TPU v5"}.get(device.kind, device.kind)
    found: list[Any] = []
    for s in range(machine.slices):
        for chip in range(machine.per_slice // device.per_chip):
            coords, rest = [], chip
            for size in machine.shape:  # the first coordinate runs fastest
                coords.append(rest % size)
                rest //= size
            coords += [0] * (3 - len(coords))
            for core in range(device.per_chip):
                n = len(found)
                host = (
                    s * (machine.processes // machine.slices)
                    + (n - s * machine.per_slice) // device.node
                )
                slice_ = s if device.rings else 0
                found.append(Place(n, host, slice_, coords, core, device.platform, kind))
    return found


def environment() -> None:
    """What JAX and libtpu must find in the environment before they are loaded, to plan anywhere."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="true",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5p-8",
    )
