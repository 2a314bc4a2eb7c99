"""The order of a mixture: shares, epochs and limits, as a pure function of seed, step and batch."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import mixture_order
from gptjax.data.mixture_order import PERIOD, MixtureOrder, Stretch, batch_counts
from gptjax.data.permutation import Order

SEEDS = st.integers(0, 2**32 - 1)
WEIGHTS = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=8)


def order_of(weights, batch, seed, windows=None, limits=None, *, stops=False) -> MixtureOrder:
    """An order of one stretch; limits are numbers of rows, 0 for none."""
    windows = windows or [100] * len(weights)
    limits = limits or [0] * len(weights)
    names = tuple(f"p{number}" for number in range(len(weights)))
    epochs = tuple(Fraction(rows, size) for rows, size in zip(limits, windows, strict=True))
    stretch = Stretch(batch, tuple(windows), tuple(weights))
    return MixtureOrder(names, (stretch,), seed, epochs, stops)


def rows_by_part(order: MixtureOrder, step: int) -> list[int]:
    return np.bincount(order.places(step)[0], minlength=len(order.names)).tolist()


@given(
    windows=st.integers(1, 300), batch=st.integers(1, 40), seed=SEEDS, step=st.integers(0, 10**9)
)
def test_data_without_a_mixture_keep_their_order(windows, batch, seed, step) -> None:
    order = MixtureOrder(("",), (Stretch(batch, (windows,), (1.0,)),), seed, (0.0,))
    parts_B, windows_B = order.places(step)
    assert not parts_B.any()
    np.testing.assert_array_equal(windows_B, Order(windows, batch, seed).ids(step))


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, batch=st.integers(1, 300))
def test_each_batch_has_each_parts_share_of_rows_within_one(weights, batch) -> None:
    shares_K = np.array(weights) / sum(weights) * batch
    counts_PK = batch_counts(np.array(weights), batch)
    assert (counts_PK.sum(1) == batch).all()
    assert (counts_PK >= 0).all()
    assert (np.abs(counts_PK - shares_K) < 1 + 1e-6).all()
    # Over any stretch, in rows: never a whole period's rounding, which is PERIOD rows.
    drift_PK = np.cumsum(counts_PK, 0) - shares_K * np.arange(1, PERIOD + 1)[:, None]
    assert np.abs(drift_PK).max() < len(weights) + 1


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    each=st.integers(1, 4),
    seed=SEEDS,
    step=st.one_of(st.integers(0, 40), st.integers(0, 10**12)),
)
def test_a_batch_does_not_depend_on_the_number_of_processes(weights, each, seed, step) -> None:
    order = order_of(weights, 8 * each, seed)
    whole = np.stack(order.places(step))
    for processes in (1, 2, 4, 8):
        for rows in np.split(np.arange(8 * each), processes):
            np.testing.assert_array_equal(np.stack(order.places(step, rows)), whole[:, rows])
        for rows in np.arange(8 * each).reshape(-1, processes).T:  # as some meshes deal them out
            np.testing.assert_array_equal(np.stack(order.places(step, rows)), whole[:, rows])


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    windows=st.lists(st.integers(1, 60), min_size=4, max_size=4),
    batch=st.integers(1, 24),
    seed=SEEDS,
)
def test_each_window_of_a_part_comes_once_before_any_comes_again(
    weights, windows, batch, seed
) -> None:
    order = order_of(weights, batch, seed, windows[: len(weights)])
    seen: list[list[int]] = [[] for _ in weights]
    for step in range(50):
        parts_B, windows_B = order.places(step)
        at = np.argsort(parts_B, kind="stable")
        for part, window in zip(parts_B[at].tolist(), windows_B[at].tolist(), strict=True):
            seen[part].append(window)
    for part, ids in enumerate(seen):
        # Rows of one batch come in any order, so that an epoch's border may lie within a batch.
        counts = Counter(ids)
        assert len(ids) == order.used(50)[part]
        least = len(ids) // windows[part]
        assert set(counts.values()) <= {least, least + 1} - {0}
        assert order.epochs_at(50)[f"p{part}"] == len(ids) / windows[part]


def test_an_epoch_is_over_before_the_next_begins_in_any_batch() -> None:
    order = order_of([3, 1], 8, 0, [30, 10])
    firsts = [order.places(step) for step in range(5)]  # 30 and 10 rows: an epoch of each
    for part, size in enumerate((30, 10)):
        ids = np.concatenate([windows_B[parts_B == part] for parts_B, windows_B in firsts])
        assert sorted(ids.tolist()) == list(range(size))


def test_parts_are_shuffled_apart_by_their_names() -> None:
    order = order_of([1, 1], 500, 3, [500, 500])
    parts_B, windows_B = order.places(0)
    one, two = windows_B[parts_B == 0], windows_B[parts_B == 1]
    assert sorted(one.tolist()) != sorted(two.tolist())
    other = replace(order, names=order.names[::-1])  # a part's name counts, not its place
    again_B, again_windows_B = other.places(0)
    np.testing.assert_array_equal(again_windows_B[again_B == 1], one)


def test_several_steps_at_once_are_each_of_them() -> None:
    order = order_of([5, 2, 1], 10, 1, [40, 7, 9], [0, 60, 0])
    rows = np.arange(1, 10, 2)
    parts_NB, windows_NB = order.places_of(range(3, 40), rows)
    for step, parts_B, windows_B in zip(range(3, 40), parts_NB, windows_NB, strict=True):
        np.testing.assert_array_equal(np.stack(order.places(step, rows)), [parts_B, windows_B])


def test_the_cost_of_a_batch_does_not_grow_with_the_step(monkeypatch) -> None:
    mixed = []
    permute = mixture_order.permute_groups
    note = lambda places, *rest: mixed.append(places.size) or permute(places, *rest)
    monkeypatch.setattr(mixture_order, "permute_groups", note)
    order = order_of([0.7, 0.3], 16, 0, [1000, 70], [0, 700])
    for step in (0, 10**12):
        order.places(step, np.arange(4, 8))
    assert sum(mixed) == 8  # a process pays for its own rows only
    assert len(order._plan[0]) == 2  # segments, however many steps


# --- limits ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    limits=st.lists(st.integers(20, 400), min_size=4, max_size=4),
    batch=st.integers(4, 24),
    seed=SEEDS,
)
def test_a_part_leaves_before_it_exceeds_its_limit_and_the_others_share_its_rows(
    weights, limits, batch, seed
) -> None:
    limits = [*limits[: len(weights) - 1], 0]  # the last one goes on for ever
    order = order_of(weights, batch, seed, limits=limits)
    assert order.steps is None
    used_K, gone = np.zeros(len(weights), int), set()
    for step in range(max(order.leaves.values()) + 3):
        gone |= {name for name, last in order.leaves.items() if last <= step}
        counts = rows_by_part(order, step)
        active = [name not in gone for name in order.names]
        total = sum(w for w, a in zip(weights, active, strict=True) if a)
        for count, weight, here in zip(counts, weights, active, strict=True):
            assert abs(count - (weight / total * batch if here else 0)) < 1
        used_K += counts
        np.testing.assert_array_equal(used_K, order.used(step + 1))
    assert gone == set(order.names[:-1])
    for limit, used in zip(limits[:-1], used_K.tolist(), strict=False):
        assert used <= limit
        assert used > limit - batch  # no more than a batch's share is left


def test_the_order_ends_with_the_first_limit_or_with_the_last() -> None:
    order = order_of([1, 1], 4, 0, [10, 50], [20, 50], stops=True)
    assert (order.steps, order.leaves) == (10, {"p0": 10})
    order = replace(order, stops=False)
    assert order.leaves == {"p0": 10, "p1": 17}  # 30 rows left, four in each batch
    assert order.steps == 17
    assert order.used(17).tolist() == [20, 48]


@pytest.mark.parametrize(
    ("epochs", "windows", "rows"), [(0.0, 5, 0), (1.0, 5, 5), (1.5, 5, 7), (0.01, 5, 1)]
)
def test_rows_of_epochs(epochs: float, windows: int, rows: int) -> None:
    assert mixture_order.rows_of(epochs, windows) == rows


# --- stretches -------------------------------------------------------------------------------


def stretched(*stretches: Stretch, limits=None, stops=False, seed=0) -> MixtureOrder:
    count = len(stretches[0].windows)
    names = tuple(f"p{number}" for number in range(count))
    return MixtureOrder(names, stretches, seed, tuple(limits or [0] * count), stops)


def test_windows_of_one_length_go_on_where_they_were_left() -> None:
    """Each window of a length once, whatever batches, weights and other lengths lie between."""
    order = stretched(
        Stretch(4, (40, 24), (1.0, 1.0)),
        Stretch(2, (10, 6), (1.0, 0.0), first=5, seq_len=4),
        Stretch(6, (40, 24), (2.0, 1.0), first=8),
    )
    seen = [order.places(step) for step in (*range(5), *range(8, 12))]
    for part, count in enumerate((10 + 16, 10 + 8)):
        ids = np.concatenate([windows_B[parts_B == part] for parts_B, windows_B in seen])
        assert len(set(ids.tolist())) == len(ids) == count
    between = [order.places(step) for step in range(5, 8)]
    assert not np.concatenate([parts_B for parts_B, _ in between]).any()
    assert len({*np.concatenate([windows_B for _, windows_B in between]).tolist()}) == 6
    assert order.epochs_at(5) == {"p0": 10 / 40, "p1": 10 / 24}
    assert order.epochs_at(8) == {"p0": 10 / 40 + 6 / 10, "p1": 10 / 24}
    assert order.epochs_at(12) == pytest.approx({"p0": 26 / 40 + 6 / 10, "p1": 18 / 24})


def test_a_stretch_that_is_to_come_changes_nothing_before_it() -> None:
    first = Stretch(8, (50, 30), (3.0, 1.0))
    alone = stretched(first)
    longer = stretched(first, Stretch(4, (5, 3), (1.0, 1.0), first=20, seq_len=10))
    for step in range(20):
        np.testing.assert_array_equal(alone.places(step), longer.places(step))


def test_a_limit_counts_the_epochs_of_all_lengths() -> None:
    """A part is used for half an epoch in short windows, and leaves after the other half."""
    short = Stretch(4, (40, 1000), (1.0, 1.0))
    long = Stretch(2, (20, 500), (1.0, 1.0), first=10, seq_len=2)
    order = stretched(short, long, limits=(1.0, 0))
    assert order.leaves == {"p0": 20}
    assert order.epochs_at(20)["p0"] == 1.0
    assert order.places(19)[0].tolist() == [0, 1]
    assert order.places(20)[0].tolist() == [1, 1]
    ended = stretched(short, long, limits=(1.0, 0), stops=True)
    assert ended.steps == 20


def test_an_order_ends_with_the_parts_of_its_stage() -> None:
    order = stretched(
        Stretch(4, (40, 8), (1.0, 0.0)),
        Stretch(4, (40, 8), (0.0, 1.0), first=3),
        limits=(0, 1.0),
    )
    assert (order.steps, order.leaves) == (5, {"p1": 5})


def test_a_part_may_leave_just_where_a_stretch_ends() -> None:
    one = Stretch(4, (8, 100), (1.0, 1.0))
    order = stretched(one, replace(one, first=4), limits=(1.0, 0))
    assert order.leaves == {"p0": 4}
    assert (order.places(3)[0] == 0).sum() == 2
    assert order.places(4)[0].tolist() == [1] * 4
    assert order.epochs_at(6) == {"p0": 1.0, "p1": 16 / 100}


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    lengths=st.lists(st.sampled_from([1, 2, 5]), min_size=4, max_size=4),
    steps=st.integers(1, 30),
    seed=SEEDS,
)
def test_rows_add_up_over_stretches_and_any_process_has_the_same(
    batches, lengths, steps, seed
) -> None:
    stretches = [
        Stretch(batch, (60 // n, 30 // n), (2.0, 1.0), first=steps * number, seq_len=n)
        for number, (batch, n) in enumerate(zip(batches, lengths, strict=False))
    ]
    order = stretched(*stretches, seed=seed)
    spent = np.zeros(2)
    for step in range(steps * len(stretches)):
        stretch = stretches[step // steps]
        assert order.epochs_at(step) == pytest.approx(dict(zip(order.names, spent, strict=True)))
        parts_B, windows_B = order.places(step)
        assert len(parts_B) == stretch.batch
        assert (windows_B < np.array(stretch.windows)[parts_B]).all()
        spent += np.bincount(parts_B, minlength=2) / stretch.windows
        odd = np.arange(1, stretch.batch, 2)
        np.testing.assert_array_equal(
            order.places(step, odd), np.stack([parts_B, windows_B])[:, odd]
        )


def test_what_is_left_of_a_part_may_be_enough_for_the_smaller_batches_of_a_stretch() -> None:
    """Two rows are left where the first stretch would take four, and the second takes one."""
    first = Stretch(8, (10, 100), (1.0, 1.0))
    order = stretched(first, replace(first, batch=2, first=2), limits=(1.0, 0))
    assert order.leaves == {"p0": 4}
    assert order.epochs_at(4)["p0"] == 1.0
