"""`gptjax eval` on text and task files: its output, and the errors of wrong options and files."""

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
    """A run of the tiny model, as `gptjax convert` makes it."""
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
    """Task files of two kinds, and three texts."""
    path = tmp_path_factory.mktemp("files")
    cloze = [{"text": " ".join(WORDS[: 3 + i])} for i in range(6)]
    (path / "cloze.jsonl").write_text("".join(json.dumps(one) + "\n" for one in cloze))
    arc = {"question": "q", "choices": {"text": ["a", "bc"], "label": ["A", "B"]}}
    (path / "arc.jsonl").write_text(json.dumps(arc | {"answerKey": "B"}))
    for number in range(3):
        (path / f"{number}.txt").write_text(" ".join(WORDS[number:]) * (number + 1))
    return path


def test_table_and_json_agree_and_json_has_all_that_reproduces_them(
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
    result = json.loads(out)
    table = {row.split()[0]: row for row in rows}
    for name in ("text_loss", "text_perplexity", "text_bits_per_byte", "lambada_acc"):
        shown = table[name].split()
        assert float(shown[1]) == pytest.approx(result[name], rel=1e-5)
        assert [float(shown[2]), float(shown[4])] == pytest.approx(
            result["intervals"][name], rel=1e-3
        )
    assert table["text_loss"].endswith("2 documents, the first")
    assert table["lambada_perplexity"].endswith("2 examples, the first of 6")
    assert table["arc_acc"].endswith("1 example")
    assert "arc_acc" not in result["intervals"]  # none for a single example
    assert result["text_bytes"] == sum(len(text.read_bytes()) for text in texts[:2])
    assert result["text_tokens"] == result["text_bytes"]  # of bytes
    repeat = result["repeat"]
    assert (result["run"], result["step"]) == (folder, 7)
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


@pytest.mark.slow
def test_seed_changes_confidence_intervals_and_nothing_else(folder, files, command_line) -> None:
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
    ("words", "exit_code", "message"),
    [
        (["--task", "lambda:x.jsonl"], 2, "--task=lambda:x.jsonl: unknown kind 'lambda'"),
        (["--task", "lambada:absent.jsonl"], 65, "absent.jsonl: cannot be read"),
        (["--task", "lambada:bad.jsonl"], 65, "bad.jsonl:2: has no 'text'"),
        (["--text", "absent.txt"], 65, "--text=absent.txt: no such file"),
        (["--text", "bad.jsonl"], 65, "bad.jsonl:2: no text"),
        (["--stride", "4"], 2, "--stride: requires --text"),
        (["--text-field", "body"], 2, "--text-field: requires --text"),
        (["--limit", "4"], 2, "--limit: requires --text or --task"),
        (["--batch", "-4"], 2, "--batch=-4: must not be negative"),
    ],
)
def test_wrong_options_and_files_are_reported_before_the_model_is_opened(
    words, exit_code, message, tmp_path, monkeypatch, command_line
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"txt": "a b"}\n')
    code, out, err = command_line("eval", tmp_path / "no-run", *words)
    assert (code, out) == (exit_code, "")
    (line,) = err.strip().splitlines()
    assert line.startswith("gptjax: ")
    assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "65"], "--length=65: must not exceed model.context=64"),
        (["--stride", "33"], "--stride=33: must not exceed the window length of 32"),
    ],
)
def test_invalid_windows_are_reported_before_parameters_are_read(
    words, message, folder, files, command_line, monkeypatch
) -> None:
    monkeypatch.setattr(run_dir, "restore_params", None)
    code, _, err = command_line("eval", folder, "--text", files / "0.txt", *words)
    assert code == 2
    assert message in err


def test_without_validation_split_text_or_task_is_required(folder, tmp_path, command_line) -> None:
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
def test_tasks_are_evaluated_every_tasks_every_steps_and_written_as_metrics(
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
    result = json.loads(out)
    assert result["step"] == 4
    assert result["lambada_perplexity"] == pytest.approx(lines[-1]["lambada_perplexity"], rel=1e-5)
    code, out, _ = command_line("eval", training.run, "--batch", 3, "--json")  # its own split
    result = json.loads(out)
    assert result["valid_loss"] == pytest.approx(lines[-1]["valid_loss"], rel=1e-5)
    assert result["intervals"] == {}  # none for a single batch
    settings = result["repeat"]["settings"]
    assert settings.items() >= {"batch": 8, "dtype": "float32", "limit": 0, "seed": 0}.items()


def test_unusable_task_file_is_reported_before_text_is_prepared(
    training, tmp_path, command_line
) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps(config.to_dict(training)))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for task, exit_code, message in (
        ("cloze:x", 2, "eval.tasks=cloze:x: unknown kind"),
        (f"arc:{tmp_path}/absent", 65, "cannot be read"),
        (f"arc:{tmp_path}/bad.jsonl", 65, "bad.jsonl:1: has no 'question'"),
    ):
        code, _, err = command_line("train", tmp_path / "cfg.json", "--eval.tasks", task)
        assert code == exit_code
        (line,) = err.strip().splitlines()
        assert message in line
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "run").exists()
