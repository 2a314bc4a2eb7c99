"""A run on a mixture of data, from the configuration to the evaluation of each part."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MixturePart,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)
from gptjax.data import mixture
from gptjax.errors import MismatchError
from gptjax.pretrain.train import train

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS = 8


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Config:
    """Two parts, of which the smaller leaves the mixture during the run."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in {"large": 90, "small": 25}.items():
        (folder / name).mkdir()
        for number in range(4):
            text = f"a line of the {name} part {number}\n" * count
            (folder / name / f"{number}.txt").write_text(text)
    return Config(
        run=str(folder / "run"),
        model=ModelConfig(vocab_size=264, context=64, layers=1, embed=16, heads=8),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            store=str(folder / "store"),
            workers=1,
            mixture={
                "large": MixturePart(0.75, (str(folder / "large"),)),
                "small": MixturePart(0.25, (str(folder / "small"),), epochs=0.35),
            },
        ),
        optim=OptimConfig(lr=1e-2, lr_schedule="constant"),
        train=TrainConfig(tokens=STEPS * 512, batch_tokens=512, seq_len=32),
        eval=EvalConfig(batch=8, sample_tokens=8),
        checkpoint=CheckpointConfig(every=3),
        log=LogConfig(every=1, tensorboard=False, compile_cache=""),
    )


def lines_of(cfg: Config) -> list[dict]:
    return list(map(json.loads, (Path(cfg.run) / "metrics.jsonl").read_text().splitlines()))


@pytest.mark.slow
def test_a_resumed_run_on_a_mixture_ends_with_the_same_bits(
    cfg: Config, capsys, command_line
) -> None:
    results = train(cfg)
    told = capsys.readouterr().err
    assert "data.mixture.small: 0.2500 of the tokens" in told
    assert "leaves the mixture after step 5" in told
    for part in ("large", "small"):
        assert {f"valid_{name}/{part}" for name in ("loss", "bits_per_byte")} <= set(results)
    loss = 0.75 * results["valid_loss/large"] + 0.25 * results["valid_loss/small"]
    assert results["valid_loss"] == pytest.approx(loss)
    splits = {
        name: part.splits["valid"] for name, part in mixture.read_manifests(cfg).parts.items()
    }
    weights = {"large": 0.75, "small": 0.25}
    size = {name: weights[name] * split.bytes / split.tokens for name, split in splits.items()}
    bits = sum(size[name] * results[f"valid_bits_per_byte/{name}"] for name in size)
    assert results["valid_bits_per_byte"] == pytest.approx(bits / sum(size.values()), rel=1e-9)
    assert abs(size["large"] / size["small"] - 3) > 1e-4
    epochs = [line["epochs/small"] for line in lines_of(cfg) if "loss" in line]
    assert epochs[:5] == sorted(set(epochs[:5]))
    assert len(set(epochs[4:])) == 1  # it has left
    assert epochs[-1] <= 0.35
    code, out, _ = command_line("eval", cfg.run, "--json")
    assert code == 0
    measured = json.loads(out)
    for name in ("valid_loss", "valid_bits_per_byte", "valid_loss/small"):
        assert measured[name] == pytest.approx(results[name], rel=1e-5)
    halted = replace(cfg, run=f"{cfg.run}-halted")
    for steps in (3, STEPS):
        train(replace(halted, train=replace(cfg.train, tokens=steps * 512)))
    meta = [Checkpointer(Path(c.run) / run_dir.CHECKPOINTS).meta(STEPS) for c in (cfg, halted)]
    assert meta[0]["fingerprints"] == meta[1]["fingerprints"]
    assert set(meta[0]["data"]["fingerprints"]) == {"large", "small"}
    parts = dict(cfg.data.mixture) | {"large": replace(cfg.data.mixture["large"], weight=0.5)}
    with pytest.raises(MismatchError, match=r"data.mixture.large.weight: 0.75 in the run"):
        train(replace(cfg, data=replace(cfg.data, mixture=parts)))


@pytest.mark.slow
def test_a_run_ends_with_the_part_that_stops_it(cfg: Config, capsys) -> None:
    stops = replace(cfg, run=f"{cfg.run}-stops", data=replace(cfg.data, exhausted="stop"))
    train(stops)
    assert "the run ends there, and so does its learning-rate schedule" in capsys.readouterr().err
    assert Checkpointer(Path(stops.run) / run_dir.CHECKPOINTS).steps()[-1] == 5
