"""A real pretrained model goes on training on text that it does not know."""

import json
import subprocess
from pathlib import Path

import pytest
from fetch_manpages import fetch as fetch_manpages
from fetch_smollm2 import fetch as fetch_smollm2

from gptjax.cli import main

pytestmark = pytest.mark.slow

STEPS, TOKENS = 6, 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """SmolLM2-135M, and German and English manual pages."""
    path = tmp_path_factory.mktemp("continued")
    try:
        for package in ("manpages-de", "manpages"):
            fetch_manpages(package, path / package)
        fetch_smollm2(path / "smollm2")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"the model or the pages cannot be fetched here: {error}")
    return path


def bits_per_byte(capsys, model: str, text: Path) -> float:
    capsys.readouterr()
    words = ["eval", model, "--text", str(text), "--length", "512", "--batch", "4", "--json"]
    assert main.main(words) == 0
    return json.loads(capsys.readouterr().out)["text_bits_per_byte"]


def test_smollm2_learns_german_and_is_exported(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    held_out = {}
    for package in ("manpages-de", "manpages"):
        pages = sorted((folder / package).iterdir())
        held_out[package] = folder / f"{package}.txt"
        held_out[package].write_text("".join(page.read_text() for page in pages[::90])[:8000])
        for page in pages[::90]:
            page.unlink()
    before = {name: bits_per_byte(capsys, "hf:smollm2", text) for name, text in held_out.items()}
    words = ["--data.sources", "manpages-de", "--data.store", "store", "--run", "run"]
    words += ["--data.valid-fraction", "0.001", "--eval.sample-tokens", "8", "--eval.batch", "8"]
    words += ["--train.tokens", str(STEPS * TOKENS), "--train.batch-tokens", str(TOKENS)]
    words += ["--train.seq-len", "256", "--optim.lr", "3e-4", "--optim.warmup-tokens", "1024"]
    words += ["--compute.dtype", "float32", "--mesh.fsdp", "-1", "--mesh.data", "1"]
    assert main.main(["train", "continued", "--start", "hf:smollm2", *words]) == 0
    after = {name: bits_per_byte(capsys, "run", text) for name, text in held_out.items()}
    print(f"bits per byte before {before}, after {after}")
    assert after["manpages-de"] < before["manpages-de"] - 0.1
    assert main.main(["convert", "--no-compare", "run", "hf:exported"]) == 0
    assert "round trip: byte-equal" in capsys.readouterr().out
    exported = bits_per_byte(capsys, "hf:exported", held_out["manpages-de"])
    assert exported == pytest.approx(after["manpages-de"], rel=1e-4)
