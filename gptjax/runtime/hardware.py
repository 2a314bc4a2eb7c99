"""The accelerators that gptjax knows: one table for MFU, the planner and the compiler's options.

Figures are those that the vendors publish, of one device as JAX counts them. The share of them that
a program reaches is another matter, see plan/roofline.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

GIB = 2**30


class Target(NamedTuple):
    """What a program is compiled for: the platform ("cpu", "gpu" or "tpu"), and of a GPU its
    compute capability by CUDA, such as (9, 0); None where it is not known.
    """

    platform: str
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, as JAX counts them.

    name: in gptjax, such as v5e. product: its name to print. kinds: the values of JAX's
    `device_kind` that stand for it, the usual one first. tflops: dense bfloat16 peak in TFLOP/s;
    float32_tflops: of products in full float32, which a TPU makes of six in bfloat16.
    memory: bytes that a program can use. hbm_bandwidth: bytes/s. link_bandwidth: bytes/s one way,
    of one link of the torus, or of all of a GPU's links within its node. network_bandwidth: bytes/s
    one way between slices or nodes, a device's share. torus_dims: dimensions of the torus; 0 for
    GPUs, which a switch connects. wrap_multiple: a dimension of a multiple of this size is a ring,
    any other a line. devices_per_host, devices_per_chip: as JAX counts. largest_slice: in devices.
    sparse_core: XLA can hand collectives to the SparseCore, which runs them beside arithmetic.
    ring_tokens: a device's tokens from which gradients of weights are scattered by permutes, which
    run beside arithmetic where a reduce-scatter does not; 0 for never.
    capability: a GPU's compute capability by CUDA.
    """

    name: str
    product: str
    kinds: tuple[str, ...]
    tflops: float
    float32_tflops: float
    memory: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    torus_dims: int = 0
    wrap_multiple: int = 0
    devices_per_host: int
    devices_per_chip: int = 1
    largest_slice: int = 0
    sparse_core: bool = False
    ring_tokens: int = 0
    capability: tuple[int, int] | None = None

    @property
    def target(self) -> Target:
        """What programs for it are compiled for."""
        return Target(self.platform, self.capability)

    @property
    def platform(self) -> str:
        """As JAX names it: tpu or gpu."""
        return "tpu" if self.torus_dims else "gpu"

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products in a dtype, with training's precision."""
        return 1e12 * (self.tflops if dtype == "bfloat16" else self.float32_tflops)


# Peaks, memory, its bandwidth, slices: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}.
# Memory is XLA's own figure ("of 15.75G hbm") for v5e, v5p, v6e (here, too), v4 and 7x. Links,
# wrapping and network: jax-ml.github.io/scaling-book/tpus (the attainable figures, a tenth below
# those of the documentation); a v7x chip's six links are shared by its two devices. On those with
# `sparse_core`, collectives were seen to run beside arithmetic with its options (docs/lab_log.md).
_TPUS = (
    Device(
        name="v4",
        product="TPU v4",
        kinds=("TPU v4",),
        tflops=275,
        float32_tflops=275 / 6,
        memory=30.75 * GIB,
        hbm_bandwidth=1.2e12,
        link_bandwidth=45e9,
        network_bandwidth=6.25e9,
        torus_dims=3,
        wrap_multiple=4,
        devices_per_host=4,
        largest_slice=4096,
    ),
    Device(
        name="v5e",
        product="TPU v5 lite",
        kinds=("TPU v5 lite", "TPU v5e"),
        tflops=197,
        float32_tflops=197 / 6,
        memory=15.75 * GIB,
        hbm_bandwidth=8.19e11,
        link_bandwidth=45e9,
        network_bandwidth=3.125e9,
        torus_dims=2,
        wrap_multiple=16,
        devices_per_host=4,
        largest_slice=256,
        # A permute sends one way what a scatter sends both ways: here the product of so many tokens
        # takes half as long as its result takes one way.
        ring_tokens=2048,
    ),
    Device(
        name="v5p",
        product="TPU v5p",
        kinds=("TPU v5", "TPU v5p"),
        tflops=459,
        float32_tflops=459 / 6,
        memory=95.74 * GIB,
        hbm_bandwidth=2.765e12,
        link_bandwidth=90e9,
        network_bandwidth=6.25e9,
        torus_dims=3,
        wrap_multiple=4,
        devices_per_host=4,
        largest_slice=8960,
        sparse_core=True,
    ),
    Device(
        name="v6e",
        product="TPU v6 lite",
        kinds=("TPU v6 lite", "TPU v6e"),
        tflops=918,
        float32_tflops=918 / 6,
        memory=31.25 * GIB,
        hbm_bandwidth=1.638e12,
        link_bandwidth=90e9,
        network_bandwidth=12.5e9,
        torus_dims=2,
        wrap_multiple=16,
        devices_per_host=4,
        largest_slice=256,
        sparse_core=True,
    ),
    Device(
        name="v7x",
        product="TPU7x",
        kinds=("TPU7x",),
        tflops=1153.5,
        float32_tflops=1153.5 / 6,
        memory=94.75 * GIB,
        hbm_bandwidth=3.69e12,
        link_bandwidth=45e9,
        network_bandwidth=6.25e9,
        torus_dims=3,
        wrap_multiple=4,
        devices_per_host=8,
        devices_per_chip=2,
        largest_slice=18432,
        sparse_core=True,
    ),
)


GPU_MEMORY_FRACTION = 0.92
"""The share of a GPU's memory that JAX's allocator takes for arrays and programs: `import gptjax`
sets XLA_PYTHON_CLIENT_MEM_FRACTION to it, where it is not set, as JAX itself leaves a quarter. The
rest is for CUDA's context, NCCL's buffers and cuBLAS's and cuDNN's own.
"""


def _gpu(
    name: str,
    *kinds: str,
    capability: tuple[int, int],
    tflops: tuple[float, float],
    gib: float,
    hbm: float,
    link: float,
    net: float = 5e10,
    node: int = 8,
) -> Device:
    """A GPU with `gib` of memory in all, in nodes of `node`; tflops in bfloat16 and in float32."""
    return Device(
        name=name,
        product=kinds[0],
        kinds=kinds,
        tflops=tflops[0],
        float32_tflops=tflops[1],
        memory=GPU_MEMORY_FRACTION * gib * GIB,
        hbm_bandwidth=hbm,
        link_bandwidth=link,
        network_bandwidth=net,
        devices_per_host=node,
        capability=capability,
    )


# NVIDIA's data sheets: dense bfloat16 with float32 sums, and float32 without TF32; as cited by
# jax-ml.github.io/scaling-book/gpus and glennklockwood.com for A100 to B200. Memory is what XLA's
# compiler describes of a GPU, or nvidia-smi shows. `link` is NVLink one way or, without it, PCI
# Express 4 (32 GB/s) or 5 (64 GB/s); the adapter has 200 Gb/s a GPU for A100 and 400 otherwise, 100
# for L40S and GeForce.
_GPUS = (
    _gpu(
        "a100",
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        tflops=(312, 19.5),
        gib=79.25,
        hbm=2.039e12,
        link=3e11,
        net=2.5e10,
    ),
    _gpu(
        "a100-40gb",
        "NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        tflops=(312, 19.5),
        gib=39.42,
        hbm=1.555e12,
        link=3e11,
        net=2.5e10,
    ),
    _gpu(
        "a100-pcie",
        "NVIDIA A100 80GB PCIe",
        capability=(8, 0),
        tflops=(312, 19.5),
        gib=79.25,
        hbm=1.935e12,
        link=3.2e10,
        net=2.5e10,
    ),
    _gpu(
        "h100",
        "NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        tflops=(989.4, 66.9),
        gib=79.11,
        hbm=3.35e12,
        link=4.5e11,
    ),
    _gpu(
        "h100-pcie",
        "NVIDIA H100 PCIe",
        capability=(9, 0),
        tflops=(756, 51.2),
        gib=79.11,
        hbm=2e12,
        link=6.4e10,
    ),
    _gpu(
        "h100-nvl",
        "NVIDIA H100 NVL",
        capability=(9, 0),
        tflops=(835, 60.3),
        gib=93.58,
        hbm=3.94e12,
        link=3e11,
        node=2,
    ),
    _gpu(
        "h200",
        "NVIDIA H200",
        "NVIDIA H200 141GB HBM3e",
        capability=(9, 0),
        tflops=(989.4, 66.9),
        gib=140.4,
        hbm=4.8e12,
        link=4.5e11,
    ),
    _gpu(
        "gh200",
        "NVIDIA GH200 480GB",
        capability=(9, 0),
        tflops=(989.4, 66.9),
        gib=95.58,
        hbm=4e12,
        link=4.5e11,
        node=1,
    ),
    _gpu(
        "b200",
        "NVIDIA B200",
        capability=(10, 0),
        tflops=(2250, 80),
        gib=178.36,
        hbm=8e12,
        link=9e11,
    ),
    _gpu(
        "gb200",
        "NVIDIA GB200",
        capability=(10, 0),
        tflops=(2500, 80),
        gib=184.3,
        hbm=8e12,
        link=9e11,
        node=4,
    ),
    _gpu(
        "l40s",
        "NVIDIA L40S",
        capability=(8, 9),
        tflops=(362, 91.6),
        gib=44.99,
        hbm=8.64e11,
        link=3.2e10,
        net=1.25e10,
    ),
    _gpu(
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        tflops=(165.2, 82.6),
        gib=23.99,
        hbm=1.008e12,
        link=3.2e10,
        net=1.25e10,
    ),
    _gpu(
        "b300",
        "NVIDIA B300",
        "NVIDIA B300 SXM6 AC",
        capability=(10, 3),
        tflops=(2250, 75),
        gib=276.62,
        hbm=8e12,
        link=9e11,
        net=1e11,
    ),
    _gpu(
        "gb300",
        "NVIDIA GB300",
        capability=(10, 3),
        tflops=(2500, 80),
        gib=276.62,
        hbm=8e12,
        link=9e11,
        net=1e11,
        node=4,
    ),
    _gpu(
        "a6000",
        "NVIDIA RTX A6000",
        capability=(8, 6),
        tflops=(154.8, 38.7),
        gib=47.53,
        hbm=7.68e11,
        link=3.2e10,
        net=1.25e10,
    ),
    _gpu(
        "rtx5090",
        "NVIDIA GeForce RTX 5090",
        capability=(12, 0),
        tflops=(209.5, 104.8),
        gib=31.84,
        hbm=1.792e12,
        link=6.4e10,
        net=1.25e10,
    ),
    _gpu(
        "rtxpro6000",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA RTX PRO 6000 Blackwell",
        capability=(12, 0),
        tflops=(503.8, 126),
        gib=94.97,
        hbm=1.792e12,
        link=6.4e10,
        net=1.25e10,
    ),
)

DEVICES: Mapping[str, Device] = {device.name: device for device in (*_TPUS, *_GPUS)}


def find(device_kind: str) -> Device | None:
    """The device that JAX names so, or None: an unknown device has no peak, not a wrong one."""
    return next((one for one in DEVICES.values() if device_kind in one.kinds), None)
