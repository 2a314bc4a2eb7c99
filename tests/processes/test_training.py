"""Several processes: same losses as one, own rows read only, resume on another layout."""

import json
import signal
from itertools import chain
from pathlib import Path

import pytest
from jobs import STEPS, losses

pytestmark = pytest.mark.slow


def close(one, other) -> bool:
    """Whether the losses of two runs agree at each step of the second."""
    return all(abs(one[step] - loss) <= 1e-5 * abs(loss) for step, loss in other.items())


@pytest.fixture(scope="module")
def notes(workspace) -> Path:
    """Folder in which runs log the windows that they read."""
    for name in ("alone", "two"):
        (workspace / "notes" / name).mkdir(parents=True)
    return workspace / "notes"


@pytest.fixture(scope="module")
def alone(workspace) -> dict[int, float]:
    """Losses of the run with one process and one device."""
    return losses(workspace / "alone")


def test_single_process_baseline(start, workspace, notes) -> None:
    assert start("alone", 1, IDS_FOLDER=str(notes / "alone")).wait() == [0]
    assert sorted(losses(workspace / "alone")) == list(range(1, STEPS + 1))


LAYOUTS = {
    "two": (2, 1, ()),
    "four": (4, 1, ("--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.data", "1")),
}


@pytest.mark.parametrize("name", ["two", pytest.param("four", marks=pytest.mark.exhaustive)])
def test_several_processes_have_the_losses_of_one(start, alone, notes, name) -> None:
    count, devices, options = LAYOUTS[name]
    env = {"IDS_FOLDER": str(notes / name)} if name == "two" else {}
    job = start(name, count, *options, devices=devices, **env)
    assert job.wait() == [0] * count
    assert sorted(losses(job.folder)) == sorted(alone)
    assert close(alone, losses(job.folder))
    assert "compiled in" in job.stderr(0)
    for index in range(1, count):
        assert "compiled in" not in job.stderr(index)
        assert "step" not in job.stderr(index)


def test_several_processes_fine_tune_with_the_losses_of_one(start, alone, workspace) -> None:
    lines = (workspace / "text0.txt").read_text().splitlines()
    texts = [line for line in lines if len(line) > 20][:64]
    examples = [{"text": text[:60], "label": "deep" if text[0] == " " else "top"} for text in texts]
    file = workspace / "labels.jsonl"
    file.write_text("".join(f"{json.dumps(one)}\n" for one in examples))
    files = ("--data", file.name, "--valid", file.name, "--log.every", "1", "--log.tensorboard")
    words = (
        "finetune",
        "alone",
        "--task",
        "classify",
        *files,
        "False",
        "--finetune.lora.rank",
        "4",
    )
    jobs = [start(f"tuned.{count}", count, *words) for count in (1, 2)]
    assert [job.wait() for job in jobs] == [[0], [0, 0]], jobs[1].stderr(0)
    one, two = (losses(job.folder) for job in jobs)
    assert sorted(one) == sorted(two) == list(range(1, 7))
    assert close(one, two)
    assert "trains" in jobs[1].stderr(0)
    assert "trains" not in jobs[1].stderr(1)


def test_several_processes_train_a_growing_batch_and_stages(start) -> None:
    words = (
        *("--train.batch-ramp-tokens", "2048", "--train.batch-start-tokens", "512"),
        *("--train.batch-increment-tokens", "256", "--train.tokens", "8192"),
        *("--stages.main.tokens", "5000", "--stages.long.seq-len", "32"),
        *("--stages.long.batch-tokens", "512", "--stages.long.lr-schedule", "linear"),
    )
    jobs = [start(f"staged.{count}", count, *words, devices=3 - count) for count in (1, 2)]
    assert [job.wait() for job in jobs] == [[0], [0, 0]], jobs[1].stderr(0)
    one, two = (losses(job.folder) for job in jobs)
    assert sorted(one) == sorted(two)
    assert close(one, two)
    assert "stage long begins" in jobs[1].stderr(0)
    assert "stage long begins" not in jobs[1].stderr(1)


def ids_by_step(folder: Path) -> dict[int, list[list[int]]]:
    """Window ids by step and process, from the logs in a folder."""
    read: dict[int, list[list[int]]] = {}
    for file in sorted(folder.iterdir()):
        for line in map(json.loads, file.read_text().splitlines()):
            read.setdefault(line["step"], []).append(line["ids"])
    return read


def test_each_process_reads_only_its_own_sequences(notes) -> None:
    one, two = ids_by_step(notes / "alone"), ids_by_step(notes / "two")
    assert sorted(one) == sorted(two) == list(range(1, STEPS + 1))
    for step, (ids,) in one.items():
        assert sorted(map(len, two[step])) == [8, 8]
        assert sorted(chain(*two[step])) == sorted(ids)


def test_sigterm_saves_all_at_the_same_step_and_another_layout_continues(
    start, alone, notes
) -> None:
    """No window is skipped or trained on twice across the change of layout."""
    stages = [notes / "before", notes / "after"]
    for stage in stages:
        stage.mkdir()
    job = start("elastic", 2, "--mesh.fsdp", "2", FAULT="slow:0:0", IDS_FOLDER=str(stages[0]))
    job.reaches(3)
    job.processes[1].send_signal(signal.SIGTERM)  # one is signalled, both stop
    assert job.wait() == [75, 75]
    assert "to continue" in job.stderr(0)
    stopped = max(losses(job.folder))
    assert stopped < STEPS
    assert (job.folder / "checkpoints" / str(stopped)).is_dir()
    layout = ("--mesh.tensor", "2", "--train.accumulation", "2")
    again = start("elastic", 1, *layout, devices=4, IDS_FOLDER=str(stages[1]))
    assert again.wait() == [0]
    assert f"resumed after step {stopped} of {STEPS}" in again.stderr(0)
    assert sorted(losses(job.folder)) == sorted(alone)
    assert close(alone, losses(job.folder))
    before, after = map(ids_by_step, stages)
    assert sorted(after) == list(range(stopped + 1, STEPS + 1))
    for step, (ids,) in ids_by_step(notes / "alone").items():
        trained = before[step] if step <= stopped else after[step]
        assert sorted(chain(*trained)) == sorted(ids)


@pytest.mark.exhaustive
def test_checkpoint_of_four_processes_is_restored_by_two(start) -> None:
    """Of the run "four" above. Restoring compares fingerprints, so equality is bitwise."""
    job = start("four", 2, "--mesh.fsdp", "2")
    assert job.wait() == [0, 0]
    assert f"resumed after step {STEPS} of {STEPS}" in job.stderr(0)
    assert "failed verification" not in job.stderr(0)
