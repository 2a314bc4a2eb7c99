"""Learning rates by tokens: of batches that grow, and of stages with curves of their own."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config, OptimConfig, StageConfig, TrainConfig, phases
from gptjax.training import stage_table
from gptjax.training.lr_schedule import learning_rate

PEAK = 1e-2


def run_of(stages=None, train=None, **optim) -> Config:
    sizes = {"tokens": 6400, "batch_tokens": 64, "seq_len": 16} | (train or {})
    schedule = OptimConfig(**{"lr": PEAK, "final_lr_ratio": 0.1} | optim)
    return Config(train=TrainConfig(**sizes), optim=schedule, stages=stages or {})


def rates(cfg: Config) -> np.ndarray:
    return np.asarray(jax.vmap(learning_rate(cfg))(jnp.arange(cfg.steps)))


RAMP = {"batch_ramp_tokens": 1200, "batch_start_tokens": 16, "batch_increment_tokens": 16}


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_a_growing_batch_has_the_rates_of_the_tokens_that_it_has_seen(shape: str) -> None:
    fields = {"lr_schedule": shape, "warmup_tokens": 640}
    fields |= {"decay_tokens": 1280} if shape == "wsd" else {}
    plain, growing = run_of(**fields), run_of(train=RAMP, **fields)
    grown = rates(growing)
    assert len(grown) > 100
    by_token = np.asarray(jax.vmap(learning_rate(plain))(jnp.arange(103)))
    for step, rate in enumerate(grown):
        seen = phases.tokens_at(growing, step)
        after = phases.tokens_at(growing, step + 1)
        if after <= 640:  # the ramp reaches its peak with the last token of the warm-up
            assert rate == pytest.approx(PEAK * after / 640, rel=1e-5)
        elif seen >= 640:
            low, high = sorted((by_token[seen // 64], by_token[seen // 64 + 1]))
            assert low * (1 - 1e-5) <= rate <= high * (1 + 1e-5)
            if seen % 64 == 0:
                assert rate == pytest.approx(by_token[seen // 64], rel=1e-5)


def test_a_stage_without_a_curve_has_the_runs() -> None:
    cut = run_of({"a": StageConfig(tokens=1600), "b": StageConfig()})
    np.testing.assert_array_equal(rates(cut), rates(run_of()))


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - 0.5**0.5), ("constant", 1.0)],
)
def test_a_stage_goes_on_from_the_rate_before_it(shape: str, middle: float) -> None:
    stages = {"main": StageConfig(tokens=3200), "end": StageConfig(lr_schedule=shape)}
    cfg = run_of(stages, lr_schedule="linear", final_lr_ratio=0.0)
    found = rates(cfg)
    np.testing.assert_allclose(found[:50], PEAK * (1 - np.arange(50) / 100), rtol=1e-5)
    assert found[50] == pytest.approx(PEAK / 2, rel=1e-5)  # where the run's own line is then
    assert found[75] == pytest.approx(PEAK / 2 * middle, rel=1e-5)
    if shape != "constant":
        assert 0 < found[99] < found[98]


def test_stages_begin_and_end_at_their_own_rates() -> None:
    stages = {
        "up": StageConfig(tokens=640, lr_schedule="linear", lr_ratio=0.0, final_lr_ratio=1.0),
        "main": StageConfig(lr_schedule="constant"),
        "again": StageConfig(
            tokens=640, lr_schedule="cosine", lr_ratio=0.5, final_lr_ratio=0.25, batch_tokens=32
        ),
    }
    found = rates(run_of(stages))
    np.testing.assert_allclose(found[:10], PEAK * np.arange(10) / 10, atol=1e-9)
    np.testing.assert_allclose(found[10:90], PEAK, rtol=1e-5)
    assert len(found) == 90 + 20  # the last stage has half the batch
    assert found[90] == pytest.approx(PEAK / 2)
    assert found[100] == pytest.approx(PEAK * 0.375, rel=1e-5)
    assert found[109] == pytest.approx(PEAK * (0.25 + 0.125 * (1 + np.cos(np.pi * 0.95))), rel=1e-4)


def test_a_late_short_stage_has_exact_progress() -> None:
    """Its tokens are few among all that were seen before."""
    stages = {"main": StageConfig(), "anneal": StageConfig(tokens=640, lr_schedule="linear")}
    cfg = run_of(stages, train={"tokens": 64 * 10**8 + 640}, lr_schedule="constant")
    firsts = jnp.arange(10**8, 10**8 + 10)
    found = jax.vmap(learning_rate(cfg))(firsts)
    np.testing.assert_allclose(found, PEAK * (1 - np.arange(10) / 10), rtol=1e-5)


def test_a_warmup_shorter_than_a_whole_batch_is_there_while_the_batch_grows() -> None:
    train = {"batch_ramp_tokens": 3200, "batch_start_tokens": 16, "batch_increment_tokens": 624}
    cfg = run_of(train={"batch_tokens": 640} | train, warmup_tokens=160, lr_schedule="constant")
    np.testing.assert_allclose(
        rates(cfg)[:12], PEAK * np.minimum(1, np.arange(1, 13) / 10), rtol=1e-5
    )


def test_the_first_stage_begins_at_the_peak() -> None:
    found = rates(run_of({"all": StageConfig(lr_schedule="linear")}))
    np.testing.assert_allclose(found, PEAK * (1 - np.arange(100) / 100), rtol=1e-5)


def test_the_table_has_a_row_for_each_stage_and_none_for_a_plain_run() -> None:
    assert list(stage_table.lines(run_of())) == []
    (_, row) = stage_table.lines(run_of(train=RAMP))
    assert row.split()[:6] == ["the", "run", "6,448", "1", "-", "128"]
    assert "16 - 64" in row
    stages = {"main": StageConfig(tokens=640), "long": StageConfig(seq_len=32, batch_tokens=128)}
    cfg = replace(run_of(stages), optim=OptimConfig(lr=PEAK, lr_schedule="constant"))
    head, first, second = stage_table.lines(cfg, lambda step: {"web": step / 10, "code": 0.5})
    assert head.split()[-4:] == ["epochs", "at", "its", "end"]
    assert " ".join(first.split()) == "main 640 1 - 10 64 16 0.01 - 0.01 web 1, code 0.5"
    assert second.split()[:6] == ["long", "6,400", "11", "-", "55", "128"]
