"""The token store: tokens round-trip, any zarr reader reads them, and damage is reported."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import store
from gptjax.data.store import Manifest, Reader, Split, Writer
from gptjax.errors import DataError, OutputError

RANGE = store._RANGE_TOKENS
NARROW, WIDE = store.token_dtype(1000), store.token_dtype(100_000)

PER_FILE = st.sampled_from([RANGE, 2 * RANGE, 3 * RANGE])
LENGTHS = st.one_of(
    st.integers(1, 4 * RANGE),
    st.builds(lambda n, off: max(1, n * RANGE + off), st.integers(1, 6), st.integers(-1, 1)),
)
CUTS = st.lists(st.floats(0, 1), max_size=6)


def draw(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of which none is zero, so that padding is told apart."""
    return np.random.default_rng(seed).integers(1, 1000, count)


def write(
    folder: Path, tokens: np.ndarray, per_file: int, cuts: Sequence[float] = (), dtype=NARROW
) -> tuple[tuple[str, ...], str]:
    writer = Writer(folder, dtype, 0, per_file)
    for part in np.split(tokens, sorted(int(cut * len(tokens)) for cut in cuts)):
        writer.append(part)
    assert writer.tokens == len(tokens)
    return writer.close()


def manifest_of(
    lengths: dict[str, int],
    hashes: dict[str, tuple[tuple[str, ...], str]],
    per_file: int,
    dtype=NARROW,
    vocab_size: int = 1000,
) -> Manifest:
    return Manifest(
        tokenizer={"kind": "bytes", "sha256": "ab" * 32, "vocab_size": vocab_size, "eos_id": 256},
        data={"sources": ["é.txt"], "valid_fraction": 0.02},
        counts={"empty": 1},
        dtype=dtype.str,
        splits={
            name: Split(3, n, 5 * n, hashes[name][0], checksums_sha256=hashes[name][1])
            for name, n in lengths.items()
        },
        file_tokens=per_file,
    )


@contextmanager
def stored(
    tokens: np.ndarray, per_file: int, cuts=(), dtype=NARROW, vocab_size: int = 1000
) -> Iterator[Reader]:
    """A reader of tokens that were written in parts."""
    with tempfile.TemporaryDirectory() as folder:
        hashes = write(Path(folder, "train"), tokens, per_file, cuts, dtype)
        lengths = {"train": len(tokens)}
        manifest = manifest_of(lengths, {"train": hashes}, per_file, dtype, vocab_size)
        yield Reader(folder, "train", manifest)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- writing and reading ---------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    length=LENGTHS, per_file=PER_FILE, cuts=CUTS, width=st.integers(1, 2 * RANGE), data=st.data()
)
def test_windows_equal_the_written_tokens_and_zeros_past_the_end(
    length, per_file, cuts, width, data
):
    tokens = draw(length)
    starts = data.draw(st.lists(st.integers(0, length + width), min_size=1, max_size=5))
    starts += [0, length - 1, length, per_file - 1]  # over the first file's end, if it has one
    padded = np.concatenate([tokens, np.zeros(3 * (per_file + length + width), int)])
    with stored(tokens, per_file, cuts) as reader:
        assert len(reader) == length
        windows = reader.windows(np.array(starts), width)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, np.stack([padded[s : s + width] for s in starts]))


def test_window_may_span_several_files() -> None:
    tokens = draw(4 * RANGE + 10)
    with stored(tokens, RANGE) as reader:
        (window,) = reader.windows(np.array([RANGE - 5]), 3 * RANGE)
    np.testing.assert_array_equal(window, tokens[RANGE - 5 :][: 3 * RANGE])


@pytest.mark.parametrize(("vocab", "name"), [(258, "u2"), (1 << 16, "u2"), ((1 << 16) + 1, "u4")])
def test_largest_token_id_round_trips(vocab: int, name: str) -> None:
    dtype = store.token_dtype(vocab)
    assert dtype == np.dtype(f"<{name}")
    tokens = np.array([0, vocab - 1, 1], np.uint32)
    with stored(tokens, RANGE, dtype=dtype, vocab_size=vocab) as reader:
        assert reader.windows(np.array([0]), 3).tolist() == [[0, vocab - 1, 1]]


@settings(max_examples=20, deadline=None)
@given(length=LENGTHS, per_file=PER_FILE, cuts=CUTS, dtype=st.sampled_from([NARROW, WIDE]))
def test_split_is_a_valid_zarr_array(length, per_file, cuts, dtype) -> None:
    import tensorstore

    tokens = draw(length)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), tokens, per_file, cuts, dtype)
        spec = {"driver": "zarr3", "kvstore": f"file://{folder}/"}
        array = tensorstore.open(spec, read=True).result()
        read = array.read().result()
        assert array.chunk_layout.write_chunk.shape == (per_file,)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, tokens)


def test_remote_store_reads_like_a_local_one(tmp_path: Path, monkeypatch) -> None:
    """The bucket is a folder here; TensorStore reads the same files either way."""
    import tensorstore

    tokens, per_file, width = draw(2 * RANGE + 50), RANGE, 20
    hashes = write(tmp_path / "train", tokens, per_file)
    manifest = manifest_of({"train": len(tokens)}, {"train": hashes}, per_file)
    open_array = tensorstore.open

    def open_here(spec, **options):
        kvstore = {"driver": "file", "path": f"{tmp_path}/{spec['kvstore']['path']}"}
        return open_array({**spec, "kvstore": kvstore}, **options)

    monkeypatch.setattr(tensorstore, "open", open_here)
    read_checksums = store._read_checksums
    monkeypatch.setattr(
        store, "_read_checksums", lambda _, *rest: read_checksums(tmp_path / "train", *rest)
    )
    starts = np.array([0, 5, RANGE - 3, len(tokens) - 7, len(tokens), len(tokens) + 9])
    windows = Reader("gs://bucket", "train", manifest).windows(starts, width)
    np.testing.assert_array_equal(
        windows, Reader(str(tmp_path), "train", manifest).windows(starts, width)
    )
    assert windows[2].all()
    assert np.count_nonzero(windows[3:], axis=1).tolist() == [7, 0, 0]
    flip(tmp_path / "train/c/1", 9)
    reader = Reader("gs://bucket", "train", manifest)
    with pytest.raises(DataError, match=rf"tokens {RANGE} to {2 * RANGE - 1} differ"):
        reader.windows(np.array([RANGE - 3]), width)


# --- damage ----------------------------------------------------------------------------------


def flip(file: Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def test_a_flipped_bit_is_never_read(tmp_path: Path, monkeypatch) -> None:
    """Each of 300 flips of a bit is told, at opening or when its window is read, and no other."""
    monkeypatch.setattr(store, "_SAMPLED", 1)
    tokens, per_file = draw(6 * RANGE + 50), 2 * RANGE
    hashes = write(tmp_path / "train", tokens, per_file)
    manifest = manifest_of({"train": len(tokens)}, {"train": hashes}, per_file)
    draws, told_at_opening = np.random.default_rng(1), 0
    for _ in range(300):
        token, bit = int(draws.integers(len(tokens))), int(draws.integers(16))
        file = tmp_path / "train/c" / str(token // per_file)
        place = token % per_file * 16 + bit
        flip(file, place)
        try:
            reader = Reader(str(tmp_path), "train", manifest)
        except DataError:
            told_at_opening += 1
        else:
            with pytest.raises(DataError, match="differ from their checksum"):
                reader.windows(np.array([max(0, token - 7)]), 9)
            elsewhere = (token // RANGE + 2) % 6 * RANGE
            np.testing.assert_array_equal(
                reader.windows(np.array([elsewhere]), 50)[0], tokens[elsewhere : elsewhere + 50]
            )
        flip(file, place)
    assert 0 < told_at_opening < 300
    Reader(str(tmp_path), "train", manifest).windows(np.array([0]), len(tokens))


def test_ids_beyond_the_vocabulary_are_never_read(tmp_path: Path) -> None:
    """Also in a store of before there were checksums."""
    tokens = draw(2 * RANGE)
    tokens[RANGE + 7] = 1000
    hashes, _ = write(tmp_path / "train", tokens, RANGE)
    manifest = manifest_of({"train": len(tokens)}, {"train": (hashes, "")}, RANGE)
    store.write_manifest(tmp_path, manifest)
    reader = Reader(str(tmp_path), "train", manifest)
    assert reader.windows(np.array([0]), RANGE + 7).max() < 1000
    with pytest.raises(DataError, match=f"token {RANGE + 7} has the id 1000, and the vocabulary"):
        reader.windows(np.array([5, RANGE]), 8)
    (problem,) = store.verify(str(tmp_path))
    assert problem.startswith(f"{tmp_path / 'train/c/1'}: 1 ids are beyond the vocabulary")


@pytest.mark.parametrize("damage", [b"", b"\0" * 12])
def test_damaged_checksums_are_reported(made, damage: bytes) -> None:
    folder, manifest = made
    (folder / "train/crc32").write_bytes(damage)
    with pytest.raises(DataError, match="crc32: is damaged or missing"):
        Reader(str(folder), "train", manifest)
    (problem,) = store.verify(str(folder))
    assert "train/crc32" in problem


# --- continuing where a writer stopped -------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(length=LENGTHS, per_file=PER_FILE, keep=st.floats(0, 1), more=LENGTHS, closed=st.booleans())
def test_writer_reopened_at_fewer_tokens_truncates_the_rest(
    length: int, per_file: int, keep: float, more: int, closed: bool
) -> None:
    before, after = draw(length), draw(more, seed=1)
    kept = int(keep * length)
    with tempfile.TemporaryDirectory() as name:
        cut, clean, left = (Path(name, part) for part in ("cut", "clean", "left"))
        writer = Writer(left, NARROW, 0, per_file)
        writer.append(before[:kept])
        writer.flush()
        writer.append(before[kept:])
        if closed:
            writer.close()
        shutil.copytree(left, cut)  # what is on disk if the process ends here
        writer = Writer(cut, NARROW, kept, per_file)
        assert writer.tokens == kept
        writer.append(after)
        hashes = writer.close()
        assert hashes == write(clean, np.concatenate([before[:kept], after]), per_file)
        assert contents(cut) == contents(clean)


def test_missing_written_tokens_are_detected(tmp_path: Path) -> None:
    writer = Writer(tmp_path, NARROW, 0, RANGE)
    writer.append(draw(RANGE + 100))
    writer.flush()
    file = tmp_path / "c" / "1"
    assert file.stat().st_size == 200
    file.write_bytes(file.read_bytes()[:198])
    with pytest.raises(DataError, match="shorter than the journal says") as caught:
        Writer(tmp_path, NARROW, RANGE + 100, RANGE)
    assert str(file) in str(caught.value)


# --- the manifest ----------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Manifest]:
    """A store of two splits, the first of three files, and its manifest."""
    lengths = {"train": 2 * RANGE + 9, "valid": 40}
    hashes = {name: write(tmp_path / name, draw(n), RANGE) for name, n in lengths.items()}
    assert [len(files) for files, _ in hashes.values()] == [3, 1]
    manifest = manifest_of(lengths, hashes, RANGE)
    store.write_manifest(tmp_path, manifest)
    return tmp_path, manifest


def test_manifest_round_trips(made) -> None:
    folder, manifest = made
    assert store.read_manifest(str(folder)) == manifest
    assert list(store.verify(str(folder))) == []
    names = {path.name for path in folder.iterdir()}
    assert names == {"train", "valid", "manifest.json"}  # nothing half-written


def test_fingerprint_covers_tokens_and_tokenizer_only(made) -> None:
    _, manifest = made
    changed = lambda **fields: dataclasses.replace(manifest, **fields).fingerprint()
    before = manifest.fingerprint()
    assert changed(data={"sources": ["elsewhere.txt"]}, counts={}) == before
    assert changed(tokenizer={**manifest.tokenizer, "sha256": "cd" * 32}) != before
    train = manifest.splits["train"]
    hashes = ("00" * 32, *train.files_sha256[1:])
    other = dataclasses.replace(train, files_sha256=hashes)
    assert changed(splits={**manifest.splits, "train": other}) != before


def edited(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        values = json.loads(raw)
        change(values)
        return json.dumps(values).encode()

    return edit


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "no UTF-8": lambda raw: raw.replace(b"train", b"tra\xe9n"),
    "no object": lambda raw: b"[1, 2]",
    "no format": edited(lambda v: v.pop("format")),
    "another format": edited(lambda v: v.update(format=store.FORMAT + 1)),
    "no tokenizer": edited(lambda v: v.pop("tokenizer")),
    "an unknown field": edited(lambda v: v.update(colour=3)),
    "an unknown type": edited(lambda v: v.update(dtype="<u3")),
    "splits of another kind": edited(lambda v: v.update(splits=[1])),
    "a split of another kind": edited(lambda v: v["splits"].update(train=7)),
    "a split without hashes": edited(lambda v: v["splits"]["train"].pop("files_sha256")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_manifest_is_reported(made, damage: str) -> None:
    file = made[0] / store.MANIFEST
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(DataError) as caught:
        store.read_manifest(str(made[0]))
    assert str(file) in str(caught.value)


def test_flipped_bit_in_the_manifest_raises_only_data_errors(made) -> None:
    """The flip raises DataError, or changes a value without making the manifest unreadable."""
    folder, _ = made
    file = folder / store.MANIFEST
    raw = file.read_bytes()
    rng = np.random.default_rng(0)
    found = 0
    for bit in rng.choice(len(raw) * 8, 200, replace=False):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            store.read_manifest(str(folder))
        except DataError:
            found += 1
    assert found > 50


def test_folder_without_a_manifest_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: not a token store.*gptjax data prepare"):
        store.read_manifest(str(tmp_path))


@pytest.mark.parametrize("file", ["train/c/0", "train/c/2", "valid/c/0"])
@pytest.mark.parametrize("change", [-1, 1, None])
def test_file_of_wrong_size_is_reported(made, file: str, change: int | None) -> None:
    folder, _ = made
    path = folder / file
    raw = path.read_bytes()
    if change is None:
        path.unlink()
    else:
        path.write_bytes((raw + b"\0")[: len(raw) + change])
    for use in (store.read_manifest, lambda s: list(store.verify(s))):
        with pytest.raises(DataError, match=f"{path}: .* bytes where the manifest says {len(raw)}"):
            use(str(folder))


@pytest.mark.parametrize("file", ["train/c/1", "valid/c/0"])
def test_flipped_bit_in_a_file_is_reported(made, file: str) -> None:
    folder, _ = made
    path = folder / file
    raw = bytearray(path.read_bytes())
    raw[5] ^= 16
    path.write_bytes(raw)
    (problem,) = store.verify(str(folder))
    assert str(path) in problem
    assert "SHA-256" in problem


def test_unwritable_manifest_is_reported(tmp_path: Path) -> None:
    manifest = manifest_of({"train": 1}, {"train": ((), "")}, RANGE)
    with pytest.raises(OutputError, match=f"{tmp_path}/absent: cannot be written"):
        store.write_manifest(tmp_path / "absent", manifest)
