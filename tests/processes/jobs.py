"""Jobs of several real processes on loopback."""

import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from forked import Forked

ROOT = Path(__file__).parents[2]
STEPS = 24
OPTIONS = [
    *("--data.sources", "text*.txt", "--data.valid-sources", "text7.txt", "--data.store", "store"),
    *("--train.tokens", str(STEPS * 1024), "--checkpoint.every", "8", "--checkpoint.keep", "9"),
    *("--log.every", "1", "--log.tensorboard", "False", "--eval.every", "0"),
    *("--eval.sample-tokens", "4", "--data.prefetch", "1"),
]


def _local() -> ModuleType:
    spec = importlib.util.spec_from_file_location("local", ROOT / "launch" / "local.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


local = _local()  # launch/local.py, which is a script


@dataclass
class Job:
    """The processes of a job, and the run folder."""

    processes: list[Forked]
    folder: Path

    def wait(self, seconds: float = 240) -> list[int]:
        """Waits for all processes; returns their exit codes."""
        return [process.wait(seconds) for process in self.processes]

    def stderr(self, index: int) -> str:
        """The standard error of a process so far."""
        return self.processes[index].read()

    def says(self, index: int, words: str, seconds: float = 240) -> None:
        """Waits until a process has written some words."""
        deadline = time.monotonic() + seconds
        while words not in self.stderr(index):
            assert time.monotonic() < deadline, self.stderr(index)
            assert self.processes[index].poll() is None, self.stderr(index)
            time.sleep(0.05)

    def reaches(self, step: int, seconds: float = 240) -> None:
        """Waits until the metrics of a step have been written."""
        deadline = time.monotonic() + seconds
        while all(line["step"] < step for line in metrics(self.folder)):
            assert time.monotonic() < deadline, self.stderr(0)
            assert all(p.poll() is None for p in self.processes), self.stderr(0)
            time.sleep(0.05)


def metrics(folder: Path) -> list[dict]:
    """The lines of training metrics, after one for step 0."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{"step": 0}, *(line for line in found if "loss" in line)]


def losses(folder: Path) -> dict[int, float]:
    """Loss by step."""
    return {line["step"]: line["loss"] for line in metrics(folder)[1:]}
