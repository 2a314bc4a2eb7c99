"""The whole main job in a bucket: prepared, trained, killed, resumed, sampled, converted."""

import glob
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Forked, nothing
from servers import Bucket, free_port

from gptjax import bucket as buckets
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.checkpoint.head import Head

pytestmark = pytest.mark.slow

STEPS = 8
ROOT = Path(__file__).parents[2]
Start = Callable[..., list[Forked]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `gptjax train` of a run, in processes that end with the test."""
    started: list[Forked] = []

    def begin(run: str, processes: int, devices: int, bucket: Bucket, *more: str) -> list[Forked]:
        words = ["train", str(ROOT / "configs" / "debug.py"), "--run", run, "--data.workers", "1"]
        words += ["--data.sources", f"{bucket.url}/texts/*.txt"]
        words += ["--data.store", f"{bucket.url}/store", "--train.tokens", str(STEPS * 1024)]
        words += ["--data.cache", str(tmp_path / "cache")]
        words += ["--checkpoint.every", "4", "--log.every", "1", "--eval.every", "0"]
        words += ["--eval.prompts", "--eval.sample-tokens", "4", "--log.compile-cache", ""]
        port, number = free_port(), len(started)
        for index in range(processes):
            job = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
            env = bucket.environment | (job if processes > 1 else {})
            env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
            env["GPTJAX_NATIVE"] = "0"  # kernels are for one process: others' bits differ
            errors = tmp_path / f"{number}.{index}.err"
            started.append(
                Forked([*words, *more], tmp_path, Path(os.devnull), errors, nothing, **env)
            )
        return started[-processes:]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def steps(run: str) -> list[int]:
    return sorted(Head(run).read().checkpoints)


def wait_for(run: str, step: int, processes: list[Forked]) -> None:
    deadline = time.monotonic() + 240
    while step not in steps(run):
        assert all(one.poll() is None for one in processes), processes[0].read()
        assert time.monotonic() < deadline, processes[0].read()
        time.sleep(0.1)


def final(run: str, last: int = STEPS) -> dict[str, list[int]]:
    """The fingerprints of a run that has been trained to its end."""
    checkpoints = Checkpointer(buckets.path_of(run) / "checkpoints")
    assert checkpoints.steps()[-1] == last
    return dict(checkpoints.meta(last)["fingerprints"])


def losses(run: str) -> dict[int, float]:
    lines = (buckets.path_of(run) / "metrics.jsonl").read_text().splitlines()
    return {one["step"]: one["loss"] for one in map(json.loads, lines) if "loss" in one}


def prepare(bucket: Bucket, tmp_path: Path) -> None:
    """Puts text in the bucket, and a store of it."""
    text = Path(os.__file__).read_text()
    for part in range(8):
        path = buckets.path_of(f"{bucket.url}/texts/{part}.txt")
        path.write_text(text[part * 3000 :][:20000])
    words = ["data", "prepare", str(ROOT / "configs" / "debug.py"), "--data.workers", "1"]
    words += ["--data.sources", f"{bucket.url}/texts/*.txt", "--data.store", f"{bucket.url}/store"]
    words += ["--data.cache", str(tmp_path / "cache")]
    errors = tmp_path / "prepare.err"
    done = Forked(words, tmp_path, Path(os.devnull), errors, nothing, **bucket.environment)
    assert done.wait(240) == 0, done.read()


def test_the_whole_job(bucket: Bucket, start: Start, command_line, tmp_path: Path) -> None:
    prepare(bucket, tmp_path)
    alone, broken = f"{bucket.url}/runs/alone", f"{bucket.url}/runs/broken"
    (whole,) = start(alone, 1, 2, bucket)
    assert whole.wait(240) == 0, whole.read()

    pair = start(broken, 2, 1, bucket)
    wait_for(broken, 4, pair)
    for process in pair:
        process.kill()
        process.wait()
    (again,) = start(broken, 1, 2, bucket)
    assert again.wait(240) == 0, again.read()
    assert "resumed after step" in again.read()
    assert "taken over from process" in again.read()
    assert final(broken) == final(alone)
    assert losses(broken) == losses(alone)
    assert sorted(losses(broken)) == list(range(1, STEPS + 1))

    long = (f"{bucket.url}/runs/long", 1, 2, bucket, "--train.tokens", str(1000 * 1024))
    (living,) = start(*long)
    wait_for(long[0], 4, [living])
    (refused,) = start(*long)
    assert refused.wait(240) == 73
    assert f"run={long[0]}: in use by process {living.pid} on" in refused.read()
    living.send_signal(signal.SIGTERM)
    assert living.wait(240) == 75, living.read()
    assert Head(long[0]).read().writer is None

    code, out, err = command_line("inspect", broken)
    assert code == 0, err
    assert f"step {STEPS} of {STEPS}" in out
    assert "in 2 sessions, goodput" in out
    page = (buckets.path_of(broken) / "report.html").read_text()
    assert "work that was lost" in page
    code, out, err = command_line("sample", broken, "--prompt", "def ", "--max-tokens", 4)
    assert code == 0, err
    assert out.startswith("def ")
    hf = f"hf:{bucket.url}/hf"
    assert command_line("convert", alone, hf, "--no-compare")[0] == 0
    code, out, err = command_line("convert", hf, f"{bucket.url}/runs/back", "--no-compare")
    assert code == 0, err
    assert "byte-equal" in out
    code, out, _ = command_line("fsck", f"{bucket.url}/runs/back")
    assert "checkpoint 0: whole" in out
    code, _, err = command_line("convert", alone, hf)
    assert code == 73
    assert f"{bucket.url}/hf: is not empty; give a new folder" in err


def newest_on(disk: Path) -> int:
    names = (Path(path).name for path in glob.glob(str(disk / "*")))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def test_a_machine_that_comes_back_empty_gets_its_part_from_the_other(
    s3_bucket: Bucket, start: Start, tmp_path: Path
) -> None:
    """Two processes with disks of their own, of which one is lost; the bucket has an older step."""
    prepare(s3_bucket, tmp_path)
    whole, broken = f"{s3_bucket.url}/runs/whole", f"{s3_bucket.url}/runs/tiers"
    long = ("--train.tokens", str(2 * STEPS * 1024))
    assert [one.wait(240) for one in start(whole, 2, 1, s3_bucket, *long)] == [0, 0]

    disks = [tmp_path / "disks" / "*" / f"{process}-of-2" for process in (0, 1)]
    every = (*long, "--checkpoint.every", "8", "--checkpoint.local_every", "1")
    every += ("--checkpoint.local", str(tmp_path / "disks"))
    pair = start(broken, 2, 1, s3_bucket, *every)
    deadline = time.monotonic() + 240
    while min(map(newest_on, disks)) < 9:
        assert all(one.poll() is None for one in pair), pair[0].read()
        assert time.monotonic() < deadline, pair[0].read()
        time.sleep(0.01)
    for process in pair:
        process.kill()
        process.wait()
    assert max([0, *steps(broken)]) < newest_on(disks[0])
    (lost,) = glob.glob(str(disks[1]))
    shutil.rmtree(lost)
    again = start(broken, 2, 1, s3_bucket, *every)
    assert [one.wait(240) for one in again] == [0, 0], again[0].read()
    assert re.search(r"step (9|1\d) was on the machines' own disks", again[0].read())
    assert final(broken, 2 * STEPS) == final(whole, 2 * STEPS)
    assert losses(broken) == losses(whole)


def test_fine_tuning_goes_on_in_the_bucket(
    s3_bucket: Bucket, start: Start, command_line, tmp_path: Path
) -> None:
    """From a base in the bucket, with adapters; a run that is killed ends as one that is not."""
    base = f"{s3_bucket.url}/runs/base"
    prepare(s3_bucket, tmp_path)
    (trained,) = start(base, 1, 1, s3_bucket, "--train.tokens", "4096")
    assert trained.wait(240) == 0, trained.read()
    rows = [{"text": word * 3, "label": int(word.isupper())} for word in "abcdABCDefghEFGH" * 4]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("--data", str(tmp_path / "rows.jsonl"), "--valid", str(tmp_path / "rows.jsonl"))

    def tune(*run: str) -> Forked:
        words = ["finetune", base, "--task", "classify", *data, *run]
        words += ["--finetune.lora.rank", "4", "--checkpoint.every", "2", "--train.seq_len", "16"]
        words += ["--train.batch-tokens", "128", "--finetune.epochs", "3", "--log.every", "1"]
        errors = tmp_path / f"tune{len(run)}.err"
        return Forked(words, tmp_path, Path(os.devnull), errors, nothing, **s3_bucket.environment)

    whole, cut = f"{base}-classify", f"{s3_bucket.url}/runs/cut"  # the first is the default
    assert (done := tune()).wait(240) == 0, done.read()
    killed = tune("--run", cut)
    wait_for(cut, 4, [killed])
    killed.kill()
    killed.wait()
    assert (again := tune("--run", cut)).wait(240) == 0, again.read()
    assert "resumed after step" in again.read()
    ends = [Checkpointer(buckets.path_of(run) / "checkpoints") for run in (whole, cut)]
    last = ends[0].steps()[-1]
    assert ends[1].meta(last)["fingerprints"] == ends[0].meta(last)["fingerprints"]
    assert losses(cut) == losses(whole)
    files = ("--file", tmp_path / "rows.jsonl", "--output", tmp_path / "told.jsonl")
    code, _, err = command_line("predict", cut, *files)
    assert code == 0, err
    assert len((tmp_path / "told.jsonl").read_text().splitlines()) == len(rows)
