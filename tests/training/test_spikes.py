"""Spikes, rewinds, and steps that are left out."""

import dataclasses
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import pytest
from test_trainer import Killed, fit, loss_fn, rows_of, tiny

from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import CheckpointConfig, Config, LogConfig, SpikeConfig
from gptjax.errors import ConfigError, MismatchError, NumericError
from gptjax.runtime import goodput
from gptjax.training import spikes
from gptjax.training.left_out import LEFT_OUT, Entry, LeftOut

pytestmark = pytest.mark.slow

STEPS = 30


def config(**spike: float) -> Config:
    """A run that is rewound; its dropout and moving average show whether a step was the same."""
    cfg = tiny(tokens=STEPS * 512, ema_decay=0.9)
    fields = {"threshold": 8.0, "window": 20, "before": 2, "after": 1} | spike
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, dropout=0.1),
        spike=SpikeConfig(**fields),
        checkpoint=CheckpointConfig(every=4, keep=2),
        log=LogConfig(every=1, tensorboard=False),
    )


def leaving_out(cfg: Config, *ranges: str) -> Config:
    train = dataclasses.replace(cfg.train, leave_out=ranges)
    return dataclasses.replace(cfg, train=train, spike=SpikeConfig())


def train(cfg: Config, folder: Path, poisoned: Iterable[int] = (), die_at: int = 0):
    """Trains where the batches of some steps have a loss that is forty times as large."""

    def loss(params, batch, keys):
        total, sums = loss_fn(cfg)(params, batch, keys)
        factor = jnp.where((batch["windows_BW"] == 0).all(), 40.0, 1.0)
        return total * factor, sums | {"loss": sums["loss"] * factor}

    def batches(first, last):
        for step in range(first, last):
            if step + 1 == die_at:
                raise Killed
            rows = rows_of(cfg, step)
            yield {**rows, "windows_BW": rows["windows_BW"] * 0} if step + 1 in poisoned else rows

    return fit(cfg, folder, loss=loss, batches=batches)


def final(folder: Path) -> dict:
    checkpoints = Checkpointer(folder / "checkpoints")
    assert checkpoints.steps()[-1] == STEPS
    return checkpoints.meta(STEPS)["fingerprints"]


def test_a_poisoned_run_ends_as_one_that_was_told_what_to_leave_out(tmp_path: Path) -> None:
    state, written = train(config(), tmp_path / "poisoned", {20, 26})
    assert int(state.step) == int(state.opt_state["rate"].count) == STEPS  # the schedule goes on
    told = leaving_out(config(), "18-21", "24-27")
    train(told, tmp_path / "told", {20, 26})
    assert final(tmp_path / "poisoned") == final(tmp_path / "told")
    assert final(tmp_path / "poisoned") != {}
    left = LeftOut(str(tmp_path / "poisoned"))
    assert left.up_to(STEPS) == [(18, 21), (24, 27)]
    assert [(one.step, one.to) for one in left.rewinds] == [(20, 16), (26, 23 // 4 * 4)]
    assert "deviations above" in left.rewinds[0].why
    trained = [step for step, metrics in written if "loss" in metrics]
    assert trained == [*range(1, 20), 17, *range(22, 26), 22, 23, 28, 29, 30]
    meta = Checkpointer(tmp_path / "poisoned" / "checkpoints").meta(STEPS)
    assert meta["left_out"] == [[18, 21], [24, 27]]
    sessions = goodput.read(tmp_path / "poisoned" / goodput.SESSIONS)
    assert [one.first for one in sessions] == [0, 16, 20]
    spent = goodput.summarize(sessions)
    assert spent[goodput.LOST] > 0
    assert spent[goodput.DOWN] < 0.01


def test_a_run_that_is_killed_around_a_rewind_ends_with_the_same_bits(tmp_path: Path) -> None:
    cfg = config()
    train(cfg, tmp_path / "whole", {20})
    # Killed after a rewind; the window that judges the next steps comes from the checkpoint.
    with pytest.raises(Killed):
        train(cfg, tmp_path / "after", {20, 28}, die_at=27)
    train(cfg, tmp_path / "after", {20, 28})
    train(leaving_out(cfg, "18-21", "26-29"), tmp_path / "told", {20, 28})
    assert final(tmp_path / "after") == final(tmp_path / "told")
    # Killed when the rewind had been recorded, and the checkpoints after it were still there.
    unwatched = dataclasses.replace(cfg, spike=SpikeConfig())
    with pytest.raises(Killed):
        train(unwatched, tmp_path / "between", {20}, die_at=26)
    assert Checkpointer(tmp_path / "between" / "checkpoints").steps() == [20, 24]
    shutil.copytree(
        tmp_path / "whole" / "checkpoints" / "28", tmp_path / "between" / "checkpoints" / "28"
    )
    with pytest.raises(MismatchError, match=r"left out 18-21, and is to leave out none"):
        train(unwatched, tmp_path / "between", {20})
    shutil.rmtree(tmp_path / "between" / "checkpoints" / "28")
    with pytest.raises(Killed):
        train(cfg, tmp_path / "early", (), die_at=18)
    shutil.copy(tmp_path / "whole" / LEFT_OUT, tmp_path / "early")
    for step in (20, 24):
        shutil.copytree(
            tmp_path / "between" / "checkpoints" / str(step),
            tmp_path / "early" / "checkpoints" / str(step),
        )
    train(cfg, tmp_path / "early", {20})
    assert final(tmp_path / "early") == final(tmp_path / "whole")


def test_losses_that_are_not_finite_are_left_behind_and_the_good_checkpoint_is_kept(
    tmp_path: Path,
) -> None:
    cfg = config(before=9)

    def poisoned(params, batch, keys):
        total, sums = loss_fn(cfg)(params, batch, keys)
        bad = jnp.where((batch["windows_BW"] == 0).all(), jnp.nan, 1.0)
        return total * bad, sums | {"loss": sums["loss"] * bad}

    def batches(first, last):
        for step in range(first, last):
            rows = rows_of(cfg, step)
            yield {**rows, "windows_BW": rows["windows_BW"] * 0} if step + 1 == 23 else rows

    fit(cfg, tmp_path / "run", loss=poisoned, batches=batches)
    (rewind,) = LeftOut(str(tmp_path / "run")).rewinds
    assert (rewind.step, rewind.to) == (23, 12)  # 16 and 20, the two newest, are not good
    assert "not finite" in rewind.why
    assert LeftOut(str(tmp_path / "run")).up_to(STEPS) == [(14, 24)]


def test_rewinds_have_a_limit_and_all_of_them_are_told(tmp_path: Path) -> None:
    with pytest.raises(NumericError) as ended:
        train(config(rewinds=1), tmp_path / "run", {15, 20})
    assert "step 20: loss" in str(ended.value)
    assert "after 1 rewinds (spike.rewinds=1): step 15 (loss" in str(ended.value)
    assert "back to step 12" in str(ended.value)
    assert ended.value.exit_code == 70


def test_steps_that_were_trained_on_cannot_be_left_out_later(tmp_path: Path) -> None:
    cfg = leaving_out(config(), "25")
    with pytest.raises(Killed):
        train(cfg, tmp_path / "run", (), die_at=14)
    with pytest.raises(MismatchError, match=r"up to step 12 the run has left out none.*out 7-9"):
        train(leaving_out(config(), "7-9"), tmp_path / "run")
    (tmp_path / "run" / LEFT_OUT).write_text('[{"first": 25, "last": 25, "rewind": null}]')
    train(leaving_out(config(), "14-15"), tmp_path / "run")
    assert LeftOut(str(tmp_path / "run")).up_to(STEPS) == [(14, 15), (25, 25)]  # 25 has stayed
    train(leaving_out(config(), "14-15", "25"), tmp_path / "told")
    assert final(tmp_path / "run") == final(tmp_path / "told")


def test_ranges_are_merged_up_to_a_step(tmp_path: Path) -> None:
    left = LeftOut(str(tmp_path), ("30-34", "7", "8-9", "32-40"))
    assert left.up_to(100) == [(7, 9), (30, 40)]
    assert left.up_to(33) == [(7, 9), (30, 33)]
    assert left.up_to(6) == []
    assert (7 in left, 10 in left) == (True, False)
    left.record()
    assert LeftOut(str(tmp_path), ("7",)).entries == left.entries
    assert json.loads((tmp_path / LEFT_OUT).read_text())[0] == {
        "first": 30,
        "last": 34,
        "rewind": None,
    }
    assert Entry(30, 34) in left.entries
    for text in ("0", "9-8", "x", "1-", ""):
        with pytest.raises(ConfigError, match=f"train.leave_out={text}: must be a step"):
            leaving_out(config(), text).check()


def test_a_spike_is_far_above_the_median_and_noise_is_none() -> None:
    rng = random.Random(0)
    seen: list[float] = []
    for _ in range(2000):
        value = 3 + rng.gauss(0, 0.1)
        assert not spikes.judge("loss", value, seen[-100:], 8.0)
        seen.append(value)
    assert "loss 4 is" in spikes.judge("loss", 4.0, seen[-100:], 8.0)
    assert not spikes.judge("loss", 0.1, seen[-100:], 8.0)  # only what lies above
    assert not spikes.judge("loss", 100.0, seen[:9], 8.0)  # too few to tell
    assert not spikes.judge("loss", 3.001, [3.0] * 50, 8.0)  # equal steps have no deviation
    assert spikes.judge("loss", 3.1, [3.0] * 50, 8.0)
