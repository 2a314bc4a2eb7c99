"""Every preset is whole, and every command that a page or a preset shows can be parsed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import Forked

from gptjax import config
from gptjax.cli import arguments, main
from gptjax.config import phases
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


def test_recipes_have_their_published_batches_and_rates() -> None:
    """Of GPT-3 Brown et al. 2020, table 2.1 and appendix B; of Llama Dubey et al. 2024, section
    3.4; of Falcon the model cards."""
    gpt3 = config.load("gpt3:gpt3_175b")
    sizes = [phase.batch_tokens for phase in phases.phases(gpt3)]
    assert (sizes[0], sizes[-1]) == (32_768, 3_276_800)
    assert len(set(np.diff(sizes))) == 1  # linear
    growth = phases.phases(gpt3)[-1].tokens
    assert growth == pytest.approx(12e9, rel=1e-3)
    assert gpt3.optim.warmup_tokens == 375_000_000
    assert gpt3.optim.warmup_tokens + gpt3.optim.decay_tokens == 260_000_000_000

    llama = config.load("llama:llama31_405b")
    found = phases.phases(llama)
    grown = {name: next(p for p in found if p.stage == name) for name in llama.stages}
    shapes = [
        (grown[name].batch_tokens, grown[name].seq_len) for name in ("start", "doubled", "main")
    ]
    assert shapes == [(2**22, 4096), (2**23, 8192), (2**24, 8192)]
    begins = [grown[name].tokens for name in ("doubled", "main", "16k", "anneal")]
    wanted = [252e6, 2.87e12, 15.6e12 - 8e11 - 4e7, 15.6e12 - 4e7]
    for begin, value in zip(begins, wanted, strict=True):
        assert 0 <= begin - value < 2**24
    assert grown["128k"].seq_len == llama.model.context == 131_072
    assert phases.tokens_at(llama, 8000) == llama.optim.warmup_tokens
    scaled = {name: phases.model_of(llama, name).rope.scaling for name in llama.stages}
    assert scaled["main"] == "none"
    assert scaled["16k"] == scaled["anneal"] == "low_frequency"

    for name, billions, last in (("7b", 30, 1.2e-5), ("40b", 100, 1.85e-5), ("180b", 100, 1.25e-5)):
        falcon = config.load(f"falcon:falcon_{name}")
        assert falcon.train.batch_ramp_tokens == billions * 10**9
        assert falcon.optim.lr * falcon.optim.final_lr_ratio == pytest.approx(last)
        assert falcon.train.z_loss == 1e-4


def test_config_prints_the_plan_of_stages(command_line) -> None:
    code, out, _ = command_line("config", "llama:llama31_405b")
    assert code == 0
    rows = out.split("\n\n")[1].splitlines()
    assert [row.split()[0] for row in rows[1:]] == list(config.load("llama:llama31_405b").stages)
    assert "4,194,304    4,096" in rows[1]
    code, out, _ = command_line("config", "gpt2:small")
    assert "ends at token" not in out


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
    short += ["--data.valid-fraction", "0.01"]
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
