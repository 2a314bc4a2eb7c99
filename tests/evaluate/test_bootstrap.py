"""Intervals: seeded, as wide as theory has them, of means and of ratios."""

import math

import numpy as np
import pytest

from gptjax.evaluate import Statistic


def test_the_interval_of_a_mean_is_as_wide_as_theory_says_and_its_seed_decides_it() -> None:
    right = np.arange(400) % 4 == 0
    one = Statistic.mean("acc", right)
    assert one.value == 0.25
    low, high = one.interval(0)
    error = math.sqrt(0.25 * 0.75 / 400)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(0.25, abs=0.3 * error)
    assert one.interval(0) == (low, high)
    assert one.interval(1) != (low, high)
    narrow = one.interval(0, level=0.5)
    assert low < narrow[0] < 0.25 < narrow[1] < high


def test_resamples_are_drawn_by_the_seed_with_replacement() -> None:
    values = np.float64([1, 2, 4, 8, 16])
    rng = np.random.default_rng(3)
    means = [values[rng.integers(5, size=5)].mean() for _ in range(200)]
    low, high = Statistic.mean("x", values).interval(3, 200, 0.9)
    assert [low, high] == pytest.approx(np.quantile(means, [0.05, 0.95]).tolist())


def test_a_ratio_is_of_sums_and_documents_are_drawn_whole() -> None:
    nats, tokens = np.float64([10, 300]), np.float64([10, 100])
    one = Statistic("loss", nats, tokens, math.exp)
    assert one.value == pytest.approx(math.exp(310 / 110))
    low, high = one.interval(0)
    assert (low, high) == pytest.approx((math.exp(1), math.exp(3)))  # one document drawn twice


def test_a_measure_that_falls_has_its_interval_in_order() -> None:
    low, high = Statistic.mean("x", np.float64([0, 1, 2]), lambda x: -x).interval(0)
    assert low < -1 < high


def test_a_single_example_says_nothing_of_others() -> None:
    assert Statistic.mean("x", np.ones(1)).interval(0) is None
