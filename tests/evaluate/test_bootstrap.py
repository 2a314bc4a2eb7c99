"""Bootstrap confidence intervals of means and of ratios."""

import math

import numpy as np
import pytest

from gptjax.evaluate import Statistic


def test_interval_of_a_mean_has_the_normal_width_and_depends_on_the_seed() -> None:
    right = np.arange(400) % 4 == 0
    one = Statistic.mean("acc", right)
    assert one.value == 0.25
    low, high = one.confidence_interval(0)
    error = math.sqrt(0.25 * 0.75 / 400)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(0.25, abs=0.3 * error)
    assert one.confidence_interval(0) == (low, high)
    assert one.confidence_interval(1) != (low, high)
    narrow = one.confidence_interval(0, level=0.5)
    assert low < narrow[0] < 0.25 < narrow[1] < high


def test_resamples_are_drawn_with_replacement_from_the_seed() -> None:
    values = np.float64([1, 2, 4, 8, 16])
    rng = np.random.default_rng(3)
    means = [values[rng.integers(5, size=5)].mean() for _ in range(200)]
    low, high = Statistic.mean("x", values).confidence_interval(3, 200, 0.9)
    assert [low, high] == pytest.approx(np.quantile(means, [0.05, 0.95]).tolist())


def test_ratio_of_sums_resamples_whole_documents() -> None:
    nats, tokens = np.float64([10, 300]), np.float64([10, 100])
    one = Statistic("loss", nats, tokens, math.exp)
    assert one.value == pytest.approx(math.exp(310 / 110))
    low, high = one.confidence_interval(0)
    assert (low, high) == pytest.approx((math.exp(1), math.exp(3)))  # one document drawn twice


def test_decreasing_transform_has_an_ordered_interval() -> None:
    low, high = Statistic.mean("x", np.float64([0, 1, 2]), lambda x: -x).confidence_interval(0)
    assert low < -1 < high


def test_single_example_has_no_interval() -> None:
    assert Statistic.mean("x", np.ones(1)).confidence_interval(0) is None
