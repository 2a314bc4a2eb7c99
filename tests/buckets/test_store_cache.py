"""Copies of a store's files on the machine's own disk: always the store's tokens, within a limit.

A store here has seven files of two ranges, read in windows of 65 tokens.
"""

import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from servers import Bucket, Faults, _Handler

from gptjax import bucket as buckets
from gptjax.config import Config, DataConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.data import prepare_mixture, store, store_cache
from gptjax.data.loader import TrainData
from gptjax.data.mixture import read_manifests
from gptjax.data.store import Manifest, Reader
from gptjax.errors import ConfigError, DataError

RANGE = store._RANGE_TOKENS
SIZE = 2 * RANGE * 2 + 2 * 16  # of a file, with its index
LENGTH = 13 * RANGE + 50  # tokens, in seven files
STARTS = np.concatenate([np.arange(0, LENGTH, 64), [2 * RANGE - 9, LENGTH - 3, LENGTH + 5]])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A local store."""
    return make(tmp_path_factory.mktemp("made"), 0)


def make(folder: Path, seed: int) -> Path:
    tokens = np.random.default_rng(seed).integers(1, 1000, LENGTH)
    writer = store.Writer(folder / "train", store.token_dtype(1000), 0, 2 * RANGE)
    writer.append(tokens)
    hashes, checksums = writer.close()
    split = store.Split(3, LENGTH, 5 * LENGTH, hashes, checksums_sha256=checksums)
    facts = {"kind": "bytes", "sha256": "ab" * 32, "vocab_size": 1000, "eos_id": 256}
    manifest = Manifest(facts, {}, {}, "<u2", {"train": split}, 2 * RANGE)
    store.write_manifest(folder, manifest)
    return folder


@pytest.fixture
def there(place: str, made: Path) -> str:
    """The store in the bucket."""
    buckets.upload(made, place, store.MANIFEST)
    return place


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str | None]]:
    """The paths of the requests that the bucket has had, with the bytes that they are for."""
    seen, passed_on = [], _Handler._passed_on

    def note(self, body: bytes) -> object:
        seen.append((self.path, self.headers.get("Range")))
        return passed_on(self, body)

    monkeypatch.setattr(_Handler, "_passed_on", note)
    return seen


def opened(place: str, cache: Path | str, gigabytes: float = 1.0) -> Reader:
    return Reader(place, "train", store.read_manifest(place), str(cache), gigabytes)


def expected(made: Path) -> np.ndarray:
    return opened(str(made), "").windows(STARTS, 65)


def wait(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def copied(reader: Reader) -> int:
    return sum(file is not None for file in reader._files)


def copy(reader: Reader) -> Reader:
    """Begins the copy of all files, and waits until they are there."""
    reader.windows(np.array([0]), 1)
    wait(lambda: copied(reader) == 7)
    return reader


def copies(cache: Path) -> dict[str, int]:
    """Sizes of the files by name, which may be renamed meanwhile."""
    found = {}
    for path in cache.iterdir():
        with suppress(FileNotFoundError):
            found[path.name] = path.stat().st_size
    found.pop("lock", None)
    return found


def wait_for_threads() -> None:
    wait(lambda: not any(one.name == "store cache" for one in threading.enumerate()))


def test_windows_are_those_of_the_local_store_before_during_and_after_the_copy(
    bucket: Bucket, there: str, made: Path, tmp_path: Path
) -> None:
    reader, right, seen = opened(there, tmp_path / "cache"), expected(made), set()
    bucket.proxy.faults = Faults(delay_s=0.05)
    ends = time.monotonic() + 30
    while copied(reader) < 7:
        assert time.monotonic() < ends
        for part in np.array_split(np.arange(len(STARTS)), 64):
            seen.add(copied(reader))
            np.testing.assert_array_equal(reader.windows(STARTS[part], 65), right[part])
    assert 0 in seen
    assert seen & set(range(1, 7))
    np.testing.assert_array_equal(reader.windows(STARTS, 65), right)
    (whole,) = reader.windows(np.array([0]), LENGTH + 9)
    np.testing.assert_array_equal(
        whole, opened(str(made), "").windows(np.array([0]), LENGTH + 9)[0]
    )


def test_after_the_copy_and_in_a_second_run_no_request_is_for_tokens(
    there: str, made: Path, tmp_path: Path, asked: list[tuple[str, str | None]]
) -> None:
    first = copy(opened(there, tmp_path))
    second = opened(there, tmp_path)
    assert asked
    asked.clear()
    for reader in (first, second):
        np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    assert not asked


@pytest.mark.parametrize(("cache", "gigabytes"), [("cache", 0.0), ("", 1.0)])
def test_without_a_size_or_a_folder_nothing_is_written(
    there: str, made: Path, tmp_path: Path, monkeypatch, cache: str, gigabytes: float
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = opened(there, cache, gigabytes)
    np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    time.sleep(0.3)
    assert not list(tmp_path.iterdir())
    assert copied(reader) == 0


# --- the limit ---------------------------------------------------------------------------------


def test_the_limit_is_never_exceeded_and_is_told(
    there: str, made: Path, tmp_path: Path, capfd
) -> None:
    limit, sizes, told = 3 * SIZE + SIZE // 2, [], [""]
    reader = opened(there, tmp_path, limit / 1e9)
    reader.windows(np.array([0]), 1)

    def look() -> bool:
        sizes.append(sum(copies(tmp_path).values()))
        told[0] += capfd.readouterr().err
        return "instead" in told[0] or copied(reader) == 7

    wait(look)
    assert max(sizes) <= limit
    assert copied(reader) == len(copies(tmp_path)) == 3
    assert told[0].count("gptjax: ") == 1
    assert f"has no room for more; what is not there of {there}/train is read from the" in told[0]
    np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))


def test_another_stores_oldest_files_make_room_but_none_that_is_mapped(
    bucket: Bucket, there: str, made: Path, tmp_path: Path
) -> None:
    cache, other = tmp_path / "cache", make(tmp_path / "other", 1)
    buckets.upload(other, f"{there}-other", store.MANIFEST)
    mine = {sha256[:6]: sha256 for sha256 in copied_names(other)}
    copy(opened(f"{there}-other", cache))  # and closed: nobody maps them now
    names = list(mine.values())
    for age, name in enumerate(names):
        os.utime(cache / name, (1000 + age, 1000 + age))
    (cache / "of the user").write_bytes(bytes(10 * SIZE))
    (cache / f"{'0' * 64}.123").write_bytes(b"of a process that was killed")
    os.utime(cache / f"{'0' * 64}.123", (1, 1))
    os.utime(cache / "of the user", (1, 1))
    with (cache / names[1]).open("rb") as held:
        mapped = np.memmap(held, "<u2", "r")
        store_cache.fcntl.flock(held, store_cache.fcntl.LOCK_SH)
    reader = opened(there, cache, 9 * SIZE / 1e9)
    copy(reader)
    left = set(copies(cache))
    assert set(names) & left == {names[1], names[6]}  # 7 + 7 - 5
    assert "of the user" in left
    assert f"{'0' * 64}.123" not in left
    np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    del mapped


def copied_names(folder: Path) -> tuple[str, ...]:
    return store.read_manifest(str(folder)).splits["train"].files_sha256


def test_a_mapped_copy_stays_when_another_store_wants_its_room(
    there: str, made: Path, tmp_path: Path, capfd
) -> None:
    cache, other = tmp_path / "cache", make(tmp_path / "other", 1)
    buckets.upload(other, f"{there}-other", store.MANIFEST)
    first = copy(opened(there, cache))
    second = opened(f"{there}-other", cache, 7 * SIZE / 1e9)
    np.testing.assert_array_equal(second.windows(STARTS, 65), expected(other))
    wait(lambda: "has no room for more" in capfd.readouterr().err)
    assert set(copies(cache)) == set(copied_names(made))
    del first
    third = opened(f"{there}-other", cache, 7 * SIZE / 1e9)
    copy(third)
    assert set(copies(cache)) == set(copied_names(other))


# --- damage and failures -----------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["a bit", "shorter", "longer"])
@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_copy_is_never_used_and_is_replaced(
    there: str, made: Path, tmp_path: Path, capfd, damage: str, checksums: bool
) -> None:
    """Also of a store of before there were checksums."""
    copy(opened(there, tmp_path))
    file = tmp_path / copied_names(made)[2]
    right = raw = file.read_bytes()
    if damage == "a bit":
        raw = raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:]
    file.write_bytes({"a bit": raw, "shorter": raw[:9000], "longer": raw + b"."}[damage])
    manifest = store.read_manifest(there)
    if not checksums:
        split = dataclasses.replace(manifest.splits["train"], checksums_sha256="")
        manifest = dataclasses.replace(manifest, splits={"train": split})
    reader = Reader(there, "train", manifest, str(tmp_path), 1.0)
    for _ in range(3):
        np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    wait(lambda: copied(reader) == 7)
    assert file.read_bytes() == right
    np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    told = "the copy of" in capfd.readouterr().err
    assert told == (checksums and damage == "a bit")


@pytest.mark.parametrize("before", [True, False])
def test_a_copy_that_is_damaged_again_and_again_is_replaced_once(
    there: str, made: Path, tmp_path: Path, monkeypatch, capfd, before: bool
) -> None:
    """Also where its tokens have been read from the bucket, and found right, before."""
    bad = copied_names(made)[2]
    mapped = store_cache.StoreCache._mapped

    def damaged(self, file: store_cache.File) -> np.ndarray | None:
        tokens = mapped(self, file)
        return tokens if tokens is None or file.sha256 != bad else tokens ^ 1

    if before:
        copy(opened(there, tmp_path))
    monkeypatch.setattr(store_cache.StoreCache, "_mapped", damaged)
    reader = opened(there, tmp_path)
    inside = np.arange(4 * RANGE, 6 * RANGE - 65, 64)
    right = opened(str(made), "").windows(inside, 65)
    for _ in range(4):
        np.testing.assert_array_equal(reader.windows(inside, 65), right)
        wait_for_threads()
    assert copied(reader) == 6
    assert capfd.readouterr().err.count("is damaged, and not used") == 2


@pytest.mark.parametrize("kind", ["503", "reset", "truncated"])
def test_a_bucket_that_fails_during_the_copy_leaves_reads_right(
    bucket: Bucket, there: str, made: Path, tmp_path: Path, monkeypatch, capfd, kind: str
) -> None:
    """A tenth of the requests fail at first, and then all that are for the copy."""
    monkeypatch.setattr(buckets, "_FIRST_WAIT_S", 0.1)
    bucket.proxy.faults = Faults(seed=1, share=0.1, burst=2, kinds=(kind,))
    reader = opened(there, tmp_path)
    np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    wait(lambda: copied(reader) == 7)
    assert bucket.proxy.faults.told[kind] > 0
    np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    assert "instead" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_read_goes_on_when_the_bucket_is_back(
    bucket: Bucket, there: str, made: Path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(buckets, "_FIRST_WAIT_S", 0.1)
    reader = opened(there, "")
    bucket.proxy.faults = Faults(share=1.0, kinds=("503",))
    threading.Timer(2.5, lambda: setattr(bucket.proxy, "faults", Faults())).start()
    np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    assert f"gptjax: {there}/train: cannot be read: " in capfd.readouterr().err


def fail(path: Path, contents: bytes) -> None:
    with path.open("wb") as file:
        file.write(contents[:9000])
    raise OSError(28, "No space left on device")


def give_up(*_: object) -> bytes:
    raise PermissionError(13, "PERMISSION_DENIED: of this key")


@pytest.mark.parametrize(
    ("where", "name", "what", "told"),
    [
        (Path, "write_bytes", fail, "No space left on device"),
        (store_cache, "_read", give_up, "PERMISSION_DENIED"),
        (store_cache, "_read", lambda *_: b"other bytes", "c/0: its SHA-256 differs from"),
        (store_cache.shutil, "disk_usage", lambda _: DISK, "its disk is full"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line_and_leaves_reads_right(
    there: str, made: Path, tmp_path: Path, monkeypatch, capfd, where, name, what, told
) -> None:
    manifest = store.read_manifest(there)
    monkeypatch.setattr(where, name, what)
    reader = Reader(there, "train", manifest, str(tmp_path), 1.0)
    for _ in range(3):
        np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    wait_for_threads()
    (line,) = [one for one in capfd.readouterr().err.splitlines() if "gptjax: " in one]
    assert line.startswith(f"gptjax: data.cache={tmp_path}: ")
    assert told in line
    assert line.endswith("is read from the bucket instead")
    assert not copies(tmp_path)
    assert copied(reader) == 0


DISK = store_cache.shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7)


def test_a_folder_that_cannot_be_made_is_told(there: str, made: Path, tmp_path, capfd) -> None:
    (tmp_path / "file").write_text("")
    reader = opened(there, tmp_path / "file" / "cache")
    np.testing.assert_array_equal(reader.windows(STARTS, 65), expected(made))
    wait(lambda: "read from the bucket instead" in capfd.readouterr().err)


def test_damage_in_the_bucket_is_an_error_as_ever(
    there: str, made: Path, tmp_path: Path, capfd
) -> None:
    raw = bytearray((made / "train/c/1").read_bytes())
    raw[7] ^= 1
    (buckets.path_of(there) / "train" / "c" / "1").write_bytes(bytes(raw))
    reader = opened(there, tmp_path)
    reader.windows(np.array([0]), 9)
    wait(lambda: "c/1: its SHA-256 differs from the manifest's" in capfd.readouterr().err)
    with pytest.raises(DataError, match=f"tokens {2 * RANGE} to {3 * RANGE - 1} differ"):
        reader.windows(np.array([2 * RANGE]), 9)


# --- processes, and training -------------------------------------------------------------------

READ = """
import sys, numpy as np
from gptjax.data import store
place, cache = sys.argv[1:]
reader = store.Reader(place, "train", store.read_manifest(place), cache, 1.0)
while True:
    total = int(reader.windows(np.arange(0, len(reader), 8192), 64).sum())
    if all(file is not None for file in reader._files):
        break
print(total)
"""


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if "google_auth_provider" not in line]


def test_processes_share_the_copies_and_copy_each_file_once(
    bucket: Bucket, there: str, made: Path, tmp_path: Path, asked: list[tuple[str, str | None]]
) -> None:
    run = [sys.executable, "-c", READ, there, str(tmp_path)]
    env = os.environ | bucket.environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(run, env=env, text=True, **pipes) for _ in range(2)]
    right = int(opened(str(made), "").windows(np.arange(0, LENGTH, 2 * RANGE), 64).sum())
    for process in started:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, said(err)) == (0, f"{right}\n", [])
    tokens = re.compile(r"[^?]*c(?:/|%2F)\d(?=\?alt=media|$)")
    whole = [found[0] for path, part in asked if part is None and (found := tokens.match(path))]
    assert len(whole) == len(set(whole)) == 7
    assert copies(tmp_path) == dict.fromkeys(copied_names(made), SIZE)


@pytest.mark.slow
def test_a_process_may_end_during_the_copy(bucket: Bucket, there: str, tmp_path: Path) -> None:
    bucket.proxy.faults = Faults(delay_s=0.3)
    once = READ.replace("while True", "for _ in range(1)")
    run = [sys.executable, "-c", once, there, str(tmp_path)]
    env = os.environ | bucket.environment
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, said(done.stderr)) == (0, [])
    assert len(copies(tmp_path)) < 7


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    (tmp_path / "text.txt").write_text("a line of text\n" * 2000)
    return Config(
        model=ModelConfig(vocab_size=264, context=32, layers=1, embed=16, heads=2),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            sources=(f"{tmp_path}/text.txt",),
            store=str(tmp_path / "store"),
            workers=1,
            cache=str(tmp_path / "cache"),
        ),
        train=TrainConfig(tokens=4096, batch_tokens=512, seq_len=32),
    )


def test_training_reads_its_batches_from_the_copies(
    place: str, cfg: Config, asked: list[tuple[str, str | None]]
) -> None:
    prepare_mixture.prepare_parts(cfg)
    (Path(cfg.data.store) / "prepare.lock").unlink()  # Google's emulator takes no empty file
    buckets.upload(Path(cfg.data.store), place, store.MANIFEST)
    there = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, store=place))
    local = TrainData.open(cfg, read_manifests(cfg)).read(range(8))[0]
    data = TrainData.open(there, read_manifests(there))
    for _ in range(2):
        np.testing.assert_array_equal(data.read(range(8))[0], local)
        wait(lambda: copied(data.readers[0]) == 1)
        asked.clear()
    np.testing.assert_array_equal(data.read(range(8))[0], local)
    assert not asked


def test_illegal_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.cache_gb=-1.0: must not be negative"):
        Config(data=DataConfig(cache_gb=-1.0)).check()
    with pytest.raises(ConfigError, match=r"data.cache=gs://b/c: must be a folder on this mach"):
        Config(data=DataConfig(cache="gs://b/c")).check()
