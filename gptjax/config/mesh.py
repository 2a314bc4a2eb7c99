"""Mesh fields: the number of devices along each axis."""

import math
from dataclasses import dataclass

from gptjax.config.field import free
from gptjax.config.validation import divisors
from gptjax.errors import ConfigError


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices."""

    data: int = free(-1)
    """Data parallelism: number of replicas of the parameters. -1: all remaining devices."""
    fsdp: int = free(1)
    """Fully sharded data parallelism (FSDP): shards of parameters and optimizer state; the batch is
    split over them as well. -1: all remaining devices."""
    expert: int = free(1)
    """Expert parallelism: shards of the experts; the batch is split over them as well. -1: all
    remaining devices."""
    tensor: int = free(1)
    """Tensor parallelism: shards of heads, feed-forward layers and vocabulary. -1: all remaining
    devices."""
    context: int = free(1)
    """Context parallelism: shards of each sequence, for long contexts. -1: all remaining
    devices."""
    stage: int = free(1)
    """Pipeline parallelism: stages of layers; the batch is split over them as well. -1: all
    remaining devices."""
    machine: str = free("")
    """Machine that these sizes are meant for, such as v5p:8x8x8, and that `gptjax plan` plans for.
    Empty: none."""

    def shape(self, devices: int) -> dict[str, int]:
        """Axis sizes by name on `devices` devices. Raises ConfigError if the product differs."""
        sizes = {
            "data": self.data,
            "stage": self.stage,
            "fsdp": self.fsdp,
            "expert": self.expert,
            "context": self.context,
            "tensor": self.tensor,
        }
        problems = [
            f"mesh.{axis}={size}: must be at least 1, or -1 for all remaining devices"
            for axis, size in sizes.items()
            if size < 1 and size != -1
        ]
        remaining = [axis for axis, size in sizes.items() if size == -1]
        if len(remaining) > 1:
            first, second = remaining[:2]
            problems.append(f"mesh.{second}=-1: mesh.{first} is -1 already; give a number")
        if problems:
            raise ConfigError(problems)
        given = math.prod(size for size in sizes.values() if size != -1)
        if remaining and devices % given:
            raise ConfigError(
                [
                    f"mesh.{remaining[0]}=-1: the product of the other axes, {given}, does not "
                    f"divide the {devices} devices; make it one of {divisors(devices)}"
                ]
            )
        sizes = {axis: devices // given if size == -1 else size for axis, size in sizes.items()}
        if math.prod(sizes.values()) != devices:
            product = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
            raise ConfigError(
                [
                    f"mesh: {product} needs {math.prod(sizes.values())} devices, found {devices}; "
                    "set one axis to -1 to use the remaining devices"
                ]
            )
        return sizes
