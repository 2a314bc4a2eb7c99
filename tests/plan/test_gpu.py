"""The plan against XLA's compiler for GPUs, on a machine without one.

Each compiles in a process of its own: half a minute each. A model's layers are one loop.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.errors import ConfigError
from gptjax.kernels import cpu
from gptjax.plan import aot, cudnn_library, gpu_compiler, machines

REPO = Path(__file__).resolve().parents[2]
TOLERANCE = 0.1

INSTALLED = pytest.mark.skipif(
    gpu_compiler._plugin() is None,
    reason="no compiler for GPUs: pip install 'gptjax[gpu-plan]' on Python 3.12",
)


def test_without_the_compiler_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr(gpu_compiler, "_plugin", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install 'gptjax\[gpu-plan\]'"):
        gpu_compiler.devices(machines.parse("h100:8"))


DESCRIBED = b"""\0gpu_device_info {
  cuda_compute_capability { %b }
}
platform_name: "CUDA"
device_description_str: "%b"
\0"""


def test_descriptions_are_read_from_a_library(tmp_path, monkeypatch) -> None:
    library = tmp_path / "plugin.so"
    ours = (b"major: 9", b"NVIDIA H100 80GB HBM3"), (b"major: 12 minor: 1", b"Another")
    library.write_bytes(b"\x7fELF" + b"".join(DESCRIBED % one for one in ours) + b"\xff\0")
    found = gpu_compiler.descriptions(library)
    capabilities = {kind: gpu_compiler._compute_capability(text) for kind, text in found.items()}
    assert capabilities == {"NVIDIA H100 80GB HBM3": (9, 0), "Another": (12, 1)}
    monkeypatch.setattr(gpu_compiler, "_plugin", lambda: library)
    with pytest.raises(ConfigError, match="no description of NVIDIA B200"):
        gpu_compiler.devices(machines.parse("b200:8"))


@pytest.fixture
def cudnn(monkeypatch):
    """Sets the version of cuDNN that is installed, None for none; gives the reason not to ask."""

    def why_not(version: str | None) -> str | None:
        monkeypatch.setattr(cudnn_library, "version", lambda: version)
        cudnn_library.why_not.cache_clear()
        return cudnn_library.why_not()

    yield why_not
    cudnn_library.why_not.cache_clear()


def test_cudnn_is_asked_only_in_versions_that_answer(cudnn, tmp_path, monkeypatch) -> None:
    assert "pip install 'gptjax[gpu-cudnn]'" in cudnn(None)
    monkeypatch.setattr(cudnn_library, "_folder", lambda path: tmp_path)
    assert cudnn("9.28") == "cuDNN 9.28 is installed, of which the compiler can ask 9.23 to 9.26"
    monkeypatch.setattr(cudnn_library, "_loads", lambda name: True)
    assert "cuDNN 9.24 could not be loaded" in cudnn("9.24")


@pytest.mark.skipif(cpu.compiler() is None, reason="no C compiler")
def test_stand_ins_for_absent_libraries_return_an_error(tmp_path) -> None:
    text = b"\x7fELF\0cuThing\0cuThingSize\0accuThing\0cu_other\0cuStreams go\0"
    (tmp_path / "libcudnn_one.so.9").write_bytes(text)
    names = cudnn_library._names(tmp_path, rb"cu[A-Z]")
    assert names == {"cuThing", "cuThingSize"}
    known = {"cuThingSize": "int cuThingSize(void) { return 3; }"}
    cudnn_library._load_stub("libgptjax_test.so.1", names, known, 100)
    library = ctypes.CDLL("libgptjax_test.so.1")  # is loaded: found by its name alone
    assert (library.cuThing(), library.cuThingSize()) == (100, 3)


def test_an_attention_that_cudnn_refuses_is_told_in_its_words(monkeypatch) -> None:
    monkeypatch.setattr(cudnn_library, "version", lambda: "9.23")
    message = (
        "INTERNAL: Num hidden_dim should be less in external/xla+/xla/stream_executor/cuda/"
        "cuda_dnn.cc(6979): 'graph_.validate()'\n\tSuspected Python Code Location:"
    )
    assert str(aot._no_graph(message)) == (
        "compute.attention: cuDNN 9.23 has no such attention: Num hidden_dim should be less; "
        "plan for compute.attention=ring, or train with reference"
    )


def plan(*words: str) -> dict:
    command = [sys.executable, "-m", "gptjax", "plan", *words, "--compile", "--json"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


exhaustive = pytest.mark.exhaustive


@INSTALLED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "overlapped"),
    [
        ("gpus:gpt2_small_h100_1", None),
        ("gpus:llama3_8b_h100_8", 0.95),
        # Without an option of xla_options.py, XLA ends the process for a sum over 64 GPUs.
        ("gpus:llama3_70b_h100_64", 0),
        ("gpus:mixtral_8x7b_h100_16", 0.5),
        pytest.param("gpus:gpt2_small_h100_1 --compute.remat none", None, marks=exhaustive),
        pytest.param("gpus:llama3_8b_h100_16", 0.7, marks=exhaustive),
        pytest.param("gpus:llama31_8b_128k_h100_8", 0, marks=exhaustive),
        pytest.param("gpus:llama3_8b_h100_8 --machine a100:8", 0.95, marks=exhaustive),
        pytest.param("gpus:llama3_8b_h100_16 --mesh.data 1 --mesh.fsdp 16", 0.95, marks=exhaustive),
    ],
)
def test_compiled_step_has_predicted_memory_and_communication(words, overlapped) -> None:
    planned = plan(*words.split())
    found = planned["compiled"]
    assert planned["memory_total_bytes"] == pytest.approx(found["peak_bytes"], rel=TOLERANCE)
    sent = sum(one["wire_bytes"] for one in found["collectives"])
    predicted = sum(one["wire_bytes"] for one in planned["collectives"])
    assert predicted == pytest.approx(sent, rel=TOLERANCE)
    if overlapped is not None:
        assert found["overlapped_wire_bytes"] >= overlapped * sent


@INSTALLED
@pytest.mark.slow
def test_jax_falls_back_to_the_cpu_where_only_the_compiler_is_installed() -> None:
    """JAX's own check ends the process where some of CUDA's libraries are there, and no driver."""
    gone = ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    env = {name: value for name, value in os.environ.items() if name not in gone}
    code = "import gptjax, jax; print(jax.devices()[0].platform)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout.split()) == (0, ["cpu"]), done.stderr


@INSTALLED
def test_the_compiler_describes_the_gpus_that_can_be_planned_for() -> None:
    known = gpu_compiler.descriptions(gpu_compiler._plugin())
    gpus = [one for one in machines.DEVICES.values() if one.platform == "gpu"]
    missing = {one.name for one in gpus if not known.keys() & set(one.kinds)}
    assert missing == {"h100-nvl", "gh200", "l40s", "rtx4090", "rtx5090"}  # arithmetic alone
