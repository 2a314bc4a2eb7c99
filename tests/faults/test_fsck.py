"""`gptjax fsck` reads all of a run, and tells what is damaged and what was left."""

import os
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


def flip(file: Path, place: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 4
    file.write_bytes(raw)


def test_every_kind_of_damage_is_told(command_line, tmp_path) -> None:
    preset = Path(__file__).parents[2] / "configs" / "debug.py"
    (tmp_path / "text.txt").write_text(Path(os.__file__).read_text()[:40_000])
    run, store = tmp_path / "run", tmp_path / "store"
    words = [
        *("--run", run, "--data.store", store, "--data.sources", tmp_path / "text.txt"),
        *("--train.tokens", 4096, "--checkpoint.every", 2, "--eval.every", 0),
        *("--eval.sample-tokens", 4, "--log.compile-cache", "", "--data.workers", 1),
    ]
    assert command_line("train", preset, *words)[0] == 0

    code, out, _ = command_line("fsck", run)
    assert code == 0
    assert "checkpoint 2: whole" in out
    assert "checkpoint 4: whole" in out
    assert f"{store}: the tokens that the run was begun with, whole" in out

    (run / "checkpoints/3.removed").mkdir()
    (run / "checkpoints/3.removed/part").write_bytes(b"x" * 1234)
    shutil.copytree(run / "checkpoints/2", run / "checkpoints/1.corrupt-1")
    code, out, _ = command_line("fsck", run)
    assert code == 0
    assert "3.removed: 1,234 bytes left by a kill" in out
    assert "1.corrupt-1: " in out

    files = [file for file in (run / "checkpoints/2/state").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    code, out, err = command_line("fsck", run)
    assert code == 74
    assert "checkpoint 4: whole" in out
    assert "checkpoint 2: " in err

    flip(store / "train/c/0", 500)
    code, _, err = command_line("fsck", run)
    assert code == 74
    assert "2 found" in err
    assert f"{store}/train/c/0: its SHA-256 differs" in err

    shutil.rmtree(run / "checkpoints/2")
    (run / "tokenizer.bytes").unlink()
    code, _, err = command_line("fsck", run)
    assert code == 65
    assert "no tokenizer found" in err
