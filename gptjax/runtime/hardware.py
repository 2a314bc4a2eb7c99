"""The accelerators that gptjax knows: one table for MFU, the planner and the compiler's options.

Figures are those that the vendors publish, of one device as JAX counts them. The share of them that
a program reaches is another matter, see plan/roofline.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, as JAX counts them.

    name: in gptjax, such as v5e. product: its name to print. kinds: the values of JAX's
    `device_kind` that stand for it, the usual one first. tflops: dense bfloat16 peak in TFLOP/s.
    memory: bytes that a program can use. hbm_bandwidth: bytes/s. link_bandwidth: bytes/s one way,
    of one link of the torus, or of all of a GPU's links within its node. network_bandwidth: bytes/s
    one way between slices or nodes, a device's share. torus_dims: dimensions of the torus; 0 for
    GPUs, which a switch connects. wrap_multiple: a dimension of a multiple of this size is a ring,
    any other a line. devices_per_host, devices_per_chip: as JAX counts. largest_slice: in devices.
    sparse_core: XLA can hand collectives to the SparseCore, which runs them beside arithmetic.
    """

    name: str
    product: str
    kinds: tuple[str, ...]
    tflops: float
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

    @property
    def platform(self) -> str:
        """As JAX names it: tpu or gpu."""
        return "tpu" if self.torus_dims else "gpu"


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
        memory=15.75 * GIB,
        hbm_bandwidth=8.19e11,
        link_bandwidth=45e9,
        network_bandwidth=3.125e9,
        torus_dims=2,
        wrap_multiple=16,
        devices_per_host=4,
        largest_slice=256,
    ),
    Device(
        name="v5p",
        product="TPU v5p",
        kinds=("TPU v5", "TPU v5p"),
        tflops=459,
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


def _gpu(
    name: str, product: str, kind: str, *, tflops: float, memory: float, hbm: float, link: float
) -> Device:
    """A GPU in nodes of eight, each with an adapter of 200 (A100) or 400 Gb/s."""
    return Device(
        name=name,
        product=product,
        kinds=(kind,),
        tflops=tflops,
        memory=memory,
        hbm_bandwidth=hbm,
        link_bandwidth=link,
        network_bandwidth=2.5e10 if name.startswith("a100") else 5e10,
        devices_per_host=8,
    )


# NVIDIA's data sheets, without sparsity, as cited by jax-ml.github.io/scaling-book/gpus and
# glennklockwood.com; memory is what nvidia-smi shows. `link` is NVLink, of an H100 PCIe PCIe 5.0.
_GPUS = (
    _gpu(
        "a100",
        "NVIDIA A100 80GB",
        "NVIDIA A100-SXM4-80GB",
        tflops=312,
        memory=80 * GIB,
        hbm=2.039e12,
        link=3e11,
    ),
    _gpu(
        "a100-40gb",
        "NVIDIA A100 40GB",
        "NVIDIA A100-SXM4-40GB",
        tflops=312,
        memory=40 * GIB,
        hbm=1.555e12,
        link=3e11,
    ),
    _gpu(
        "h100",
        "NVIDIA H100",
        "NVIDIA H100 80GB HBM3",
        tflops=989.4,
        memory=79.6 * GIB,
        hbm=3.35e12,
        link=4.5e11,
    ),
    _gpu(
        "h100-pcie",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 PCIe",
        tflops=756,
        memory=79.6 * GIB,
        hbm=2e12,
        link=6.4e10,
    ),
    _gpu(
        "h200",
        "NVIDIA H200",
        "NVIDIA H200",
        tflops=989.4,
        memory=140.4 * GIB,
        hbm=4.8e12,
        link=4.5e11,
    ),
    _gpu(
        "b200",
        "NVIDIA B200",
        "NVIDIA B200",
        tflops=2250,
        memory=179.1 * GIB,
        hbm=8e12,
        link=9e11,
    ),
)

DEVICES: Mapping[str, Device] = {device.name: device for device in (*_TPUS, *_GPUS)}


def find(device_kind: str) -> Device | None:
    """The device that JAX names so, or None: an unknown device has no peak, not a wrong one."""
    return next((one for one in DEVICES.values() if device_kind in one.kinds), None)
