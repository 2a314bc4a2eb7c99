"""Fixtures: a corpus, and jobs that are killed at the end of a test."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from forked import Forked
from jobs import OPTIONS, ROOT, Job, local


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
    started: list[Forked] = []

    def begin(
        run: str, count: int, *more: str, devices: int = 1, each=None, folders=None, **env: str
    ) -> Job:
        """Starts `count` processes of a run.

        `more` are options of `gptjax train`, or another command and its options; `each(index)`
        returns further options of one process; `folders` are the working directories.
        """
        port = local.free_port()
        processes = []
        for index in range(count):
            train = ("train", str(ROOT / "configs" / "debug.py"), *OPTIONS)
            first = () if more and not more[0].startswith("-") else train
            words = [*first, *more, "--run", run, *(each(index) if each else ())]
            job = local.environment(index, count, port, devices)
            names = [name for name in job if name.startswith("JAX_") and count > 1]
            processes.append(
                Forked(
                    words,
                    folders[index] if folders else workspace,
                    Path(os.devnull),
                    workspace / f"{run}.{len(started)}.{index}.err",
                    faults.install,
                    **env | {name: job[name] for name in [*names, "XLA_FLAGS"]},
                )
            )
        started.extend(processes)
        return Job(processes, workspace / run)

    yield begin
    for process in started:
        process.kill()
        process.wait()
