"""The plan against the TPU's own compiler: memory, communication, and the order of devices.

Each compiles in a process of its own, so that the TPU's library is never loaded into this one: a
minute or two each. A model's layers are one loop, so that all of them take no longer than two.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="no TPU compiler: pip install 'gptjax[tpu-plan]'",
    ),
]


TOLERANCE = 0.1


def words_of(text):
    preset, *words = text.split()
    return [str(REPO / "configs" / preset), *words, "--compile", "--json"]


@pytest.mark.parametrize(
    "words",
    [
        "llama.py:llama2_7b --machine v5e:16x16 --mesh.fsdp 256 --train.seq-len 2048 "
        "--train.batch-tokens 2097152 --compute.remat block",
        pytest.param(
            "gpt2.py:small --machine v5e:2x2 --mesh.data 4 --train.accumulation 8",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "llama.py:llama3_70b --machine v5p:8x8x8 --mesh.fsdp 512",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "llama.py:llama31_8b --machine v5p:4x4x4 --mesh.fsdp 16 --mesh.context 4 "
            "--train.seq-len 16384 --train.batch-tokens 524288 --model.layers 2",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "mixtral.py:mixtral_8x7b --machine v5p:4x4x8 --mesh.fsdp 16 --mesh.expert 8 "
            "--model.moe.capacity 1.25 --train.accumulation 4",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_compiled_step_has_predicted_memory_and_communication(words) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gptjax", "plan", *words_of(words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    found = plan["compiled"]
    assert plan["fits"]
    assert found["out_of_memory"] is None
    assert plan["memory_total_bytes"] == pytest.approx(found["peak_bytes"], rel=TOLERANCE)
    assert found["warnings"] == []
    sent, predicted = (sum(one["wire_bytes"] for one in of["collectives"]) for of in (found, plan))
    assert predicted == pytest.approx(sent, rel=TOLERANCE)
    if "llama2_7b" in words:  # with reduce-scatters, which wait on a v5e, it is half
        assert found["overlapped_wire_bytes"] > 0.8 * sent


PLACES = """
import json, sys
from gptjax.plan import machines
machines.set_environment()
from gptjax.config import MeshConfig
from gptjax.parallel.mesh import arrange
from gptjax.plan import aot

told = []
for name, mesh in json.loads(sys.argv[1]):
    machine = machines.parse(name)
    both = aot.devices(machine), machines.abstract_devices(machine)
    both = [arrange(MeshConfig(**mesh), devices) for devices in both]
    place = lambda d: [list(d.coords), d.core_on_chip, getattr(d, "slice_index", 0)]
    kind = lambda d: [d.device_kind, d.platform]
    told.append([[a.shape, [place(d) for d in a.flat], kind(a.flat[0])] for a in both])
print(json.dumps(told))
"""


def arranged(meshes):
    """For each (machine, mesh), the arrangements of libtpu's devices and of abstract ones."""
    done = subprocess.run(
        [sys.executable, "-c", PLACES, json.dumps(meshes)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_mesh_of_abstract_devices_is_that_of_real_ones() -> None:
    meshes = [
        ("v5e:2x2", {"data": 4}),
        ("v5e:4x4", {"data": 1, "fsdp": 16}),
        ("v5e:16x16", {"data": 1, "fsdp": 256}),
        ("v5e:16x16", {"data": 4, "fsdp": 16, "tensor": 4}),
        ("2xv5e:4x8", {"data": 4, "fsdp": 16}),
        ("v6e:8x8", {"data": 1, "fsdp": 32, "tensor": 2}),
        ("v5p:8x8x8", {"data": 1, "fsdp": 512}),
        ("v5p:4x4x8", {"data": 1, "fsdp": 16, "expert": 8}),
        ("v5p:4x4x8", {"data": 2, "fsdp": 16, "tensor": 4}),
        ("v7x:4x4x4", {"data": 1, "fsdp": 64, "tensor": 2}),
        ("2xv7x:2x2x2", {"data": 2, "fsdp": 16}),
    ]
    for (name, mesh), (real, planned) in zip(meshes, arranged(meshes), strict=True):
        assert planned == real, (name, mesh)


@pytest.mark.parametrize(
    ("machine", "more"),
    [
        ("v5e:3x5", ("--mesh.data", "15", "--train.batch-tokens", "491520")),  # there is none
        ("v4:2x2x1", ("--mesh.data", "4")),  # libtpu describes its cores singly
    ],
)
def test_machine_unknown_to_libtpu_is_refused_in_a_line(machine, more) -> None:
    preset = str(REPO / "configs" / "gpt2.py:small")
    words = ("--machine", machine, *more)
    done = subprocess.run(
        [sys.executable, "-m", "gptjax", "plan", preset, *words, "--compile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert machine in done.stderr
    assert "Traceback" not in done.stderr
