"""The device program at toy size on a CPU, without the packages that such a machine may lack."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.kernels import cpu

HERE = Path(__file__).resolve().parent
LACKING = ("tensorflow", "tensorflow_datasets", "tyro", "tensorboardX", "pyarrow", "backports.zstd")
PARTS = ("correctness", "train mixture", "decoding", "bits", "trace")


@pytest.mark.slow
def test_every_part_gives_its_figures(tmp_path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    refuse = f"import sys\nsys.modules.update(dict.fromkeys({LACKING!r}))\n"
    (blocked / "sitecustomize.py").write_text(refuse)
    out = tmp_path / "out"
    parts = list(PARTS)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        parts += ["peer decoding"]
    command = [sys.executable, str(HERE / "program.py"), "--toy", "--out", str(out)]
    command += ["--seconds", "900", "--parts", *parts]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(blocked), "XLA_FLAGS": ""}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles faster
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["versions"]["jax"]
    rows = {(row["part"], row["name"]): row for row in results["rows"]}
    assert rows["train mixture", "speed"]["value"] > 0
    assert rows["train mixture", "memory: planned"]["value"] > 0
    assert rows["bits", "deterministic: arrays unlike after a resume"]["ok"]
    assert rows["decoding", "greedy continuations unlike the CPU's, of 4"]["ok"]
    checks = [row for row in rows.values() if row["bound"] is not None]
    backends = 3 if cpu.ready() else 2  # on a CPU, of four models
    assert sum(row["part"] == "correctness" for row in checks) == 4 * backends
    assert any("time in" in name for part, name in rows if part == "trace")


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import sys\nsys.modules['jax'] = None\n")
    out = tmp_path / "out"
    command = [sys.executable, str(HERE / "program.py"), "--toy", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(broken)}
    command += ["--parts", "decoding", "trace"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    ends = json.loads((out / "results.json").read_text())["parts"]
    assert [(end["part"], end["ended"]) for end in ends] == [
        ("decoding", "ended with 1"),
        ("trace", "ended with 1"),
    ]
    assert "import of jax halted" in done.stdout
