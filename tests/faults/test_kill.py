"""Killed, preempted and damaged runs of real processes resume bit-identically.

These are chosen faults, told in full; soak.py has many more, at random, a minute of them in CI.

Each child is `gptjax train` on a small corpus, with accumulation, dropout, a moving average and
asynchronous saving. Bit-identical means equal fingerprints in the final checkpoints, which cover
parameters, moments, moving average, step, counters and the data order.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from forked import Forked

STEPS = 40
EVERY = 5
OVERRIDES = [
    *("--data.sources", "python-library", "--data.workers", "1"),
    *("--train.tokens", str(STEPS * 1024), "--train.accumulation", "2"),
    *("--train.ema-decay", "0.9", "--model.dropout", "0.1"),
    *("--checkpoint.every", str(EVERY), "--checkpoint.keep", "3", "--log.every", "1"),
    *("--eval.every", "0", "--eval.sample-tokens", "4", "--log.tensorboard", "False"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with a corpus and its prepared store."""
    folder = tmp_path_factory.mktemp("faults")
    text = Path(os.__file__).read_text()
    for part in range(8):
        (folder / f"text{part}.txt").write_text(text[part * 3000 :][:20000])
    return folder


def start(workspace: Path, run: str) -> Forked:
    preset = Path(__file__).parents[2] / "configs" / "debug.py"
    sources = ["--data.sources", "text*.txt", "--data.valid-sources", "text7.txt"]
    words = ["train", str(preset), "--run", run, *OVERRIDES[2:], *sources]
    errors = workspace / f"{run}.{len(list(workspace.glob('*.err')))}.err"
    return Forked(words, workspace, Path(os.devnull), errors)


def finish(workspace: Path, run: str) -> tuple[int, str]:
    """Exit code and standard error of a run to its end."""
    process = start(workspace, run)
    return process.wait(300), process.read()


def logged(workspace: Path, run: str) -> list[int]:
    """Training steps in the metrics file, in file order."""
    file = workspace / run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return [entry["step"] for entry in entries if "grad_norm" in entry]


def wait_for_step(process: Forked, workspace: Path, run: str, step: int) -> None:
    deadline = time.monotonic() + 240
    while not (done := logged(workspace, run)) or done[-1] < step:
        assert process.poll() is None, f"ended early: {process.read()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def outcome(workspace: Path, run: str) -> dict:
    """Metadata of the last checkpoint that must agree between equal runs."""
    meta = json.loads((workspace / run / f"checkpoints/{STEPS}/meta/data.json").read_text())
    return {name: meta[name] for name in ("step", "fingerprints", "data", "tokens_seen", "rng")}


@pytest.fixture(scope="module")
def unbroken(workspace: Path) -> dict:
    code, err = finish(workspace, "unbroken")
    assert code == 0, err
    return outcome(workspace, "unbroken")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_run_killed_at_random_steps_ends_bit_identical(workspace, unbroken) -> None:
    run, draw = "killed", random.Random(1)
    for step in sorted(draw.sample(range(1, STEPS - 1), 2)):
        process = start(workspace, run)
        wait_for_step(process, workspace, run, step)
        process.kill()
        process.wait()
    code, err = finish(workspace, run)
    assert code == 0, err
    assert outcome(workspace, run) == unbroken
    assert logged(workspace, run) == list(range(1, STEPS + 1))  # each step once


@pytest.mark.exhaustive
@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues_bit_identical(workspace, unbroken) -> None:
    process = start(workspace, "stopped")
    wait_for_step(process, workspace, "stopped", 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    last = process.read().strip().splitlines()[-1]
    assert last.startswith("gptjax: told to stop by SIGTERM; saved step ")
    assert "to continue: gptjax train" in last
    saved = int(last.split("saved step ")[1].split(";")[0])
    assert f"last committed step {saved} in" in last
    code, err = finish(workspace, "stopped")
    assert code == 0, err
    assert f"resumed after step {saved} of {STEPS}" in err
    assert outcome(workspace, "stopped") == unbroken


@pytest.mark.exhaustive
@pytest.mark.slow
def test_flipped_bit_in_the_newest_checkpoint_falls_back_to_the_previous(
    workspace, unbroken
) -> None:
    process = start(workspace, "flipped")
    wait_for_step(process, workspace, "flipped", 23)
    process.kill()
    process.wait()
    checkpoints = workspace / "flipped" / "checkpoints"
    steps = sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal())
    data = (p for p in (checkpoints / str(steps[-1]) / "state").rglob("*") if p.is_file())
    file = max(data, key=lambda p: p.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    code, err = finish(workspace, "flipped")
    assert code == 0, err
    assert f"checkpoint {steps[-1]} failed verification" in err
    assert f"resumed after step {steps[-2]} of" in err
    assert outcome(workspace, "flipped") == unbroken


@pytest.mark.slow
def test_second_job_in_the_same_run_folder_is_refused(workspace) -> None:
    first = start(workspace, "shared")
    wait_for_step(first, workspace, "shared", 2)
    first.send_signal(signal.SIGSTOP)  # or it may end before the second has begun
    code, err = finish(workspace, "shared")
    first.send_signal(signal.SIGCONT)
    assert code == 73
    assert "in use by process" in err.strip().splitlines()[-1]
    assert first.wait(240) == 0, first.read()
