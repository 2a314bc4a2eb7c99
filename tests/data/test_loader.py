"""The input pipeline: the windows that `Order` gives, from any step, in any process."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.config import Config, DataConfig, TrainConfig
from gptjax.data import loader, store, tf_import
from gptjax.data.loader import Batch, TrainData
from gptjax.data.mixture import Manifests
from gptjax.data.permutation import Order
from gptjax.data.store import Manifest, Reader, Split, Writer
from gptjax.errors import DataError

SEQ = 8


def tokens_of(count: int) -> np.ndarray:
    """Distinct tokens, which identify a window's place."""
    return np.arange(1, count + 1)


def write(folder: Path, count: int, per_file: int = store._RANGE_TOKENS) -> Manifest:
    writer = Writer(folder / "train", store.token_dtype(1 << 16), 0, per_file)
    writer.append(tokens_of(count))
    hashes, checksums = writer.close()
    split = Split(1, count, count, hashes, checksums_sha256=checksums)
    known = {"eos_id": 0, "vocab_size": 1 << 16}
    return Manifest(known, {}, {}, "<u2", {"train": split}, per_file)


@contextmanager
def stored(count: int) -> Iterator[Reader]:
    with tempfile.TemporaryDirectory() as folder:
        yield Reader(folder, "train", write(Path(folder), count))


@pytest.fixture(scope="module", autouse=True)
def tensorflow() -> None:
    """It is there, so that streams are tf.data's from their first step on."""
    tf_import.importing().result()


def test_steps_are_the_same_before_and_after_tensorflow_is_there(monkeypatch) -> None:
    importing, read, asked = Future(), loader._stream, []

    def steps_of(steps: range) -> np.ndarray:
        asked.append(steps)
        if len(asked) == 3:
            importing.set_result(tf_import.import_tensorflow())
        return np.array([[step * 10] for step in steps], np.int32)

    monkeypatch.setattr(tf_import, "importing", lambda: importing)
    assert [int(x[0]) for x in read(steps_of, 5, 17, 4)] == list(range(50, 170, 10))
    assert asked == [
        range(5, 6),
        range(6, 7),
        range(7, 8),
        *(range(n, min(n + 2, 17)) for n in range(8, 17, 2)),
    ]
    importing = Future()
    assert [int(x[0]) for x in read(lambda steps: np.array([[n] for n in steps]), 1, 3, 4)] == [
        1,
        2,
    ]


LONG, BATCH = 50, 12  # tokens of a window, and windows of a batch, of the store below


def config(folder: Path, seq_len: int, batch: int) -> Config:
    return Config(
        data=DataConfig(store=str(folder)),
        train=TrainConfig(seq_len=seq_len, batch_tokens=batch * seq_len, seed=3),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TrainData:
    """203 windows and a rest, over three files."""
    folder = tmp_path_factory.mktemp("pipeline")
    count = 203 * LONG + 1 + 20
    assert count > 2 * store._RANGE_TOKENS
    return TrainData.open(config(folder, LONG, BATCH), Manifests({"": write(folder, count)}))


def train(
    data: TrainData, first: int, last: int, rows: np.ndarray | None = None, prefetch: int = 8
) -> list[Batch]:
    rows = np.arange(BATCH) if rows is None else rows
    return list(data.batches(first, last, {BATCH: rows}, prefetch))


def windows(batches: list[Batch]) -> list[list]:
    return [batch.windows_BW.tolist() for batch in batches]


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(1, 0), (SEQ, 0), (SEQ + 1, 1), (2 * SEQ, 1), (2 * SEQ + 1, 2)]
)
def test_training_windows_are_complete_and_overlap_by_one_token(tokens, wanted) -> None:
    assert loader.training_windows(tokens, SEQ) == wanted


def test_batches_hold_the_windows_that_the_order_gives(data: TrainData) -> None:
    tokens, order = tokens_of(len(data.readers[0])), Order(203, BATCH, seed=3)
    batches = train(data, 0, 40)  # more than two epochs
    assert len(batches) == 40
    for step, batch in enumerate(batches):
        ids = order.ids(step)
        wanted = np.stack([tokens[i * LONG : (i + 1) * LONG + 1] for i in ids])
        np.testing.assert_array_equal(batch.windows_BW, wanted)
        assert batch.windows_BW.dtype == batch.lengths_B.dtype == np.int32
        assert batch.lengths_B.tolist() == [LONG] * BATCH
        np.testing.assert_array_equal(data.order.places(step)[1], ids)
        np.testing.assert_array_equal(data.read(range(step, step + 1))[0][0], wanted)


@pytest.mark.parametrize("prefetch", [1, 2, 7, 32])
@pytest.mark.parametrize("first", [0, 1, 5, 16, 29])
def test_stream_started_at_a_later_step_equals_the_tail_of_the_full_stream(
    data, first, prefetch
) -> None:
    whole = windows(train(data, 0, 30))
    assert windows(train(data, first, 30, prefetch=prefetch)) == whole[first:]


def test_stream_started_at_or_after_the_last_step_is_empty(data: TrainData) -> None:
    assert train(data, 30, 30) == train(data, 31, 30) == []


def test_stream_starts_at_step_1e12(data: TrainData) -> None:
    first = 10**12
    (batch,) = train(data, first, first + 1)
    ids = Order(203, BATCH, seed=3).ids(first)
    assert batch.windows_BW[:, 0].tolist() == (ids * LONG + 1).tolist()


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("scattered", [False, True])
def test_rows_of_all_processes_form_the_global_batch(data, processes: int, scattered: bool) -> None:
    rows = np.arange(BATCH).reshape(processes, -1)
    rows = rows.reshape(-1, processes).T if scattered else rows
    streams = [train(data, 3, 9, own) for own in rows]
    for parts, whole in zip(zip(*streams, strict=True), train(data, 3, 9), strict=True):
        for own, part in zip(rows, parts, strict=True):
            np.testing.assert_array_equal(part.windows_BW, whole.windows_BW[own])
            np.testing.assert_array_equal(part.lengths_B, whole.lengths_B[own])


@pytest.mark.parametrize("tokens", [2, SEQ])
def test_store_shorter_than_one_window_is_refused(tmp_path: Path, tokens: int) -> None:
    cfg, manifest = config(tmp_path, SEQ, 4), write(tmp_path, tokens)
    message = f"data.store={tmp_path}: {tokens} training tokens, too few for a window"
    with pytest.raises(DataError, match=f"{message} of train.seq_len={SEQ}"):
        TrainData.open(cfg, Manifests({"": manifest}))


@dataclass
class Broken:
    """A reader that fails at one window."""

    reader: Reader
    bad: int
    vocab_size: int = 1 << 16

    def read_into(self, out: np.ndarray, starts: np.ndarray) -> None:
        if self.bad in starts:
            raise OSError(f"the disk has lost window {self.bad}")
        self.reader.read_into(out, starts)


def test_read_error_ends_the_stream_with_its_reason(data: TrainData) -> None:
    bad = int(data.order.places(9)[1][4]) * LONG
    broken = dataclasses.replace(data, readers=(Broken(data.readers[0], bad),))
    stream = broken.batches(0, 17, {BATCH: np.arange(BATCH)}, prefetch=4)
    got: list[Batch] = []
    with pytest.raises(OSError, match=f"the disk has lost window {bad}"):
        got.extend(stream)
    assert windows(got) == windows(train(data, 0, len(got)))
    assert 8 <= len(got) <= 9  # steps are read two at a time here


def test_a_damaged_window_ends_the_stream_with_a_sentence(tmp_path: Path) -> None:
    manifest = write(tmp_path, 203 * LONG + 1)
    data = TrainData.open(config(tmp_path, LONG, BATCH), Manifests({"": manifest}))
    data.readers[0]._checked[:] = False  # but for a sample, as in a larger store
    file = tmp_path / "train/c/1"
    with file.open("r+b") as stream:  # in place: the store is mapped
        stream.seek(100)
        stream.write(bytes([stream.peek(1)[0] ^ 1]))
    got: list[Batch] = []
    with pytest.raises(DataError, match=r"train: tokens 4096 to 8191 differ from their checksum"):
        got.extend(data.batches(0, 17, {BATCH: np.arange(BATCH)}, prefetch=4))
    assert windows(got) == windows(train(data, 0, len(got)))


# --- evaluation ------------------------------------------------------------------------------


def evaluate(reader: Reader, seq_len: int, batch: int, rows: tuple[int, int]) -> list[Batch]:
    return list(loader.eval_batches(reader, seq_len, batch, np.arange(*rows), prefetch=4))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(2, 120),
    seq_len=st.integers(1, 20),
    batch=st.integers(1, 8),
    data=st.data(),
)
@example(tokens=2, seq_len=20, batch=8, data=None)
@example(tokens=81, seq_len=20, batch=4, data=None)  # nothing to fill up
@example(tokens=82, seq_len=20, batch=4, data=None)  # a batch with one target
def test_evaluation_batches_have_each_target_exactly_once(tokens, seq_len, batch, data) -> None:
    with stored(tokens) as reader:
        batches = evaluate(reader, seq_len, batch, (0, batch))
        if data is not None and batch > 1:
            border = data.draw(st.integers(1, batch - 1))
            parts = (evaluate(reader, seq_len, batch, r) for r in ((0, border), (border, batch)))
            for one, two, both in zip(*parts, batches, strict=True):
                for name in ("windows_BW", "lengths_B"):
                    together = np.concatenate([getattr(one, name), getattr(two, name)])
                    np.testing.assert_array_equal(together, getattr(both, name))
    targets = []
    for window, length in ((w, n) for b in batches for w, n in zip(*vars(b).values(), strict=True)):
        assert window.shape == (seq_len + 1,)
        assert (window[1 : length + 1] == window[:length] + 1).all()  # tokens are 1, 2, 3, …
        targets += window[1 : length + 1].tolist()
    assert targets == list(range(2, tokens + 1))
    assert len(batches) == -(-(tokens - 1) // (seq_len * batch))
    for full in batches[:-1]:
        assert full.lengths_B.tolist() == [seq_len] * batch


def test_last_evaluation_batch_is_padded_with_empty_rows() -> None:
    with stored(1 + 5 * SEQ + 3) as reader:
        first, last = evaluate(reader, SEQ, 4, (0, 4))
    assert first.lengths_B.tolist() == [SEQ] * 4
    assert last.lengths_B.tolist() == [SEQ, 3, 0, 0]
    assert last.windows_BW.shape == (4, SEQ + 1)
    assert last.lengths_B.dtype == last.windows_BW.dtype == np.int32


# --- the benchmark ---------------------------------------------------------------------------


def test_benchmark_reports_lowest_median_and_highest_rate(tmp_path: Path) -> None:
    manifests = Manifests({"": write(tmp_path, 2000)})
    low, median, high = loader.bench(config(tmp_path, SEQ, 4), manifests, seconds=0.2)
    assert 0 < low <= median <= high


IMPORT = """
import sys
from gptjax.data.tf_import import import_tensorflow
tf = import_tensorflow()
assert "keras" not in sys.modules
assert tf.keras.__version__ >= "3"
"""


@pytest.mark.slow
def test_tensorflow_is_imported_without_keras_which_works_when_it_is_used() -> None:
    clean = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
