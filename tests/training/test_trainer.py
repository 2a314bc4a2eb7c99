"""The train step and the training loop, in this process, on a tiny model."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.checkpoint.checkpointer import Checkpointer, fingerprints, leaves_by_path
from gptjax.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    phases,
)
from gptjax.errors import NumericError, Preempted
from gptjax.model import decoder
from gptjax.parallel import arrays, mesh
from gptjax.runtime import goodput
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training import callbacks, objective, optimizer, standard
from gptjax.training.metrics import Writers
from gptjax.training.programs import StepPrograms
from gptjax.training.step import TrainState, create_state, gradients, train_step
from gptjax.training.trainer import Trainer

EOS = 0

pytestmark = pytest.mark.usefixtures("quick_compile")


def tiny(**train_fields) -> Config:
    fields = {"tokens": 8 * 512, "batch_tokens": 512, "seq_len": 32} | train_fields
    return Config(
        model=ModelConfig(vocab_size=128, context=32, layers=2, embed=32, heads=4),
        optim=OptimConfig(lr=1e-2, warmup_tokens=1024),
        train=TrainConfig(**fields),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=2),
    )


def rows_of(cfg: Config, step: int, lengths: np.ndarray | None = None) -> dict[str, np.ndarray]:
    rows, seq_len = cfg.train.batch, cfg.train.seq_len
    tokens = np.random.default_rng(step).integers(0, 128, (rows, seq_len + 1), dtype=np.int32)
    lengths = np.full(rows, seq_len, np.int32) if lengths is None else lengths
    return {"windows_BW": tokens, "lengths_B": lengths}


def batch_of(cfg: Config, step: int, lengths: np.ndarray | None = None) -> dict[str, jax.Array]:
    return arrays.global_batch(rows_of(cfg, step, lengths), cfg.train.batch)


def fresh(cfg: Config) -> TrainState:
    init = lambda key: decoder.init(cfg.model, key)
    return jax.jit(lambda: create_state(cfg, init))()


def loss_fn(cfg: Config):
    return lambda params, batch, key: objective.next_token_loss(params, cfg, batch, EOS, key)


def one_device():
    return jax.set_mesh(mesh.make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.slow
def test_accumulated_gradients_weigh_targets_not_microbatches() -> None:
    lengths = np.array([32] * 8 + [3] * 8, np.int32)  # parts of very different numbers of targets
    results = {}
    for parts in (1, 2, 4):
        cfg = tiny(accumulation=parts)
        with one_device():
            params = fresh(cfg).params
            grads, sums = jax.jit(
                lambda p, b, cfg=cfg: gradients(loss_fn(cfg), p, b, None, cfg.train.accumulation)
            )(params, batch_of(cfg, 0, lengths))
            assert sums["targets"] == lengths.sum()
            results[parts] = jax.device_get(grads)
    for parts in (2, 4):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            results[parts],
            results[1],
        )


def test_a_nonfinite_step_changes_only_the_counters() -> None:
    cfg = tiny(ema_decay=0.9)

    def poisoned(params, batch, key):
        loss, sums = loss_fn(cfg)(params, batch, key)
        return loss * jnp.nan, sums

    with one_device():
        state = fresh(cfg)
        before = fingerprints(leaves_by_path(state))
        step = jax.jit(lambda s, b: train_step(cfg, poisoned, s, b))
        state, metrics = step(state, batch_of(cfg, 0))
        after = fingerprints(leaves_by_path(state))
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"step", "nonfinite", "opt_state/rate/count"}
    assert (int(state.step), int(metrics["nonfinite"])) == (1, 1)


@pytest.mark.slow
def test_the_moving_average_follows_the_parameters() -> None:
    cfg = tiny(ema_decay=0.75)
    with one_device():
        state = fresh(cfg)
        step = jax.jit(lambda s, b: train_step(cfg, loss_fn(cfg), s, b))
        new, _ = step(state, batch_of(cfg, 0))
    expected = 0.75 * np.asarray(state.params["embed"]) + 0.25 * np.asarray(new.params["embed"])
    np.testing.assert_allclose(new.ema["embed"], expected, rtol=1e-6, atol=1e-9)
    assert not np.array_equal(new.ema["embed"], new.params["embed"])


class Keep:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.written: list[tuple[int, dict]] = []

    def write(self, step, metrics):
        self.written.append((step, dict(metrics)))

    def close(self):
        pass


@dataclasses.dataclass
class ToyTask:
    """Next-token prediction on random tokens."""

    cfg: Config
    loss: Callable = None
    read: Callable | None = None
    lr_multipliers = None

    def __post_init__(self):
        self.loss = self.loss or loss_fn(self.cfg)

    def init(self, key):
        return decoder.init(self.cfg.model, key)

    def starting_state(self):
        return None

    def loss_fn(self, phase):
        return self.loss

    def abstract_batch(self, phase):
        return objective.abstract_batch(self.cfg, phase)

    def batches(self, first, last):
        if self.read:
            return self.read(first, last)
        return (rows_of(self.cfg, step) for step in range(first, last))

    def to_model_params(self, params):
        return params


def fit(
    cfg: Config,
    folder,
    *,
    loss=None,
    batches=None,
    evaluators=(),
    tasks=(),
    sampler=None,
    shown=False,
):
    """Trains; returns the last state and the metrics that were written."""
    keep, cfg = Keep(), dataclasses.replace(cfg, run=str(folder))
    quiet, watchdog = Progress(shown), Watchdog(cfg.watch)
    folder.mkdir(exist_ok=True)
    writers = Writers([lambda folder, step: keep], folder)
    checkpointer = Checkpointer(folder / "checkpoints", cfg.checkpoint)
    due = [(cfg.eval.every, one) for one in evaluators]
    due += [(cfg.eval.tasks_every, one) for one in tasks]
    evaluate = callbacks.Evaluate(lambda step: due, writers, watchdog, quiet)
    with one_device():
        todo = standard.standard_callbacks(cfg, checkpointer, evaluate, watchdog, quiet)
        todo.append(callbacks.Every(cfg.eval.sample_every, sampler or (lambda snapshot: None)))
        task = ToyTask(cfg, loss, batches)
        trainer = Trainer(cfg, task, checkpointer, todo, watchdog=watchdog, progress=quiet)
        state = trainer.fit()
    return state, [(step, metrics) for step, metrics in keep.written if metrics]


class Killed(Exception):
    pass


def death_at(cfg: Config, step: int):
    """Batches until a step, where reading fails."""

    def batches(first, last):
        yield from (rows_of(cfg, s) for s in range(first, step))
        raise Killed

    return batches


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path) -> None:
    cfg = tiny(accumulation=2, ema_decay=0.9)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dropout=0.1))
    whole, _ = fit(cfg, tmp_path / "whole")
    with pytest.raises(Killed):
        fit(cfg, tmp_path / "cut", batches=death_at(cfg, 5))
    assert Checkpointer(tmp_path / "cut" / "checkpoints").steps()[-1] == 4
    resumed, _ = fit(cfg, tmp_path / "cut")
    with one_device():
        assert fingerprints(leaves_by_path(resumed)) == fingerprints(leaves_by_path(whole))


class Counted:
    """An evaluator that says how often it was asked."""

    def __init__(self, then=lambda: None, name="asked"):
        self.asked, self.then, self.name = 0, then, name

    def run(self, params):
        self.asked += 1
        self.then()
        return {self.name: self.asked}


@pytest.mark.slow
def test_evaluation_runs_at_its_period_and_again_at_the_resumed_step(tmp_path) -> None:
    cfg = dataclasses.replace(tiny(), eval=EvalConfig(every=2, sample_every=4))
    sampled: list[int] = []
    sampler = lambda snapshot: sampled.append(snapshot.step)
    with pytest.raises(Killed):
        fit(cfg, tmp_path, batches=death_at(cfg, 5), evaluators=[Counted()], sampler=sampler)
    assert sampled == [4]
    _, written = fit(cfg, tmp_path, evaluators=[Counted()], sampler=sampler)
    assert [step for step, metrics in written if "asked" in metrics] == [4, 6, 8]
    assert sampled == [4, 4, 8]


@pytest.mark.slow
def test_the_time_of_a_run_and_of_its_restart_is_accounted_for(tmp_path) -> None:
    cfg = dataclasses.replace(tiny(), log=dataclasses.replace(Config().log, every=1))
    cfg = dataclasses.replace(cfg, checkpoint=CheckpointConfig(every=4))
    began = time.time()
    with pytest.raises(Killed):
        fit(cfg, tmp_path, batches=death_at(cfg, 7))
    time.sleep(0.5)
    slow = Counted(then=lambda: time.sleep(0.3))
    _, written = fit(cfg, tmp_path, evaluators=[slow])
    wall = time.time() - began
    sessions = goodput.read(tmp_path / goodput.SESSIONS)
    assert [(one.first, one.step) for one in sessions] == [(0, 5), (4, 8)]
    spent = goodput.summarize(sessions)
    assert 0 <= wall - sum(spent.values()) < 1.0
    assert 0.5 < spent[goodput.DOWN] < 2.0
    assert 0.3 < spent["evaluating"] < 1.0
    assert 0 < spent[goodput.LOST] < spent["productive"]
    assert spent["compiling"] > 0
    shares = [metrics["goodput"] for _, metrics in written if "goodput" in metrics]
    assert 0 < shares[-1] < 1
    assert goodput.share(spent) < 1


@pytest.mark.slow
def test_a_step_is_saved_before_it_is_evaluated_and_evaluated_again_after_a_resume(tmp_path):
    cfg = dataclasses.replace(tiny(), eval=EvalConfig(every=4))

    def die():
        raise Killed

    with pytest.raises(Killed):
        fit(cfg, tmp_path, evaluators=[Counted(then=die)])
    assert Checkpointer(tmp_path / "checkpoints").steps()[-1] == 4
    _, written = fit(cfg, tmp_path, evaluators=[Counted()])
    assert [step for step, metrics in written if "asked" in metrics] == [4, 8]


@pytest.mark.slow
def test_tasks_have_their_own_period_and_are_logged_with_the_step(tmp_path) -> None:
    cfg = dataclasses.replace(tiny(), eval=EvalConfig(every=2, tasks_every=3))
    tasks = [Counted(name="task"), Counted(name="other")]
    _, written = fit(cfg, tmp_path, evaluators=[Counted()], tasks=tasks)
    measured = [(step, m) for step, m in written if {"asked", "task"} & set(m)]
    assert measured == [
        (2, {"asked": 1}),
        (3, {"task": 1, "other": 1}),
        (4, {"asked": 2}),
        (6, {"asked": 3, "task": 2, "other": 2}),
        (8, {"asked": 4, "task": 3, "other": 3}),
    ]


def test_a_signal_during_evaluation_ends_it_and_saves_the_step(tmp_path) -> None:
    cfg = dataclasses.replace(tiny(), eval=EvalConfig(every=3, sample_every=3))
    stop = Counted(then=lambda: signal.raise_signal(signal.SIGTERM))
    never, sampled = Counted(), []
    sampler = lambda snapshot: sampled.append(snapshot.step)  # due at the same step, and left out
    with pytest.raises(Preempted, match="told to stop by SIGTERM; saved step 3"):
        fit(cfg, tmp_path, evaluators=[stop, never], sampler=sampler)
    assert (stop.asked, never.asked, sampled) == (1, 0, [])
    assert Checkpointer(tmp_path / "checkpoints").steps()[-1] == 3
    _, written = fit(cfg, tmp_path, evaluators=[never])
    assert [step for step, metrics in written if "asked" in metrics] == [3, 6, 8]


def test_a_signal_before_the_first_step_is_reported(tmp_path) -> None:
    cfg = tiny()

    def batches(first, last):
        signal.raise_signal(signal.SIGTERM)
        yield from (rows_of(cfg, s) for s in range(first, last))

    with pytest.raises(Preempted, match="told to stop by SIGTERM"):
        fit(cfg, tmp_path, batches=batches)


@pytest.mark.slow
def test_a_budget_below_the_resumed_step_ends_at_that_step(tmp_path) -> None:
    cfg = tiny()
    fit(cfg, tmp_path)
    less = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, tokens=4 * 512))
    _, written = fit(less, tmp_path, evaluators=[Counted()])
    assert written == [(8, {"asked": 1})]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "steps", "traced"),
    [(3, 2, True), pytest.param(8, 5, True, marks=pytest.mark.slow), (9, 1, False)],
)
def test_the_configured_steps_are_profiled_into_the_run_folder(
    tmp_path, first, steps, traced
) -> None:
    log = dataclasses.replace(Config().log, profile_start=first, profile_steps=steps)
    fit(dataclasses.replace(tiny(), log=log), tmp_path)
    assert bool(list(tmp_path.glob("profile/**/*.xplane.pb"))) == traced


@pytest.mark.slow
def test_a_run_resumed_within_the_profiled_steps_makes_no_profile(tmp_path) -> None:
    log = dataclasses.replace(Config().log, profile_start=4, profile_steps=4)
    cfg = dataclasses.replace(tiny(), log=log)
    with pytest.raises(Killed):
        fit(tiny(), tmp_path, batches=death_at(cfg, 5))
    fit(cfg, tmp_path)
    assert not (tmp_path / "profile").exists()


@pytest.mark.slow
def test_the_schedule_advances_over_a_nonfinite_step(tmp_path) -> None:
    cfg = tiny()
    with one_device():
        skipped = dataclasses.replace(fresh(cfg), step=jnp.int32(0))
        poisoned = lambda p, b, k: (loss_fn(cfg)(p, b, k)[0] * jnp.nan, loss_fn(cfg)(p, b, k)[1])
        skip = jax.jit(lambda s, b: train_step(cfg, poisoned, s, b))
        for _ in range(3):
            skipped, _ = skip(skipped, batch_of(cfg, 0))
        # Adam from the same moments: the whole update is the rate times the same direction.
        step = jax.jit(lambda s, b: train_step(cfg, loss_fn(cfg), s, b))
        late, metrics = step(skipped, batch_of(cfg, 1))
        moved = np.asarray(late.params["positions"] - skipped.params["positions"])
        start = fresh(cfg)
        early, first = step(start, batch_of(cfg, 1))
        reference = np.asarray(early.params["positions"] - start.params["positions"])
    assert metrics["lr"] != first["lr"]
    ratio = float(metrics["lr"] / first["lr"])
    np.testing.assert_allclose(moved, ratio * reference, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_dropout_depends_on_the_step(tmp_path) -> None:
    cfg = tiny()
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dropout=0.5))
    with one_device():
        state = fresh(cfg)
        step = jax.jit(lambda s, b: train_step(cfg, loss_fn(cfg), s, b)[1]["loss"])
        later = dataclasses.replace(state, step=jnp.int32(1))
        batch = batch_of(cfg, 0)
        assert step(state, batch) == step(state, batch)
        assert step(state, batch) != step(later, batch)


@pytest.mark.slow
def test_the_run_ends_after_nonfinite_limit_steps(tmp_path) -> None:
    cfg = tiny(nonfinite_limit=2)

    def poisoned(params, batch, key):
        loss, sums = loss_fn(cfg)(params, batch, key)
        return loss * jnp.nan, sums

    with pytest.raises(NumericError, match="2 steps in a row, the last of them step 2"):
        fit(cfg, tmp_path, loss=poisoned)


@pytest.mark.slow
def test_parameters_that_are_not_finite_end_the_run_and_are_never_saved(
    tmp_path, monkeypatch
) -> None:
    make = optimizer.make_optimizer

    def broken_at_step_5(cfg, multipliers=None):
        rule = make(cfg, multipliers)

        def update(grads, state, params):
            updates, state = rule.update(grads, state, params)
            bad = jnp.where(state["rate"].count == 5, jnp.nan, 0.0)
            return jax.tree.map(lambda u: u + bad, updates), state

        return optax.GradientTransformation(rule.init, update)

    monkeypatch.setattr(optimizer, "make_optimizer", broken_at_step_5)
    cfg = tiny()
    cfg = dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, every=1, keep=9))
    with pytest.raises(NumericError, match="step 5: the optimizer's update made parameters that"):
        fit(cfg, tmp_path)
    checkpointer = Checkpointer(tmp_path / "checkpoints", cfg.checkpoint)
    assert checkpointer.steps()[-1] == 4


def test_logged_metrics_belong_to_their_step(tmp_path) -> None:
    cfg = dataclasses.replace(tiny(), log=dataclasses.replace(Config().log, every=3))
    _, written = fit(cfg, tmp_path)
    assert [step for step, metrics in written if metrics] == [3, 6, 8]
    metrics = dict(written)[3]
    with one_device():
        state = fresh(cfg)
        step = jax.jit(lambda s, b: train_step(cfg, loss_fn(cfg), s, b))
        for s in range(3):
            state, expected = step(state, batch_of(cfg, s))
    for name in ("loss", "grad_norm", "param_norm", "lr"):
        assert metrics[name] == pytest.approx(float(expected[name]), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    assert metrics["tokens_per_second"] > 0
    assert 0 <= metrics["data_wait"] < 1


def test_a_signal_while_a_larger_batch_is_compiled_saves_the_step_before_it(
    tmp_path, monkeypatch
) -> None:
    cfg = tiny(batch_start_tokens=256, batch_increment_tokens=256, batch_ramp_tokens=512)
    of = StepPrograms.of

    def told_to_stop(self, phase, state):
        if phase.first:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return of(self, phase, state)

    def grown(first, last):
        for step in range(first, last):
            batch = phases.phase_at(phases.phases(cfg), step).batch
            yield {name: rows[:batch] for name, rows in rows_of(cfg, step).items()}

    monkeypatch.setattr(StepPrograms, "of", told_to_stop)
    with one_device(), pytest.raises(Preempted, match=r"told to stop by SIGTERM; saved step 2$"):
        fit(cfg, tmp_path, batches=grown)
    assert Checkpointer(tmp_path / "checkpoints").steps() == [2]
