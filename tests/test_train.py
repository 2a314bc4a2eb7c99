"""The step and the loop, in process, on a tiny model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import objective, sharding, train
from gptjax.checkpoint import Checkpoints, fingerprints, leaves_by_path
from gptjax.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gptjax.errors import NumericError
from gptjax.metrics import Throughput, Writers
from gptjax.model import decoder
from gptjax.progress import Progress

EOS = 0


def tiny(**train_fields) -> Config:
    fields = {"tokens": 8 * 512, "batch_tokens": 512, "seq_len": 32} | train_fields
    return Config(
        model=ModelConfig(vocab_size=128, context=32, layers=2, embed=32, heads=4),
        optim=OptimConfig(lr=1e-2, warmup_tokens=1024),
        train=TrainConfig(**fields),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=2),
    )


def batch_of(cfg: Config, step: int, lengths: np.ndarray | None = None) -> dict[str, jax.Array]:
    rows, seq_len = cfg.train.batch, cfg.train.seq_len
    tokens = np.random.default_rng(step).integers(0, 128, (rows, seq_len + 1), dtype=np.int32)
    lengths = np.full(rows, seq_len, np.int32) if lengths is None else lengths
    return {
        "windows_BW": sharding.global_batch(tokens, rows),
        "lengths_B": sharding.global_batch(lengths, rows),
    }


def fresh(cfg: Config) -> train.TrainState:
    init = lambda key: decoder.init(cfg.model, key)
    return jax.jit(lambda: train.create_state(cfg, init))()


def loss_fn(cfg: Config):
    return lambda params, batch, key: objective.next_token(params, cfg, batch, EOS, key)


def one_device():
    return jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))


def test_accumulated_gradients_weigh_tokens_not_parts() -> None:
    lengths = np.array([32] * 8 + [3] * 8, np.int32)  # parts of very different numbers of targets
    results = {}
    for parts in (1, 2, 4):
        cfg = tiny(accumulation=parts)
        with one_device():
            params = fresh(cfg).params
            grads, sums = jax.jit(
                lambda p, b, cfg=cfg: train.gradients(cfg, loss_fn(cfg), p, b, None)
            )(params, batch_of(cfg, 0, lengths))
            assert sums["targets"] == lengths.sum()
            results[parts] = jax.device_get(grads)
    for parts in (2, 4):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            results[parts],
            results[1],
        )


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters() -> None:
    cfg = tiny(ema_decay=0.9)

    def poisoned(params, batch, key):
        loss, sums = loss_fn(cfg)(params, batch, key)
        return loss * jnp.nan, sums

    with one_device():
        state = fresh(cfg)
        before = fingerprints(leaves_by_path(state))
        step = jax.jit(lambda s, b: train.train_step(cfg, poisoned, s, b))
        state, metrics = step(state, batch_of(cfg, 0))
        after = fingerprints(leaves_by_path(state))
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"step", "nonfinite"}
    assert (int(state.step), int(metrics["nonfinite"])) == (1, 1)


def test_ema_follows_the_parameters() -> None:
    cfg = tiny(ema_decay=0.75)
    with one_device():
        state = fresh(cfg)
        step = jax.jit(lambda s, b: train.train_step(cfg, loss_fn(cfg), s, b))
        new, _ = step(state, batch_of(cfg, 0))
    expected = 0.75 * np.asarray(state.params["embed"]) + 0.25 * np.asarray(new.params["embed"])
    np.testing.assert_allclose(new.ema["embed"], expected, rtol=1e-6, atol=1e-9)
    assert not np.array_equal(new.ema["embed"], new.params["embed"])


def fit(cfg: Config, folder, *, loss=None, last_batch=None):
    """Runs the loop; returns the last state and the metrics it wrote."""
    written: list[tuple[int, dict]] = []

    class Keep:
        def write(self, step, metrics):
            written.append((step, dict(metrics)))

        def close(self):
            pass

    def batches(step):
        return (batch_of(cfg, s) for s in range(step, last_batch or cfg.train.steps))

    with one_device():
        state, _ = train.fit(
            cfg,
            init_fn=lambda key: decoder.init(cfg.model, key),
            loss_fn=loss or loss_fn(cfg),
            batches=batches,
            evaluators=[],
            sampler=lambda step, params: None,
            checkpoints=Checkpoints(folder / "checkpoints", cfg.checkpoint),
            writers=lambda step: Writers([Keep()]),
            throughput=Throughput(1.0, "float32", 0.0),
            progress=Progress(shown=False),
        )
    return state, written


def test_a_run_continued_from_a_checkpoint_is_the_run_never_interrupted(tmp_path) -> None:
    cfg = tiny(accumulation=2, ema_decay=0.9)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dropout=0.1))
    whole, _ = fit(cfg, tmp_path / "whole")

    class Killed(Exception):
        pass

    def batches_then_death(step):
        for s in range(step, 5):
            yield batch_of(cfg, s)
        raise Killed

    with pytest.raises(Killed), one_device():
        train.fit(
            cfg,
            init_fn=lambda key: decoder.init(cfg.model, key),
            loss_fn=loss_fn(cfg),
            batches=batches_then_death,
            evaluators=[],
            sampler=lambda step, params: None,
            checkpoints=Checkpoints(tmp_path / "cut" / "checkpoints", cfg.checkpoint),
            writers=lambda step: Writers([]),
            throughput=Throughput(1.0, "float32", 0.0),
            progress=Progress(shown=False),
        )
    assert Checkpoints(tmp_path / "cut" / "checkpoints").steps()[-1] == 4
    resumed, _ = fit(cfg, tmp_path / "cut")
    with one_device():
        assert fingerprints(leaves_by_path(resumed)) == fingerprints(leaves_by_path(whole))


def test_dropout_depends_on_the_step(tmp_path) -> None:
    cfg = tiny()
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dropout=0.5))
    with one_device():
        state = fresh(cfg)
        step = jax.jit(lambda s, b: train.train_step(cfg, loss_fn(cfg), s, b)[1]["loss"])
        later = dataclasses.replace(state, step=jnp.int32(1))
        batch = batch_of(cfg, 0)
        assert step(state, batch) == step(state, batch)
        assert step(state, batch) != step(later, batch)


def test_the_run_ends_after_the_limit_of_steps_that_are_not_finite(tmp_path) -> None:
    cfg = tiny(nonfinite_limit=2)

    def poisoned(params, batch, key):
        loss, sums = loss_fn(cfg)(params, batch, key)
        return loss * jnp.nan, sums

    with pytest.raises(NumericError, match="2 steps in a row, the last of them step 2"):
        fit(cfg, tmp_path, loss=poisoned)


def test_metrics_are_those_of_their_own_step(tmp_path) -> None:
    cfg = dataclasses.replace(tiny(), log=dataclasses.replace(Config().log, every=3))
    _, written = fit(cfg, tmp_path)
    assert [step for step, metrics in written if metrics] == [3, 6, 8]
    metrics = dict(written)[3]
    with one_device():
        state = fresh(cfg)
        step = jax.jit(lambda s, b: train.train_step(cfg, loss_fn(cfg), s, b))
        for s in range(3):
            state, expected = step(state, batch_of(cfg, s))
    for name in ("loss", "grad_norm", "param_norm", "lr"):
        assert metrics[name] == pytest.approx(float(expected[name]), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    assert metrics["tokens_per_second"] > 0
    assert 0 <= metrics["data_wait"] < 1
