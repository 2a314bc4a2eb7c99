"""XLA's compiler for NVIDIA GPUs on a machine that has none.

The wheels of JAX's CUDA plugin (the extra `gpu-plan`) hold the compiler and descriptions of the
GPUs that it knows; no driver and none of CUDA's libraries is needed. Memory and communication of
its programs are real. Their times are not, as products are tuned on a device. With cuDNN's library
(plan/cudnn_library.py) the graphs of its attention are built too; without it, the workspace of the
backward pass is added by formula (plan/memory.py).
"""

import mmap
import os
import re
from pathlib import Path
from typing import Any

from gptjax.errors import ConfigError
from gptjax.plan import cudnn_library
from gptjax.plan.machines import Machine

# CUB's sort would ask a device how much memory it takes.
_NO_CUB = "--xla_gpu_enable_cub_radix_sort=false"
_ASK_CUDNN = "--xla_gpu_cudnn_deviceless_compilation_mode=CUDNN_DEVICELESS_COMPILATION_ALWAYS"
_CUDNN_VERSION = 92300  # 9.23, which JAX 0.12 is built with


def devices(machine: Machine) -> list[Any]:
    """Descriptions of a machine's GPUs, to compile programs for.

    Raises ConfigError where the compiler is not installed or does not know the GPU.
    """
    plugin = _plugin()
    if plugin is None:
        raise ConfigError(
            [
                "--compile, --sampling: need XLA's compiler for GPUs: "
                "pip install 'gptjax[gpu-plan]' (with Python 3.12 or newer)"
            ]
        )
    known = descriptions(plugin)
    text = next((known[kind] for kind in machine.device.kinds if kind in known), None)
    if text is None:
        raise ConfigError(
            [
                f"--compile, --sampling: {machine.name}: the compiler has no description of "
                f"{machine.device.kinds[0]}; leave them away, the arithmetic needs none"
            ]
        )
    from jax.experimental import topologies

    _answer_for_cudnn(_compute_capability(text))
    # Read when the plugin is first used.
    flags = [os.environ.get("XLA_FLAGS", ""), _NO_CUB]
    flags += [] if cudnn_library.why_not() else [_ASK_CUDNN]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    # Slices, hosts, and GPUs of a host.
    topology = f"1x{machine.slices}x{machine.per_slice}"
    found = topologies.get_topology_desc("", "cuda", target_config=text, topology=topology)
    return list(found.devices)


def _plugin() -> Path | None:
    """The compiler's library; None where it is not installed."""
    try:
        import jax_plugins
    except ImportError:
        return None
    folders = [Path(folder) for folder in jax_plugins.__path__]
    return next((so for at in folders for so in at.glob("xla_cuda*/xla_cuda_plugin.so")), None)


def descriptions(plugin: Path) -> dict[str, str]:
    """The GPUs that a plugin's library describes, by JAX's `device_kind`: GpuTargetConfigProto."""
    found: dict[str, str] = {}
    with plugin.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for match in re.finditer(rb"gpu_device_info ?\{", data):
            begin, end = data.rfind(b"\0", 0, match.start()) + 1, data.find(b"\0", match.start())
            text = data[begin:end].decode(errors="replace")
            if name := re.search(r'^device_description_str: "([^"]*)"', text, re.MULTILINE):
                found.setdefault(name[1], text)
    return found


def _compute_capability(description: str) -> tuple[int, int]:
    block = re.search(r"cuda_compute_capability \{([^}]*)\}", description)
    numbers = dict(re.findall(r"(major|minor): (\d+)", block[1] if block else ""))
    return int(numbers.get("major", 0)), int(numbers.get("minor", 0))


def _answer_for_cudnn(capability: tuple[int, int]) -> None:
    """Answers for the GPU what JAX asks of a present one before it traces cuDNN's attention."""
    from jax._src.cudnn import fused_attention_stablehlo as asked

    parse = lambda text: tuple(map(int, text.split(".")))
    asked.check_cudnn_version = lambda: _CUDNN_VERSION
    asked.check_compute_capability = lambda least: capability >= parse(least)
    asked.is_cuda_compute_capability_equal = lambda one: capability == parse(one)
