"""A step that is computed twice, and what can be asked of a run while it is trained."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flipped import with_flip
from test_trainer import batch_of, fit, fresh, loss_fn, rows_of, tiny

from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import CheckpointConfig, Config, LogConfig, MeshConfig, WatchConfig
from gptjax.errors import AuditError, ConfigError
from gptjax.parallel import mesh, sharding
from gptjax.training import audit, on_demand, stragglers
from gptjax.training.step import train_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "tensor": 4}])
def test_a_flipped_bit_names_its_device_and_both_results_are_kept(
    tmp_path: Path, sizes: dict[str, int]
) -> None:
    cfg = tiny()
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(**sizes))
    with jax.set_mesh(mesh.make_mesh(cfg.mesh)):
        step = jax.jit(lambda s, b: train_step(cfg, loss_fn(cfg), s, b), donate_argnums=0)
        state, metrics = audit.audited(step, fresh(cfg), batch_of(cfg, 0), 1, str(tmp_path))
        plain, expected = step(fresh(cfg), batch_of(cfg, 0))
        assert metrics["loss"] == expected["loss"]
        np.testing.assert_array_equal(state.params["embed"], plain.params["embed"])
        assert list(tmp_path.iterdir()) == []
        calls = 0

        def faulty(s, b):
            nonlocal calls
            calls += 1
            new, found = step(s, b)
            if calls == 2:
                new.params["embed"] = with_flip(new.params["embed"], 5)
            return new, found

        told = r"step 7 was computed twice.*by device 5 of process 0 on .*\(params/embed\)"
        with pytest.raises(AuditError, match=told) as ended:
            audit.audited(faulty, state, batch_of(cfg, 0), 7, str(tmp_path))
    assert ended.value.exit_code == 76
    one, two = sorted((tmp_path / "audit-7" / "process-0").iterdir())
    assert (one.name, two.name) == ("params.embed.1.npy", "params.embed.2.npy")
    assert (np.load(one) != np.load(two)).sum() == 1


def test_a_run_is_audited_every_so_many_steps_and_ends_unsaved(tmp_path: Path, monkeypatch) -> None:
    cfg = dataclasses.replace(tiny(), watch=WatchConfig(audit_every=3))
    cfg = dataclasses.replace(cfg, checkpoint=CheckpointConfig(every=2, keep=9))
    audited, steps = audit.audited, []

    def spied(step_fn, state, batch, step, run):
        steps.append(step)
        if step == 6:
            raise AuditError("found")
        return audited(step_fn, state, batch, step, run)

    fit(dataclasses.replace(cfg, watch=WatchConfig()), tmp_path / "plain")
    fit(cfg, tmp_path / "audited")
    prints = [
        Checkpointer(tmp_path / name / "checkpoints").meta(8)["fingerprints"]
        for name in ("plain", "audited")
    ]
    assert prints[0] == prints[1]
    monkeypatch.setattr(audit, "audited", spied)
    with pytest.raises(AuditError):
        fit(cfg, tmp_path / "faulty")
    assert steps == [3, 6]
    assert Checkpointer(tmp_path / "faulty" / "checkpoints").steps() == [2, 4]


def test_gpus_have_to_be_deterministic(monkeypatch) -> None:
    cfg = Config(watch=WatchConfig(audit_every=3))
    audit.check(cfg)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    with pytest.raises(ConfigError, match=r"audit_every=3: on GPUs .* compute.deterministic"):
        audit.check(cfg)


def test_a_signal_and_a_file_ask_for_a_checkpoint_a_profile_and_stacks(
    tmp_path: Path, capsys
) -> None:
    cfg = dataclasses.replace(
        tiny(tokens=12 * 512),
        checkpoint=CheckpointConfig(every=100, keep=9),
        log=LogConfig(every=1, profile_steps=1, tensorboard=False),
    )

    def batches(first, last):
        from test_trainer import rows_of

        for step in range(first, last):
            if step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            if step == 7:
                (tmp_path / on_demand.REQUEST).write_text("save nonsense")
            yield rows_of(cfg, step)

    before = signal.getsignal(signal.SIGUSR1)
    on_demand_look, on_demand._LOOK_S = on_demand._LOOK_S, 0.0
    try:
        fit(cfg, tmp_path, batches=batches, shown=True)
    finally:
        on_demand._LOOK_S = on_demand_look
    assert signal.getsignal(signal.SIGUSR1) is before
    err = capsys.readouterr().err
    steps = Checkpointer(tmp_path / "checkpoints").steps()
    assert len(steps) == 3
    assert steps[-1] == 12
    assert steps[0] in (3, 4, 5)
    assert list(tmp_path.glob(f"profile-{steps[0]}/**/*.xplane.pb"))
    assert f"step {steps[0]}: asked to stacks" in err
    assert "stage data of step" in err or "stage step of step" in err
    assert "_train_one" in err
    assert "'nonsense' is none of save, profile, stacks" in err
    assert not (tmp_path / on_demand.REQUEST).exists()


def test_the_steps_after_a_slow_one_are_profiled_and_programs_are_written(
    tmp_path: Path, capsys
) -> None:
    cfg = dataclasses.replace(
        tiny(tokens=30 * 512),
        checkpoint=CheckpointConfig(every=5, keep=1),
        log=LogConfig(every=1, profile_steps=1, profile_slow=8.0, dump_hlo=True, tensorboard=False),
    )

    def batches(first, last):
        for step in range(first, last):
            if step == 24:
                time.sleep(2)
            yield rows_of(cfg, step)

    fit(cfg, tmp_path, batches=batches, shown=True)
    err = capsys.readouterr().err
    assert err.count("the next ones are profiled") == 1, err
    (folder,) = tmp_path.glob("profile-*")
    assert 25 <= int(folder.name.removeprefix("profile-")) <= 28
    assert list(folder.glob("**/*.xplane.pb"))
    (program,) = (tmp_path / "hlo").iterdir()
    assert program.name == "step-1-16x32.txt"
    assert "ENTRY" in program.read_text()


def test_a_process_that_reads_slowly_is_named() -> None:
    quick = {"data": 10.0, "save": 5.0}
    before = dict.fromkeys(("process 0", "process 1", "process 2"), quick)
    now = {
        "process 0": {"data": 10.2, "save": 5.0},
        "process 1": {"data": 10.1, "save": 5.1},
        "process 2": {"data": 19.0, "save": 7.0},
        "process 3": {"data": 99.0},  # has just come
    }
    (line,) = stragglers.stragglers(before, now, 30.0, 0.1)
    assert line.startswith("process 2 was 9.0 s waiting for data of the last 30 s, the median")
    assert list(stragglers.stragglers({}, now, 30.0, 0.1)) == []
