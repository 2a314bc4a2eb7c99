"""A run in stages, with a batch that grows: its bits, its borders, and what is made from it."""

import functools
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked import Forked

from gptjax import config, load_model
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    MixturePart,
    ModelConfig,
    OptimConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    phases,
)
from gptjax.data import prepare_mixture
from gptjax.errors import MismatchError
from gptjax.pretrain.train import train
from gptjax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")

FIRST, SECOND = 10, 14  # the steps after which a stage ends


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Config:
    """A batch that grows from 8 to 16 rows, long rows of another mixture, then a decay; all of
    whole documents."""
    folder = tmp_path_factory.mktemp("stages")
    for name in ("web", "books"):
        (folder / name).mkdir()
        for number in range(100):
            text = f"{number} is in {name}\n" * (1 + number % 5)
            (folder / name / f"{number}.txt").write_text(text)
    cfg = Config(
        run=str(folder / "run"),
        model=ModelConfig(
            vocab_size=264, context=64, layers=1, embed=16, heads=8, positions="rope", dropout=0.1
        ),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            store=str(folder / "store"),
            workers=1,
            documents="mask",
            packing="documents",
            mixture={
                "web": MixturePart(1.0, (str(folder / "web"),)),
                "books": MixturePart(0.0, (str(folder / "books"),)),
            },
        ),
        optim=OptimConfig(lr=1e-2, lr_schedule="constant", warmup_tokens=1024),
        train=TrainConfig(
            tokens=6 * 256 + 4 * 512 + 4 * 512 + 4 * 512,
            batch_tokens=512,
            seq_len=32,
            accumulation=2,
            batch_ramp_tokens=1536,
            batch_start_tokens=256,
            batch_increment_tokens=256,
        ),
        stages={
            "main": StageConfig(),
            "long": StageConfig(
                tokens=2048, seq_len=64, weights={"web": 1.0, "books": 3.0}, rope_theta=5e4,
                batch_tokens=512,
            ),
            "anneal": StageConfig(tokens=2048, lr_schedule="1-sqrt"),
        },
        eval=EvalConfig(batch=8, sample_tokens=8, every=0),
        checkpoint=CheckpointConfig(every=1, keep=100),
        log=LogConfig(every=1, tensorboard=False, compile_cache=""),
    )  # fmt: skip
    assert [p.last for p in phases.phases(cfg)] == [6, FIRST, SECOND, 18]
    return cfg


@pytest.fixture(scope="module")
def whole(cfg: Config) -> dict:
    """The last evaluation of the run that was never interrupted."""
    return train(cfg)


def test_rows_of_both_lengths_are_told_with_their_padding(cfg: Config, capsys) -> None:
    stores = replace(cfg, data=replace(cfg.data, store=f"{cfg.data.store}-told"))
    told: list[str] = []
    prepare_mixture.prepare_parts(stores, say=told.append)
    rows = [line for line in told if " rows of " in line]
    assert len(rows) == 4  # two parts, two lengths
    assert re.search(
        r"store-told/books: 9\d documents in \d+ rows of 32 tokens, \d.*padding; \d+", rows[0]
    )


def metrics_of(cfg: Config) -> list[dict]:
    lines = map(json.loads, (Path(cfg.run) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "grad_norm" in line]


def fingerprints(cfg: Config, step: int) -> dict:
    return Checkpointer(Path(cfg.run) / "checkpoints").meta(step)["fingerprints"]


@pytest.mark.slow
def test_batches_lengths_and_rates_follow_the_stages(cfg: Config, whole: dict) -> None:
    lines = metrics_of(cfg)
    tokens = [0, *(line["tokens"] for line in lines)]
    assert np.diff(tokens).tolist() == [256] * 6 + [512] * 12
    rate = [line["lr"] for line in lines]
    np.testing.assert_allclose(rate[:4], [0.25e-2, 0.5e-2, 0.75e-2, 1e-2], rtol=1e-5)
    np.testing.assert_allclose(rate[4:15], 1e-2, rtol=1e-5)
    np.testing.assert_allclose(rate[15:], 1e-2 * (1 - np.sqrt([0.25, 0.5, 0.75])), rtol=1e-5)
    books = [line["epochs/books"] for line in lines]
    assert books[:FIRST] == [0.0] * FIRST
    np.testing.assert_allclose(np.diff(books[FIRST - 1 : SECOND]), books[FIRST], rtol=1e-6)
    assert books[SECOND - 1 :] == [books[SECOND - 1]] * 5
    assert {"valid_loss/web", "valid_loss/books"} <= set(whole)
    meta = Checkpointer(Path(cfg.run) / "checkpoints").meta(SECOND)
    assert (meta["stage"], meta["data"]["seq_len"], meta["tokens_seen"]) == ("long", 64, 5632)


def _killed_after(step: int) -> None:
    """In another process: SIGKILL, when a step has been saved and the next is to begin."""
    train_one = Trainer._train_one

    def or_killed(self, number, state):
        if number == step + 1:
            self._checkpointer.finish()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_one(self, number, state)

    Trainer._train_one = or_killed


@pytest.mark.slow
def test_a_run_killed_at_a_border_ends_with_the_same_bits(
    cfg: Config, tmp_path: Path, whole: dict
) -> None:
    """One run, killed one step before it, exactly at it, and one step after it."""
    (tmp_path / "cfg.json").write_text(json.dumps(config.to_dict(cfg)))
    words = lambda run: ["train", str(tmp_path / "cfg.json"), "--run", str(run)]
    start = lambda run, *prepare: Forked(
        words(run), tmp_path, Path(os.devnull), tmp_path / f"{run.name}.err", *prepare
    )
    bits = lambda run: fingerprints(replace(cfg, run=str(run)), 18)
    unbroken, run = tmp_path / "unbroken", tmp_path / "killed"  # both in processes of their own
    assert start(unbroken).wait(300) == 0
    for step in (FIRST - 1, FIRST, FIRST + 1):
        killed = start(run, functools.partial(_killed_after, step))
        assert killed.wait(300) == -signal.SIGKILL, killed.read()
        assert Checkpointer(run / "checkpoints").steps()[-1] == step
    last = start(run)
    assert last.wait(300) == 0, last.read()
    for step in (FIRST - 1, FIRST, FIRST + 1):
        assert f"resumed after step {step} of 18" in last.read()
    assert bits(run) == bits(unbroken)


@pytest.mark.slow
def test_a_model_is_opened_as_its_stage_trained_it(cfg: Config, whole: dict) -> None:
    theta = lambda model: model.cfg.model.rope.theta
    source = load_model.find_model(cfg.run)
    assert [theta(source.at_step(step)) for step in (FIRST, SECOND, 18)] == [1e4, 5e4, 1e4]
    assert theta(source) == 1e4
    short = replace(cfg, run=f"{cfg.run}-until-long")
    shutil.copytree(cfg.run, short.run)
    for step in range(SECOND + 1, 19):
        shutil.rmtree(Path(short.run) / "checkpoints" / str(step))
    with load_model.load_model(short.run) as model:
        assert (model.step, theta(model)) == (SECOND, 5e4)


@pytest.mark.slow
def test_a_branch_from_a_border_decays_on_its_own(cfg: Config, tmp_path: Path, whole: dict) -> None:
    """Two decays of one stable run, of which one is what the run did itself."""
    file = tmp_path / "cfg.json"
    file.write_text(json.dumps(config.to_dict(cfg)))
    start = ["--start", f"{cfg.run}@{SECOND}", "--start.optimizer", "--start.keep-step"]
    results = train(str(file), [*start, "--run", str(tmp_path / "same")])
    assert results["valid_loss"] == whole["valid_loss"]
    same, other = (replace(cfg, run=str(tmp_path / name)) for name in ("same", "other"))
    params = lambda one: {k: v for k, v in fingerprints(one, 18).items() if k.startswith("params/")}
    assert params(same) == params(cfg)
    # The base's positions were stretched at that step, and those of the stage to come are not.
    recorded = config.read_json(tmp_path / "same/config.json")
    assert recorded.model == cfg.model
    assert load_model.find_model(f"{cfg.run}").at_step(SECOND).cfg.model != cfg.model
    words = [*start, "--run", other.run, "--stages.anneal.lr-schedule", "linear"]
    train(str(file), words)
    assert [line["lr"] for line in metrics_of(other)][1] == pytest.approx(0.75e-2)


@pytest.mark.slow
def test_a_stage_that_is_over_cannot_change_and_one_to_come_can(
    cfg: Config, tmp_path: Path, whole: dict, capsys
) -> None:
    run = replace(cfg, run=str(tmp_path / "run"))
    shutil.copytree(cfg.run, run.run)
    for step in range(SECOND + 1, 19):
        shutil.rmtree(tmp_path / "run/checkpoints" / str(step))
    (tmp_path / "run/checkpoints.json").unlink()
    before = fingerprints(run, SECOND)
    changed = lambda name, **fields: replace(
        run, stages=run.stages | {name: replace(run.stages[name], **fields)}
    )
    with pytest.raises(MismatchError, match=r"stages.long.weights: .* at step 10 in the run"):
        train(changed("long", weights={"web": 3.0, "books": 1.0}))
    assert fingerprints(run, SECOND) == before
    train(changed("anneal", batch_tokens=1024, weights={"books": 1.0}))
    assert "stages.anneal.batch_tokens: 0 -> 1024 (stage)" in capsys.readouterr().err
    assert Checkpointer(tmp_path / "run/checkpoints").steps()[-1] == 16


@pytest.mark.slow
def test_another_mesh_and_accumulation_have_the_same_losses(
    cfg: Config, tmp_path: Path, whole: dict
) -> None:
    """Each batch is split as the mesh divides it; dropout is that of its sequences."""
    mesh = MeshConfig(data=1, fsdp=4, tensor=2)
    other = replace(
        cfg, run=str(tmp_path / "run"), mesh=mesh, train=replace(cfg.train, accumulation=1)
    )
    train(other)
    losses = [[line["loss"] for line in metrics_of(one)] for one in (cfg, other)]
    np.testing.assert_allclose(*losses, rtol=2e-5)
