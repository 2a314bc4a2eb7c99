"""`gptjax verify CONFIG`: the resume and the meshes of a tiny copy of a configuration."""

from dataclasses import replace

import pytest

from gptjax import config
from gptjax.config import Config, MixturePart, StageConfig
from gptjax.config.tiny import tiny
from gptjax.errors import NumericError
from gptjax.pretrain import verify_config


@pytest.mark.parametrize("steps", [verify_config.STEPS, verify_config.MESH_STEPS])
def test_every_preset_has_a_tiny_copy_with_its_features(steps: int) -> None:
    for name, _ in config.list_presets():
        cfg = config.load(name)
        copy = tiny(cfg, "folder", steps)
        copy.check(1, 1)
        assert copy.model.layers <= 2 * len(cfg.model.pattern)
        assert copy.steps <= 3 * steps
        for field in ("norm", "positions", "pattern", "activation", "tied_embeddings", "dropout"):
            assert getattr(copy.model, field) == getattr(cfg.model, field)
        assert bool(copy.model.moe.experts) == bool(cfg.model.moe.experts)
        assert list(copy.stages) == list(cfg.stages)
        assert copy.optim.name == cfg.optim.name
        assert (copy.train.accumulation > 1) == (cfg.train.accumulation > 1)


def rich() -> Config:
    """A mixture, stages, a growing batch, packing, dropout and an average."""
    cfg = config.load("mixtral:mixtral_8x7b")
    parts = {name: MixturePart(weight, (name,)) for name, weight in (("a", 0.3), ("b", 0.7))}
    stages = {
        "main": StageConfig(),
        "long": StageConfig(tokens=cfg.train.tokens // 5, seq_len=8192),
    }
    return replace(
        cfg,
        model=replace(cfg.model, dropout=0.1, context=8192),
        data=replace(cfg.data, mixture=parts, sources=(), documents="mask", packing="documents"),
        train=replace(
            cfg.train,
            ema_decay=0.9,
            accumulation=2,
            batch_ramp_tokens=cfg.train.tokens // 10,
            batch_start_tokens=cfg.train.batch_tokens // 2,
            batch_increment_tokens=cfg.train.batch_tokens // 2,
        ),
        stages=stages,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg", [config.load("debug"), pytest.param(rich(), marks=pytest.mark.exhaustive)]
)
def test_a_configuration_is_killed_and_resumed(cfg: Config, capsys) -> None:
    verify_config.verify_config(cfg, meshes=False)
    out = capsys.readouterr().out
    assert "killed (SIGKILL) when step" in out
    assert "equal bit for bit:" in out


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_meshes_are_compared_and_one_beyond_the_bound_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(verify_config, "MESHES", verify_config.MESHES[3:6:2])
    monkeypatch.setattr(verify_config, "MESH_STEPS", 3)
    monkeypatch.setattr(verify_config, "BOUNDS", {"loss": 1e-5, "grad_norm": -1.0})
    with pytest.raises(NumericError, match=r"grad_norm -1\): data 2, fsdp 2, tensor 2; data 4, st"):
        verify_config.verify_config(config.load("debug"), meshes=True)
    out = capsys.readouterr().out.splitlines()
    for line, name in zip(out[1:], ("data 2, fsdp 2, tensor 2", "data 4, stage 2"), strict=True):
        assert line.startswith(name)
        assert line.endswith("beyond the bound")
        loss, norm = map(float, line.removeprefix(name).split()[:2])
        assert max(loss, norm) < 1e-5  # within the real bounds


@pytest.mark.slow
def test_options_of_a_run_and_of_a_configuration_are_told_apart(command_line) -> None:
    code, _, err = command_line("verify", "debug", "--from", 3)
    assert code == 2
    assert "--from, --steps: go with a run, and this is a CONFIG" in err
