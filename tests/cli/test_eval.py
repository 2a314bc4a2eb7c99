"""`gptjax eval` on text and tasks: what it prints, and how a mistake is told."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gptjax import config
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import CheckpointConfig, Config, EvalConfig, TokenizerConfig
from gptjax.parallel import mesh
from gptjax.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_model, byte_params, put) -> str:
    """A run of the tiny model, as an import leaves it."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    path.mkdir()
    made = Config(run=str(path), model=byte_model, tokenizer=TokenizerConfig(kind="bytes"))
    made = replace(made, train=replace(made.train, seq_len=32), eval=EvalConfig(batch=8))
    made = replace(made, log=replace(made.log, compile_cache=""))
    with mesh.entered_mesh(made):
        params = put(byte_params, byte_model)
        run_dir.record_imported(made, ByteTokenizer(), {"folder": "nowhere"})
        with Checkpointer(path / run_dir.CHECKPOINTS, CheckpointConfig(), lambda step: {}) as saver:
            saver.save(7, {"step": jnp.int32(7), "params": params})
            saver.finish()
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A task of each of two kinds, and two texts."""
    path = tmp_path_factory.mktemp("files")
    cloze = [{"text": " ".join(WORDS[: 3 + i])} for i in range(6)]
    (path / "cloze.jsonl").write_text("".join(json.dumps(one) + "\n" for one in cloze))
    arc = {"question": "q", "choices": {"text": ["a", "bc"], "label": ["A", "B"]}}
    (path / "arc.jsonl").write_text(json.dumps(arc | {"answerKey": "B"}))
    for number in range(3):
        (path / f"{number}.txt").write_text(" ".join(WORDS[number:]) * (number + 1))
    return path


def test_it_prints_a_table_and_the_same_in_json_with_all_that_repeats_it(
    folder, files, command_line
) -> None:
    texts = [files / f"{number}.txt" for number in range(3)]
    words = ["eval", folder, "--text", *texts, "--stride", 8, "--limit", 2]
    words += ["--task", f"lambada:{files}/cloze.jsonl", "--task", f"arc:{files}/arc.jsonl"]
    code, out, _ = command_line(*words)
    assert code == 0
    head, *rows = out.splitlines()
    assert head == f"{folder} at step 7"
    code, out, _ = command_line(*words, "--json", "--batch", 16)
    assert code == 0
    told = json.loads(out)
    table = {row.split()[0]: row for row in rows}
    for name in ("text_loss", "text_perplexity", "text_bits_per_byte", "lambada_acc"):
        shown = table[name].split()
        assert float(shown[1]) == pytest.approx(told[name], rel=1e-5)
        assert [float(shown[2]), float(shown[4])] == pytest.approx(
            told["intervals"][name], rel=1e-3
        )
    assert table["text_loss"].endswith("2 documents, the first")
    assert table["lambada_perplexity"].endswith("2 examples, the first of 6")
    assert table["arc_acc"].endswith("1 example")
    assert "arc_acc" not in told["intervals"]  # of a single example there is none
    assert told["text_bytes"] == sum(len(text.read_bytes()) for text in texts[:2])
    assert told["text_tokens"] == told["text_bytes"]  # of bytes
    repeat = told["repeat"]
    assert (told["run"], told["step"]) == (folder, 7)
    assert repeat["tokenizer"] == ByteTokenizer().fingerprint
    assert repeat["files"] == {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (*texts, files / "cloze.jsonl", files / "arc.jsonl")
    }
    settings = repeat["settings"]
    assert settings.pop("answer_tokens", None) is None
    assert settings == {
        **{"batch": 16, "dtype": "float32", "limit": 2, "length": 32, "stride": 8},
        **{"text_field": "text", "seed": 0, "resamples": 1000, "level": 0.95},
    }
    assert repeat["versions"]["jax"] == jax.__version__
    assert repeat["model"]["context"] == 64


def test_the_parameters_have_a_fingerprint_and_the_seed_moves_intervals_alone(
    folder, files, command_line
) -> None:
    words = ["eval", folder, "--task", f"lambada:{files}/cloze.jsonl", "--json"]
    first, again, other = (
        json.loads(command_line(*words, "--seed", seed)[1]) for seed in (0, 0, 1)
    )
    assert first == again
    assert first["repeat"]["params"] == other["repeat"]["params"]
    assert len(first["repeat"]["params"]) == 64
    assert first["lambada_perplexity"] == other["lambada_perplexity"]
    assert first["intervals"] != other["intervals"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--task", "lambda:x.jsonl"], 2, "--task=lambda:x.jsonl: unknown kind 'lambda'"),
        (["--task", "lambada:absent.jsonl"], 65, "absent.jsonl: cannot be read"),
        (["--task", "lambada:bad.jsonl"], 65, "bad.jsonl:2: has no 'text'"),
        (["--text", "absent.txt"], 65, "--text=absent.txt: no such file"),
        (["--text", "bad.jsonl"], 65, "bad.jsonl:2: no text"),
        (["--stride", "4"], 2, "--stride: means nothing without --text"),
        (["--text-field", "body"], 2, "--text-field: means nothing without --text"),
        (["--limit", "4"], 2, "--limit: means nothing without --text or --task"),
        (["--batch", "-4"], 2, "--batch=-4: must not be negative"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_looked_for(
    words, code, told, tmp_path, monkeypatch, command_line
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"txt": "a b"}\n')
    result, out, err = command_line("eval", tmp_path / "no-run", *words)
    assert (result, out) == (code, "")
    (line,) = err.strip().splitlines()
    assert line.startswith("gptjax: ")
    assert told in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--length", "65"], "--length=65: above model.context=64"),
        (["--stride", "33"], "--stride=33: above the window's length of 32"),
    ],
)
def test_windows_that_do_not_go_are_told_before_parameters_are_read(
    words, told, folder, files, command_line, monkeypatch
) -> None:
    monkeypatch.setattr(run_dir, "restore_params", None)
    code, _, err = command_line("eval", folder, "--text", files / "0.txt", *words)
    assert code == 2
    assert told in err


def test_a_model_without_text_of_its_own_must_be_given_some(folder, tmp_path, command_line) -> None:
    code, _, err = command_line("eval", folder)
    assert code == 65
    assert "an imported or fine-tuned model" in err
    assert "give --text or --task" in err
    code, _, err = command_line("eval", f"hf:{tmp_path}")
    assert code == 65
    assert "give --text or --task" in err


# --- while a run trains ------------------------------------------------------------------------


@pytest.fixture
def training(files, tmp_path, byte_model) -> Config:
    """A run of four steps on the texts, evaluated on two tasks."""
    texts = tuple(str(files / f"{number}.txt") for number in range(3))
    tasks = (f"lambada:{files}/cloze.jsonl", f"arc:{files}/arc.jsonl")
    made = Config(
        run=str(tmp_path / "run"),
        model=byte_model,
        tokenizer=TokenizerConfig(kind="bytes"),
        data=config.DataConfig(
            sources=texts, valid_sources=texts[:1], store=str(tmp_path / "store"), workers=1
        ),
        eval=EvalConfig(every=2, batch=8, sample_tokens=4, tasks=tasks, tasks_every=3),
    )
    return replace(made, train=replace(made.train, tokens=1024, batch_tokens=256, seq_len=32))


@pytest.mark.slow
def test_tasks_are_measured_at_their_steps_and_written_with_the_metrics(
    training, tmp_path, command_line
) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps(config.to_dict(training)))
    code, out, _ = command_line("train", tmp_path / "cfg.json")
    assert code == 0
    lines = [*map(json.loads, Path(training.run, "metrics.jsonl").read_text().splitlines())]
    steps = lambda name: [line["step"] for line in lines if name in line]
    assert steps("valid_loss") == [2, 4]
    assert steps("lambada_acc") == steps("lambada_perplexity") == steps("arc_acc_norm") == [3, 4]
    assert json.loads(out)["lambada_perplexity"] == lines[-1]["lambada_perplexity"]
    task = training.eval.tasks[0]
    code, out, _ = command_line("eval", training.run, "--task", task, "--json")
    told = json.loads(out)
    assert told["step"] == 4
    assert told["lambada_perplexity"] == pytest.approx(lines[-1]["lambada_perplexity"], rel=1e-5)
    code, out, _ = command_line("eval", training.run, "--batch", 3, "--json")  # its own split
    told = json.loads(out)
    assert told["valid_loss"] == pytest.approx(lines[-1]["valid_loss"], rel=1e-5)
    assert told["intervals"] == {}  # one batch says nothing of others
    settings = told["repeat"]["settings"]
    assert settings.items() >= {"batch": 8, "dtype": "float32", "limit": 0, "seed": 0}.items()


def test_a_task_that_cannot_be_used_is_told_before_text_is_prepared(
    training, tmp_path, command_line
) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps(config.to_dict(training)))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for task, code, told in (
        ("cloze:x", 2, "eval.tasks=cloze:x: unknown kind"),
        (f"arc:{tmp_path}/absent", 65, "cannot be read"),
        (f"arc:{tmp_path}/bad.jsonl", 65, "bad.jsonl:1: has no 'question'"),
    ):
        result, _, err = command_line("train", tmp_path / "cfg.json", "--eval.tasks", task)
        assert result == code
        (line,) = err.strip().splitlines()
        assert told in line
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "run").exists()
