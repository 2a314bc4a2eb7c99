"""Whole documents in rows: each once, none cut but those longer than a row, few rows."""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.config import Config, DataConfig, EvalConfig, MeshConfig, StageConfig, TrainConfig
from gptjax.data import packing, store
from gptjax.data.loader import TrainData
from gptjax.data.mixture import Manifests
from gptjax.data.store import Manifest, Reader, Split, Writer
from gptjax.errors import ConfigError, DataError

EOS, BOS = 0, 1


def written(folder: Path, sizes, start: int) -> tuple[Manifest, list[list[int]]]:
    """A store of documents of so many tokens, all of which differ, without their special tokens."""
    tokens, documents, following = [EOS] if start == EOS else [], [], 2
    for size in sizes:
        documents.append(list(range(following, following + size)))
        following += size
        tokens += [*([start] if start != EOS else []), *documents[-1], EOS]
    tokens += [start] if start != EOS else []
    writer = Writer(folder / "train", store.token_dtype(1 << 16), 0)
    writer.append(np.array(tokens))
    hashes, checksums = writer.close()
    split = Split(len(sizes), len(tokens), 1, hashes, checksums_sha256=checksums)
    known = {"eos_id": EOS, "start_id": start, "vocab_size": 1 << 16}
    manifest = Manifest(known, {}, {}, "<u2", {"train": split})
    store.write_manifest(folder, manifest)
    return manifest, documents


def rows_of(folder: Path, manifest: Manifest, seq_len: int) -> tuple[packing.Packing, list]:
    """The packing of a store, and the tokens of each of its rows."""
    packing.prepare(str(folder), manifest, seq_len)
    packed = packing.open_packing(str(folder), manifest, seq_len)
    windows = np.full((len(packed), seq_len + 1), 0, np.int32)
    numbers = np.arange(len(packed))
    targets = packed.read_into(windows, numbers, numbers, Reader(str(folder), "train", manifest))
    assert not any(
        window[count + 1 :].any() for window, count in zip(windows, targets, strict=True)
    )
    rows = [row[: n + 1].tolist() for row, n in zip(windows, targets, strict=True)]
    return packed, rows


def split_at(row: list[int], start: int) -> list[list[int]]:
    """The documents of a row as training tells them apart: each begins at a start token."""
    found: list[list[int]] = [[]]
    for token in row:
        if token == start and (found[0] or len(found) > 1):
            found.append([])
        found[-1].append(token)
    return found


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    seq_len=st.integers(2, 24),
    start=st.sampled_from([EOS, BOS]),
    block=st.sampled_from([4, 1 << 22]),
)
@example(sizes=[48, 24, 23, 25, 0], seq_len=24, start=EOS, block=1 << 22)
@example(sizes=[48, 24, 23, 25, 0], seq_len=24, start=BOS, block=1 << 22)
def test_each_document_is_in_one_row_and_long_ones_go_through_several(
    sizes, seq_len, start, block
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK", block)
        patch.setattr(packing, "_SCANNED", 37)
        folder = Path(name)
        manifest, documents = written(folder, sizes, start)
        packed, rows = rows_of(folder, manifest, seq_len)
    predicted: list[int] = []
    for number, row in enumerate(rows):
        assert 2 <= len(row) <= seq_len + 1
        pieces = split_at(row, start)
        if start == EOS and pieces[-1] == [EOS]:
            pieces.pop()  # the end of the document before, which would open the next
        for place, piece in enumerate(pieces):
            whole = piece[0] == start
            assert whole or place == 0  # only the rest of a long one begins without
            body = [token for token in piece if token > 1]
            if whole and body:
                size = next(len(d) for d in documents if d and d[0] == body[0])
                assert len(body) == size or len(pieces) == 1
        told = packed.row(number)[2].tolist()
        mine = [n for n, d in enumerate(documents) if set(d) & set(row)]
        assert set(mine) <= set(told)
        predicted += [token for token in row[1:] if token > 1]
    # Every token is predicted once, but for the first after BOS of nothing.
    assert sorted(predicted) == [token for document in documents for token in document]
    long = [size + 1 > seq_len for size in sizes]
    assert packed.counts.documents == len(sizes)
    assert packed.counts.cut == sum(long)
    assert packed.counts.tokens == sum(map(len, rows))


def one_at_a_time(costs: list[int], capacity: int) -> list[int]:
    """The definition of best-fit decreasing, the first of rows with equal room."""
    left: list[int] = []
    rows = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        fits = [(room, row) for row, room in enumerate(left) if room >= costs[item]]
        rows[item] = min(fits)[1] if fits else len(left)
        left += [] if fits else [capacity]
        left[rows[item]] -= costs[item]
    return rows


@settings(max_examples=200, deadline=None)
@given(costs=st.lists(st.integers(1, 30), min_size=1, max_size=120))
def test_rows_are_those_of_one_document_at_a_time(costs) -> None:
    assert packing.best_fit(np.array(costs), 30).tolist() == one_at_a_time(costs, 30)


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.integers(1, 30), min_size=1, max_size=200),
    rooms=st.lists(st.integers(0, 30), max_size=10),
)
def test_no_row_is_too_full_and_few_are_needed(costs, rooms) -> None:
    rows = packing.best_fit(np.array(costs), 30, np.array(rooms, np.int64))
    used = np.bincount(rows, weights=costs, minlength=len(rooms))
    assert (used[: len(rooms)] <= rooms).all()
    assert (used[len(rooms) :] <= 30).all()
    opened = used[len(rooms) :]
    assert opened.all()  # none without an item
    if not rooms and len(opened) > 1:
        smallest_two = np.sort(opened)[:2]
        assert smallest_two.sum() > 30  # otherwise one row would do


def test_each_goes_into_the_row_with_the_least_room_that_holds_it() -> None:
    rows = lambda costs, capacity: packing.best_fit(np.array(costs), capacity).tolist()
    assert rows([3, 7, 5, 3, 2], 10) == [0, 0, 1, 1, 1]
    assert rows([4, 4, 4], 4) == [0, 1, 2]
    assert rows([6, 8, 2, 4], 10) == [1, 0, 0, 1]  # not into the first row with room


def test_packing_is_nearly_full_on_documents_of_many_lengths() -> None:
    costs = np.random.default_rng(0).lognormal(5, 1.2, 20_000).astype(int).clip(1, 2048)
    rows = packing.best_fit(costs, 2048)
    assert rows.max() + 1 <= 1.001 * costs.sum() / 2048 + 1


@pytest.fixture
def made(tmp_path: Path) -> tuple[Config, Manifest]:
    sizes = np.random.default_rng(1).integers(0, 30, 400).tolist()
    manifest, _ = written(tmp_path / "store", sizes, EOS)
    return Config(
        data=DataConfig(store=str(tmp_path / "store"), documents="mask", packing="documents"),
        train=TrainConfig(tokens=12 * 128, seq_len=16, batch_tokens=128),
        eval=EvalConfig(sample_tokens=8),
    ), manifest


def opened(cfg: Config, manifest: Manifest) -> TrainData:
    for length in {16, *(one.seq_len for one in cfg.stages.values())} - {0}:
        packing.prepare(cfg.data.store, manifest, length)
    return TrainData.open(cfg, Manifests({"": manifest}))


def test_batches_have_each_row_once_an_epoch_and_its_number_of_targets(made) -> None:
    cfg, manifest = made
    data = opened(cfg, manifest)
    rows = len(data.packings[16][0])
    seen = np.concatenate([data.order.places(step)[1] for step in range(-(-rows // 8))])
    assert sorted(seen[:rows].tolist()) == list(range(rows))
    batches = list(data.batches(3, 9, {8: np.array([1, 4])}, 4))
    windows_NBW, targets_NB = data.read(range(3, 9))
    for batch, windows_BW, targets_B in zip(batches, windows_NBW, targets_NB, strict=True):
        np.testing.assert_array_equal(batch.windows_BW, windows_BW[[1, 4]])
        np.testing.assert_array_equal(batch.lengths_B, targets_B[[1, 4]])
    assert (targets_NB < 16).any()
    assert targets_NB.mean() > 15


def test_rows_of_each_stages_length_are_packed(made) -> None:
    cfg, manifest = made
    stages = {"short": StageConfig(tokens=768), "long": StageConfig(seq_len=32)}
    data = opened(dataclasses.replace(cfg, stages=stages), manifest)
    assert data.read(range(5, 6))[0].shape == (1, 8, 17)
    assert data.read(range(6, 7))[0].shape == (1, 4, 33)


def test_what_is_damaged_missing_or_of_other_tokens_is_refused(made, tmp_path: Path) -> None:
    cfg, manifest = made
    with pytest.raises(DataError, match=r"have not been packed into rows of 16 tokens; do it with"):
        TrainData.open(cfg, Manifests({"": manifest}))
    opened(cfg, manifest)
    folder = tmp_path / "store/packed-16"
    index = json.loads((folder / packing.INDEX).read_text())
    for name in ("pieces", "lengths", "rows"):
        raw = (folder / name).read_bytes()
        assert index["sha256"][name] == hashlib.sha256(raw).hexdigest()
        (folder / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(DataError, match=rf"packed-16/{name}: is damaged or missing; delete"):
            opened(cfg, manifest)
        (folder / name).write_bytes(raw)
    (folder / "pieces").write_bytes((folder / "pieces").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"packed-16/pieces: is damaged or missing; delete"):
        opened(cfg, manifest)
    (folder / packing.INDEX).write_text(json.dumps({"format": 2}))
    with pytest.raises(DataError, match=r"packed-16: format 2; this version of gptjax reads"):
        opened(cfg, manifest)
    (folder / packing.INDEX).write_text(json.dumps(index | {"store": "other"}))
    with pytest.raises(DataError, match="was made of other tokens than the store has"):
        opened(cfg, manifest)
    (folder / packing.INDEX).write_text("{")
    with pytest.raises(DataError, match=r"packed.json is damaged"):
        opened(cfg, manifest)


def test_a_packing_that_was_begun_is_made_anew_and_a_finished_one_is_taken(made, tmp_path) -> None:
    cfg, manifest = made
    folder = tmp_path / "store/packed-16"
    folder.mkdir()
    (folder / "pieces").write_bytes(b"half of them")
    told: list[str] = []
    packing.prepare(cfg.data.store, manifest, 16, told.append)
    packing.prepare(cfg.data.store, manifest, 16, told.append)
    assert len(told) == 1
    assert "documents in" in told[0]
    opened(cfg, manifest)


def test_packing_documents_requires_masks(made) -> None:
    cfg, _ = made
    data = dataclasses.replace(cfg.data, documents="ignore")
    with pytest.raises(ConfigError, match=r"data.packing=documents: requires data.documents=mask"):
        dataclasses.replace(cfg, data=data, mesh=MeshConfig()).check()
