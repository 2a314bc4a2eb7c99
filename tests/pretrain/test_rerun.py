"""`gptjax verify` and `gptjax replay`: steps that are done again, compared and taken apart."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flipped import with_flip

from gptjax.checkpoint import replicas
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.cli import replay as replay_command
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
    TokenizerConfig,
    TrainConfig,
)
from gptjax.pretrain import replay, rerun
from gptjax.pretrain.replay import Step
from gptjax.pretrain.train import train
from gptjax.runtime.progress import Progress
from gptjax.training import lr_schedule, optimizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

STEPS, ROWS, LENGTH = 7, 16, 32


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Config:
    """Rows of two parts, with documents that end within them, and dropout."""
    folder = tmp_path_factory.mktemp("rerun")
    for name in ("web", "books"):
        (folder / name).mkdir()
        for number in range(60):
            text = f"{number} is in {name}\n" * (1 + number % 5)
            (folder / name / f"{number}.txt").write_text(text)
    part = lambda name, weight: MixturePart(weight, (str(folder / name),))
    return Config(
        run=str(folder / "run"),
        model=ModelConfig(
            vocab_size=264, context=64, layers=2, embed=16, heads=8, dropout=0.1, norm="layernorm"
        ),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            store=str(folder / "store"),
            workers=1,
            documents="mask",
            mixture={"books": part("books", 0.25), "web": part("web", 0.75)},
        ),
        optim=OptimConfig(lr=1e-2, lr_schedule="constant", clip=0.5),
        train=TrainConfig(tokens=STEPS * ROWS * LENGTH, batch_tokens=ROWS * LENGTH, seq_len=LENGTH),
        eval=EvalConfig(every=0, batch=8, sample_tokens=4),
        checkpoint=CheckpointConfig(every=3, keep=9),
        log=LogConfig(every=1, tensorboard=False, compile_cache=""),
    )


@pytest.fixture(scope="module")
def run(cfg: Config) -> str:
    train(cfg)
    return cfg.run


@contextmanager
def replayed(path: str, step: int) -> Iterator[tuple[rerun.RunAgain, Step]]:
    with rerun.opened(path, Progress(shown=False)) as again:
        yield again, replay.replay(again, step)


def test_a_run_is_verified_and_what_differs_is_named(run: str, cfg: Config, command_line) -> None:
    code, out, err = command_line("verify", run)
    assert code == 0, err
    assert f"{run}: trains again from step 6 to step 7" in out
    arrays = len(Checkpointer(Path(run) / "checkpoints").meta(7)["fingerprints"])
    assert f"checkpoint 7: all {arrays} arrays are equal" in out
    code, out, _ = command_line("verify", run, "--from", 0, "--steps", 4)
    assert code == 0
    assert "checkpoint 3: all" in out
    assert f"4 recorded steps, {arrays} arrays: all equal" in out
    for words, told in {
        ("--from", "4"): "--from=4: there is no such checkpoint; available: 0, 3, 6, 7",
        ("--from", "7"): "--from=7: nothing was trained after it; the run is at 7",
        ("--from", "3", "--steps", "5"): "--steps=5: from step 3 there are 4",
    }.items():
        code, _, err = command_line("verify", run, *words)
        assert code == 2
        assert told in err


def test_a_step_that_was_done_otherwise_is_named_with_its_arrays(
    cfg: Config, command_line, monkeypatch, tmp_path: Path
) -> None:
    rate, other = lr_schedule.learning_rate, replace(cfg, run=str(tmp_path / "run"))
    wrong = lambda cfg: lambda step: rate(cfg)(step) * jax.numpy.where(step == 4, 1.001, 1.0)
    with monkeypatch.context() as patched:
        patched.setattr(optimizer, "learning_rate", wrong)
        train(other)
    assert command_line("verify", other.run, "--from", 0)[0] == 0
    code, _, err = command_line("verify", other.run, "--from", 3)
    assert code == 70
    assert "the first difference that was recorded is at step 5: param_norm" in err
    assert "checkpoint 6: " in err
    assert " differ: opt_state/" in err or " differ: params/" in err
    assert "(on all devices)" in err


def test_a_device_whose_part_of_a_checkpoint_differs_is_named_with_its_process(
    cfg: Config, command_line, monkeypatch, tmp_path: Path
) -> None:
    other = replace(cfg, run=str(tmp_path / "run"), mesh=MeshConfig(fsdp=8))
    save = Checkpointer.save

    def flipped(self, step, state, *rest, **options):
        if step == 6:
            state = replace(
                state, params=state.params | {"embed": with_flip(state.params["embed"], 3)}
            )
        save(self, step, state, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpointer, "save", flipped)
        patched.setattr(replicas, "differing", lambda leaves: [])
        train(other)
    code, _, err = command_line("verify", other.run, "--from", 3)
    assert code == 70
    assert "the first difference" not in err
    assert "1 differ: params/embed (in the part of device 3" in err


def test_on_another_mesh_metrics_are_compared_within_a_bound(
    run: str, cfg: Config, command_line, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    saved = json.loads((moved / "config.json").read_text())
    saved["mesh"] |= {"data": 2, "fsdp": 4}
    (moved / "config.json").write_text(json.dumps(saved))
    code, out, err = command_line("verify", moved)
    assert code == 0, err
    assert "as bits may differ (mesh data 2 x fsdp 4, then" in out
    lines = [json.loads(line) for line in (moved / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["loss"] = line.get("loss", 0.0) * 1.01
    (moved / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, _, err = command_line("verify", moved)
    assert code == 70
    assert "is at step 7: loss" in err


def check_step(again: rerun.RunAgain, step: Step, cfg: Config) -> None:
    """What must hold of the parts of any step."""
    recorded = again.recorded[step.number]
    assert rerun.difference(step.number, step.metrics, recorded, 0.0) is None
    assert step.may_differ == ""
    assert sum(piece.share for piece in step.pieces) == pytest.approx(1, abs=1e-4)
    tokens = sum(len(piece.tokens) for piece in step.pieces)
    loss = sum(piece.loss * len(piece.tokens) for piece in step.pieces) / tokens
    assert loss == pytest.approx(recorded["loss"], rel=1e-5)
    norm = math.sqrt(sum(norm**2 for norm in step.layers.values()))
    assert norm == pytest.approx(recorded["grad_norm"], rel=1e-5)
    for layer, square in {name: norm**2 for name, norm in step.layers.items()}.items():
        shares = sum(piece.shares[layer] for piece in step.pieces)
        assert shares == pytest.approx(1, abs=1e-3) or square < 1e-12
    whole = sum(norm**2 for norm in step.layers.values())
    for piece in step.pieces:
        of_layers = sum(piece.shares[name] * norm**2 for name, norm in step.layers.items())
        assert piece.share == pytest.approx(of_layers / whole, abs=1e-5)
    assert step.clipped == pytest.approx(min(1, cfg.optim.clip / recorded["grad_norm"]))


def test_a_step_is_taken_apart_into_its_documents_and_layers(
    run: str, cfg: Config, command_line
) -> None:
    with replayed(run, 5) as (again, step):
        check_step(again, step, cfg)
        assert {"embed", "layer 0", "layer 1"} <= set(step.layers)
        assert {piece.part for piece in step.pieces} == {"books", "web"}
        assert len(step.pieces) > ROWS
        places = replay_command._places(again, step)
        for piece in step.pieces:
            text = again.tokenizer.decode([t for t in piece.tokens if t < 256])
            name = places[piece.part, piece.document]
            source = (Path(run).parent / piece.part / name).read_text()
            assert source[piece.begins :].startswith(text)
    file = Path(run).parent / "step.html"
    code, out, err = command_line("replay", run, "--step", 5, "--files", "--html", file)
    assert code == 0, err
    assert "as recorded, bit for bit" in out
    assert "clipped: the gradient was multiplied by" in out
    assert "web " in out
    assert ".txt): " in out
    html = file.read_text()
    assert html.count("<details>") == len(step.pieces)
    top = step.largest("layer 1")[0]
    name = f"{top.part} {top.document} {places[top.part, top.document]}"
    assert f'<td class="">{top.shares["layer 1"]:.1%} {name}, ' in html
    assert f"{top.shares['layer 1']:7.1%}: {top.row}, {top.part} {top.document}\n" in out
    assert "as recorded, bit for bit" in html
    more = Path(run).parent / "web" / "0new.txt"
    more.write_text("This is new.")
    code, _, err = command_line("replay", run, "--step", 5, "--files")
    more.unlink()
    assert code == 65
    assert "its text is not what it was made of (0new.txt: is new), so the files" in err
    for wrong in (0, 8):
        code, _, err = command_line("replay", run, "--step", wrong)
        assert code == 2
        assert f"--step={wrong}: the run has trained steps 1 to 7" in err


def test_rows_of_whole_documents_and_meshes_with_stages_are_taken_apart_too(
    cfg: Config, tmp_path: Path
) -> None:
    packed = replace(
        cfg,
        run=str(tmp_path / "packed"),
        data=replace(cfg.data, packing="documents"),
        mesh=MeshConfig(data=2, fsdp=2, stage=2),
        compute=replace(cfg.compute, microbatches=2),
    )
    train(packed)
    with replayed(packed.run, 4) as (again, step):
        check_step(again, step, packed)
        for piece in step.pieces:
            text = again.tokenizer.decode([t for t in piece.tokens if t < 256])
            assert piece.part in text or len(text) < 12
