"""The planned size of checkpoints, and the interval that loses the least time."""

import random

import numpy as np
import pytest

from gptjax.config import load
from gptjax.plan import estimate
from gptjax.plan.checkpoints import best_interval, lost_share, saving
from gptjax.plan.machines import parse


@pytest.mark.parametrize("cost", [1.0, 60.0, 600.0])
@pytest.mark.parametrize("between", [1800.0, 86400.0])
def test_no_other_interval_loses_less(cost: float, between: float) -> None:
    intervals = np.geomspace(0.01 * cost, 10 * between, 20_000)
    lost = [lost_share(interval, cost, between) for interval in intervals]
    best = lost_share(best_interval(cost, between), cost, between)
    assert best == pytest.approx(min(lost), abs=2e-3)
    young = (2 * cost * between) ** 0.5
    if cost < between / 1000:
        assert best_interval(cost, between) == pytest.approx(young, rel=0.05)


def test_the_lost_share_is_that_of_runs_with_failures_at_random() -> None:
    cost, between, interval = 60.0, 3600.0, 600.0
    draw, done, spent = random.Random(0), 0.0, 0.0
    while done < 20_000 * interval:
        failure = draw.expovariate(1 / between)
        if failure < interval + cost:
            spent += failure  # to be done again
        else:
            spent, done = spent + interval + cost, done + interval
    assert 1 - done / spent == pytest.approx(lost_share(interval, cost, between), abs=0.01)


def test_more_failures_than_saves_allow_for_have_an_interval_too() -> None:
    assert best_interval(7200.0, 3600.0) == 3600.0


def test_a_checkpoint_has_the_bytes_of_the_state() -> None:
    cfg = load("gpt2:small")
    plan = estimate.plan(cfg, parse("v5e:1x1"))
    parameters = plan.cfg.model.table * 768 + 1024 * 768 + 85_056_000  # tables, blocks and norm
    found = saving(plan, 2e9, 0.0)
    assert found.total == pytest.approx(3 * 4 * parameters, rel=1e-3)  # with Adam's two moments
    assert found.seconds == found.total / 2e9
    assert (found.interval, found.lost) == (0.0, 0.0)
