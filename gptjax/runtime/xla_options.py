"""XLA's compiler options for a train step by kind of device, each with its reason and source."""

from dataclasses import dataclass

import jax

from gptjax.runtime import hardware
from gptjax.runtime.hardware import Device


@dataclass(frozen=True)
class XlaOption:
    """One compiler option, as jax's `compile` takes it.

    devices: "tpu" (those with a SparseCore), "gpu", or "gpu deterministic", which is for
    `compute.deterministic` alone. since: the first version of JAX whose compiler knows it.
    """

    name: str
    value: str | bool
    devices: str
    reason: str
    source: str
    since: tuple[int, ...] = (0,)


_OFFLOAD = "the SparseCore runs the collective beside arithmetic; without it nothing overlaps"
OPTIONS = (
    *(
        XlaOption(
            f"xla_tpu_enable_sparse_core_collective_offload_{kind}",
            "true",
            "tpu",
            _OFFLOAD,
            "docs/lab_log.md, compiled for v5p, v6e and TPU7x",
        )
        for kind in ("all_gather", "reduce_scatter", "all_reduce")
    ),
    XlaOption(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        "gpu",
        "collectives overlap with arithmetic on an A100 too; from the H100 on they do by default",
        "NVIDIA JAX-Toolbox, GPU_performance.md; docs/gpu.md, compiled for both",
    ),
    XlaOption(
        "xla_gpu_experimental_use_collective_kernels",
        "",
        "gpu",
        "NCCL sums scalars over 64 GPUs; the compiler ends the process where it makes a kernel",
        "docs/lab_log.md, compiled for 8 x 8 H100",
        since=(0, 12),
    ),
    XlaOption(
        "xla_gpu_deterministic_ops",
        True,
        "gpu deterministic",
        "sorts what scatter-adds, asks cuDNN for deterministic kernels, and tunes nothing by time",
        "XLA's debug options; docs/lab_log.md, compiled for an H100",
    ),
    XlaOption(
        "xla_gpu_enable_triton_gemm",
        False,
        "gpu deterministic",
        "Triton's products have no deterministic choice of tiles; cuBLASLt's have",
        "docs/lab_log.md: no program is compiled with them",
    ),
)


def for_device(kind: str, *, deterministic: bool = False) -> dict[str, str | bool]:
    """Compiler options for the train step on devices that JAX names so.

    Those that this JAX's compiler does not know are left out.
    """
    device = hardware.find(kind)
    if device is None:
        return {}
    return {
        option.name: option.value
        for option in OPTIONS
        if option.devices in _groups(device, deterministic) and jax.__version_info__ >= option.since
    }


def _groups(device: Device, deterministic: bool) -> tuple[str, ...]:
    if device.platform == "gpu":
        return ("gpu", "gpu deterministic") if deterministic else ("gpu",)
    return ("tpu",) if device.sparse_core else ()
