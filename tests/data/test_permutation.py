"""The data order: a permutation for each epoch; a batch depends on seed and step alone."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.data import permutation
from gptjax.data.permutation import Order, permute

SEEDS = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))
EPOCHS = st.one_of(st.integers(0, 3), st.integers(0, 2**40))
SQUARES = st.builds(lambda side, off: max(1, side**2 + off), st.integers(1, 60), st.integers(-1, 1))
SIZES = st.one_of(st.integers(1, 4000), SQUARES)


def whole(size: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(size), size, seed, epoch)


# --- the permutation -------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(size=SIZES, seed=SEEDS, epoch=EPOCHS)
@example(size=1, seed=0, epoch=0)
@example(size=2, seed=2**64 - 1, epoch=0)
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    image = whole(size, seed, epoch)
    assert image.dtype == np.int64
    np.testing.assert_array_equal(np.sort(image), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(side=st.integers(1, 60), low=st.integers(1, 60))
def test_permutation_is_bijective_for_any_round_function(side: int, low: int) -> None:
    """Hashes near the largest word, where sums would wrap around."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "_mix", lambda x: ~(x * np.uint64(5) % np.uint64(low)))
        image = whole(side**2)
    np.testing.assert_array_equal(np.sort(image), np.arange(side**2))


@settings(max_examples=100, deadline=None)
@given(root=st.integers(10**6, 2**29), off=st.integers(-2, 2), seed=SEEDS)
@example(root=2**28, off=1, seed=0)  # a root that is not exact in floating point
def test_permutation_of_a_very_large_store_is_injective(root: int, off: int, seed: int) -> None:
    size = root**2 + off
    near = np.array([0, 1, root, root**2 - root, size // 2, size - 2, size - 1], np.int64)
    index = np.unique(np.concatenate([near, np.arange(0, size, size // 200)]))
    image = permute(index, size, seed, 0)
    assert np.unique(image).size == index.size
    assert (image >= 0).all()
    assert (image < size).all()


@settings(max_examples=50, deadline=None)
@given(size=SIZES, seed=SEEDS, data=st.data())
def test_permuting_a_subset_equals_the_full_permutation(size, seed, data) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    table = whole(size, seed, 5)
    np.testing.assert_array_equal(permute(index, size, seed, 5), table[index])
    np.testing.assert_array_equal(permute(index[:, None], size, seed, 5), table[index[:, None]])


def test_orders_of_different_seeds_and_epochs_differ() -> None:
    seeds = [0, 1, 2, 3, 2**31, 2**32, 2**63, 2**64 - 2, 2**64 - 1]
    orders = {whole(1000, seed, epoch).tobytes() for seed in seeds for epoch in range(20)}
    assert len(orders) == len(seeds) * 20


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation in units of its standard deviation between two random orders."""
    return float(np.corrcoef(a, b)[0, 1] * math.sqrt(len(a)))


@pytest.mark.parametrize("size", [60_000, 1_000_000])
def test_orders_are_uncorrelated_with_place_epoch_and_seed(size: int) -> None:
    first, later, other = whole(size, 7, 0), whole(size, 7, 1), whole(size, 8, 0)
    pairs = {
        "places": (np.arange(size), first),
        "neighbours": (first[:-1], first[1:]),
        "epochs": (first, later),
        "seeds": (first, other),
    }
    assert {name: c for name, p in pairs.items() if abs(c := correlation(*p)) > 4} == {}


@pytest.mark.parametrize("size", [2, 5, 16, 97])
def test_each_window_is_equally_likely_at_each_place(size: int) -> None:
    epochs = 2000
    images = np.stack([whole(size, 3, epoch) for epoch in range(epochs)])
    counts = np.stack([np.bincount(column, minlength=size) for column in images.T])
    deviation = math.sqrt(epochs / size * (1 - 1 / size))
    assert np.abs(counts - epochs / size).max() < 5 * deviation


# --- batches ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(windows=st.integers(1, 120), batch=st.integers(1, 150), seed=SEEDS)
@example(windows=10, batch=4, seed=0)  # epochs end within a batch
@example(windows=3, batch=10, seed=0)  # and several of them in each
def test_each_epoch_takes_each_window_once(windows: int, batch: int, seed: int) -> None:
    source = Order(windows, batch, seed)
    epochs = 3
    steps = -(-epochs * windows // batch)
    batches = [source.ids(step) for step in range(steps)]
    assert {ids.shape for ids in batches} == {(batch,)}
    stream = np.concatenate(batches)
    for epoch in range(epochs):
        taken = stream[epoch * windows : (epoch + 1) * windows]
        np.testing.assert_array_equal(np.sort(taken), np.arange(windows))


@settings(max_examples=60, deadline=None)
@given(
    windows=st.integers(1, 100),
    each=st.integers(1, 6),
    seed=SEEDS,
    step=st.one_of(st.integers(0, 40), st.integers(0, 10**12)),
)
def test_global_batch_does_not_depend_on_the_number_of_processes(windows, each, seed, step) -> None:
    source = Order(windows, 8 * each, seed)
    whole_batch = source.ids(step)
    for processes in (1, 2, 4, 8):
        side_by_side = np.split(np.arange(8 * each), processes)
        parts = [source.ids(step, rows) for rows in side_by_side]
        np.testing.assert_array_equal(np.concatenate(parts), whole_batch)
        for rows in np.arange(8 * each).reshape(-1, processes).T:  # as some meshes deal them out
            np.testing.assert_array_equal(source.ids(step, rows), whole_batch[rows])


@pytest.mark.parametrize("step", [0, 1, 10**6, 10**12])
@pytest.mark.parametrize("windows", [997, 10**12 + 39])
def test_batch_of_any_step_equals_permuting_its_places_one_by_one(step, windows) -> None:
    places = range(step * 48, (step + 1) * 48)
    alone = [int(permute(np.array([p % windows]), windows, 5, p // windows)[0]) for p in places]
    assert Order(windows, 48, 5).ids(step).tolist() == alone


@pytest.mark.parametrize("step", [1, 10**6, 10**12])
def test_cost_of_a_batch_does_not_grow_with_the_step(step: int, monkeypatch) -> None:
    mixed = 0
    mix = permutation._mix

    def counted(x: np.ndarray) -> np.ndarray:
        nonlocal mixed
        mixed += x.size
        return mix(x)

    monkeypatch.setattr(permutation, "_mix", counted)
    source = Order(100**2, 50, 0)  # a square: no image is outside, so the count is exact

    def words(step: int, rows: np.ndarray | None = None) -> int:
        nonlocal mixed
        mixed = 0
        source.ids(step, rows)
        return mixed

    assert words(step) == words(0)
    row, rows = words(step, np.arange(7, 8)), words(step, np.arange(7, 17))
    assert rows - row == 9 * permutation._ROUNDS  # a process pays for its own rows only


def test_epoch_of_a_step_is_a_fraction() -> None:
    source = Order(windows=100, batch=30, seed=0)
    assert [source.epoch(step) for step in (0, 1, 10)] == [0, 0.3, 3]
