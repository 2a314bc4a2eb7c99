"""The extras of each accelerator resolve to packages, of which nothing is downloaded."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
UV = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")


@pytest.mark.slow
@pytest.mark.skipif(UV is None, reason="no uv")
@pytest.mark.parametrize(
    ("extra", "package"),
    [
        ("cuda13", "jax-cuda13-plugin"),
        ("cuda12", "jax-cuda12-plugin"),
        ("tpu", "libtpu"),
        ("gpu-cudnn", "nvidia-cudnn-cu13"),
    ],
)
def test_an_accelerators_extra_resolves(tmp_path, extra, package) -> None:
    constraints = tmp_path / "constraints.txt"
    text = (REPO / "constraints.txt").read_text()
    # The libtpu that jax requires is not the one that the planner is tested with.
    constraints.write_text(re.sub(r"^libtpu==.*\n", "", text, flags=re.M))
    command = [UV, "pip", "compile", "-q", "pyproject.toml", "--extra", extra]
    command += ["-c", str(constraints), "--python-version", "3.12"]
    command += ["--python-platform", "x86_64-manylinux_2_31", "--no-header"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    if "error sending request" in done.stderr or "Failed to fetch" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", done.stdout, re.M))
    assert f"jax=={pins['jax']} " in f"{text} ".replace("\n", " ")
    assert package in pins
    if package.startswith("jax-"):
        assert pins[package] == pins["jax"]
