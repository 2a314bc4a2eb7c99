"""Fixtures: a corpus, and jobs that are killed at the end of a test."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import CHILD, OPTIONS, ROOT, Job, local


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder with a corpus."""
    folder = tmp_path_factory.mktemp("processes")
    text = Path(os.__file__).read_text()
    for part in range(8):
        (folder / f"text{part}.txt").write_text(text[part * 3000 :][:20000])
    return folder


@pytest.fixture
def start(workspace) -> Iterator[Callable[..., Job]]:
    """Returns a function that starts a job; kills its remaining processes after the test."""
    started: list[subprocess.Popen] = []

    def begin(
        run: str, count: int, *more: str, devices: int = 1, each=None, folders=None, **env: str
    ) -> Job:
        """Starts `count` processes of a run.

        `more` are options of `gptjax train`, or another command and its options; `each(index)`
        returns further options of one process; `folders` are the working directories.
        """
        port = local.free_port()
        errors = [workspace / f"{run}.{len(started)}.{index}.err" for index in range(count)]
        processes = []
        for index in range(count):
            train = ("train", str(ROOT / "configs" / "debug.py"), *OPTIONS)
            first = () if more and not more[0].startswith("-") else train
            command = [*first, *more, "--run", run, *(each(index) if each else ())]
            base = local.environment(index, count, port, devices) if count > 1 else os.environ
            base = {k: v for k, v in base.items() if k != "XLA_FLAGS"} | {
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            }
            with errors[index].open("w") as stream:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(CHILD), *command],
                        cwd=folders[index] if folders else workspace,
                        env=base | env,
                        stdout=subprocess.DEVNULL,
                        stderr=stream,
                    )
                )
        started.extend(processes)
        return Job(processes, errors, workspace / run)

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
