"""A disk that is really full, at whatever moment: one sentence, exit code 73, nothing lost."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

KIB = 1024
STEPS = 6


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system in memory, whose size `resize` sets; skipped where none can be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True
    )
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    (folder / "ballast").write_bytes(b"x" * 4096)  # a size of 0 would be no limit
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def used(folder: Path) -> int:
    stat = os.statvfs(folder)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


@pytest.fixture
def train(command_line, tmp_path):
    preset = Path(__file__).parents[2] / "configs" / "debug.py"
    (tmp_path / "text.txt").write_text(Path(os.__file__).read_text()[:40_000])
    words = [
        *("--data.sources", str(tmp_path / "text.txt"), "--data.workers", "1"),
        *("--train.tokens", str(STEPS * 1024), "--checkpoint.every", "2", "--eval.every", "0"),
        *("--eval.sample-tokens", "4", "--log.every", "1", "--log.compile-cache", ""),
    ]

    def run(folder: Path, store: Path) -> tuple[int, str]:
        code, _, err = command_line("train", preset, "--run", folder, "--data.store", store, *words)
        return code, err

    return run


@pytest.mark.exhaustive  # soak.py fills a disk at random
@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(disk, train, tmp_path) -> None:
    """With so little space that store, records, metrics or checkpoints do not fit, in turn."""
    store = tmp_path / "store"
    assert train(tmp_path / "whole", store)[0] == 0
    codes = {}
    for space in (0, 12, 40, 1000, 16_000):
        folder = disk / f"run{space}"
        before = used(disk)
        resize(disk, before + space * KIB)
        code, err = train(folder, store)
        codes[space] = code
        assert code in (0, 73), (space, err)
        assert "Event loop is closed" not in err
        if code:
            assert err.splitlines()[-1].startswith("gptjax: "), err
            resize(disk, 64 << 20)
            assert train(folder, store)[0] == 0, space
        resize(disk, 64 << 20)
        subprocess.run(["rm", "-r", folder], check=True)
    assert {0, 73} == set(codes.values()), codes
    print(codes)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_disk_that_fills_while_text_is_prepared(disk, train, tmp_path) -> None:
    for space in (4, 44):
        store = disk / f"store{space}"
        resize(disk, used(disk) + space * KIB)
        code, err = train(tmp_path / f"run{space}", store)
        assert code == 73, (space, err)
        assert str(store) in err
        resize(disk, 64 << 20)
        assert train(tmp_path / f"run{space}", store)[0] == 0, space
