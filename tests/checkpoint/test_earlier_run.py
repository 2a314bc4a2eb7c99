"""A run begun by an earlier commit is resumed with the same bits.

The earlier commit's own code, from the repository's history, trains a run to its end and another to
the middle of it; the code of today resumes the second, and both must end equal. The model has
every kind of saved array: moments, a moving average, and layers in an interleaved pipeline's order.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.checkpoint.checkpointer import Checkpointer

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[2]
EARLIER = "4a5f4f9"  # the last commit before files moved to today's layout
OVERRIDES = [
    *("--data.sources", "text.txt", "--data.valid-sources", "valid.txt", "--data.store", "store"),
    *("--model.layers", "8", "--train.accumulation", "2", "--train.ema-decay", "0.9"),
    *("--model.dropout", "0.1", "--mesh.stage", "2", "--mesh.fsdp", "2", "--compute.rounds", "2"),
    *("--checkpoint.every", "4", "--checkpoint.keep", "9", "--log.every", "1", "--eval.every", "6"),
    *("--eval.sample-tokens", "4", "--log.tensorboard", "False"),
]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """The earlier commit's files."""
    folder = tmp_path_factory.mktemp("earlier")
    archive = subprocess.run(
        ["git", "-C", str(REPO), "archive", EARLIER, "gptjax", "configs"], capture_output=True
    )
    if archive.returncode:
        pytest.skip(f"needs the history of the repository: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def train(source: Path, work: Path, run: str, tokens: int) -> None:
    """Trains, by the code in a folder."""
    command = [sys.executable, "-m", "gptjax", "train", str(source / "configs" / "debug.py")]
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster, and by both alike
        "GPTJAX_NATIVE": "0",  # a kernel adds in another order than XLA
    }
    done = subprocess.run(
        [*command, *OVERRIDES, "--run", run, "--train.tokens", str(tokens)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_run_of_an_earlier_commit_is_resumed_with_the_same_bits(earlier, tmp_path) -> None:
    text = Path(os.__file__).read_text()
    (tmp_path / "text.txt").write_text(text[:30000])
    (tmp_path / "valid.txt").write_text(text[30000:])
    train(earlier, tmp_path, "whole", 12 * 1024)
    checkpointer = Checkpointer(tmp_path / "whole" / "checkpoints")
    assert checkpointer.steps() == [4, 8, 12]
    # The second run is the first, as it was after step 8.
    subprocess.run(["cp", "-r", "whole", "cut"], cwd=tmp_path, check=True)
    subprocess.run(["rm", "-r", "cut/checkpoints/12"], cwd=tmp_path, check=True)
    train(REPO, tmp_path, "cut", 12 * 1024)
    resumed = Checkpointer(tmp_path / "cut" / "checkpoints")
    old, new = checkpointer.meta(12), resumed.meta(12)
    assert len(new["fingerprints"]) > 30
    assert new["fingerprints"] == old["fingerprints"]
    assert new["layers"] == old["layers"]
    for step in (9, 10, 11, 12):
        assert metric(tmp_path / "cut", step) == metric(tmp_path / "whole", step)


def metric(run: Path, step: int) -> str:
    """The loss and the norms that a run logged at a step."""

    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (entry,) = [line for line in lines if line["step"] == step and "grad_norm" in line]
    return repr([entry[name] for name in ("loss", "grad_norm", "param_norm", "lr")])
