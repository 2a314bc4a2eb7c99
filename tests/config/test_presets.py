"""Every preset is whole, and every command that a page or a preset shows can be parsed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked

from gptjax import config
from gptjax.cli import arguments, main
from gptjax.plan import machines
from gptjax.pretrain import warm_start

REPO = Path(__file__).resolve().parents[2]
PRESETS = [
    f"configs/{file.name}:{name}"
    for file in sorted((REPO / "configs").glob("*.py"))
    for name in re.findall(r"^def ([a-z]\w*)\(\) -> Config:", file.read_text(), re.M)
]
COMMANDS = "train|plan|eval|sample|serve|data|tokenizer|config|convert|inspect"
SHOWN = [
    line.split("#")[0].strip().removeprefix(".venv/bin/")
    for page in [REPO / "README.md", *sorted((REPO / "configs").glob("*.py"))]
    for line in page.read_text().splitlines()
    if re.match(rf"\s*(\.venv/bin/)?gptjax ({COMMANDS}) ", line)
]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def test_readme_and_presets_contain_commands() -> None:
    assert len(PRESETS) >= 6
    assert len(SHOWN) >= 8


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_valid_on_its_machine_or_on_one_and_eight_devices(preset: str) -> None:
    cfg = config.load(preset)
    if machine := cfg.mesh.machine:
        cfg.check(machines.parse(machine).devices, machines.parse(machine).processes)
    else:
        cfg.check(1)
        cfg.check(8)


@pytest.mark.parametrize("line", SHOWN)
def test_documented_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "with_base", lambda cfg, *_: cfg)  # the base is anybody's
    args, rest = main.parser().parse_known_args(shlex.split(line)[1:])
    if args.command.overrides:
        arguments.resolve(args, rest)
    else:
        assert rest == []


def compiled_as_always() -> None:
    import jax

    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_quickstart_trains_samples_evaluates_and_resumes(tmp_path: Path) -> None:
    def gptjax(*words: str) -> str:
        process = Forked(words, tmp_path, tmp_path / "out", tmp_path / "err", compiled_as_always)
        code = process.wait(600)
        text = (tmp_path / "out").read_text() + process.read()
        (tmp_path / "out").unlink()
        process.errors.unlink()
        assert code == 0, text
        return text

    short = ["--train.tokens", "61440", "--optim.warmup-tokens", "20000"]
    train = ["train", str(REPO / "configs" / "quickstart.py"), *short]
    command = [sys.executable, "-m", "gptjax", *train]
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    first = done.stdout + done.stderr
    bits = float(re.findall(r'"valid_bits_per_byte": ([\d.]+)', first)[-1])
    assert bits < 3.3  # an untrained model of 4096 pieces needs about 3.9
    assert "samples at step" in first
    again = gptjax(*train)
    assert "resumed after step 30 of 30" in again
    assert f'"valid_bits_per_byte": {bits}' in again
    assert f"valid_bits_per_byte      {bits:.6g}" in gptjax("eval", "runs/quickstart")
    sample = ["sample", "runs/quickstart", "--prompt", "def", "--prompt", "class", "--seed", "3"]
    text = gptjax(*sample, "--max-tokens", "20")
    assert text.startswith("def")
    assert "\nclass" in text
    assert gptjax(*sample, "--max-tokens", "20") == text
