"""`gptjax convert`: a Hugging Face folder becomes a run that samples, and comes back."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gptjax import config
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.cli import main
from gptjax.config import CheckpointConfig, Config, ModelConfig, MoeConfig, TokenizerConfig
from gptjax.hf import safetensors, tokenizer_files

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(
    vocab_size=300,
    context=48,
    layers=2,
    embed=32,
    heads=8,
    activation="swiglu",
    norm="rmsnorm",
    positions="rope",
    linear_bias=False,
    moe=MoeConfig(experts=4),
)


@pytest.fixture(autouse=True)
def _without_transformers(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "transformers" else find(name, *rest),
    )


@pytest.fixture
def folder(tmp_path, on_mesh, random_params) -> Path:
    """A mixture with a byte-level tokenizer."""
    path = tmp_path / "hf"
    path.mkdir()
    with on_mesh():
        safetensors.write_folder(path, random_params(MODEL, std=0.1), MODEL, dtype="BF16")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<eos>"])
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return path


def run(capsys, *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_an_imported_model_is_a_run_that_samples_and_comes_back(capsys, folder, tmp_path):
    made, back = tmp_path / "run", tmp_path / "back"
    code, out, _ = run(capsys, "convert", f"hf:{folder}", made)
    assert code == 0
    assert "round trip: byte-equal" in out
    assert "transformers: not compared: " in out
    assert "transformers not installed" in out
    assert (made / "source" / "tokenizer_config.json").exists()
    assert config.load(str(made)).model == MODEL

    code, out, _ = run(capsys, "inspect", made)
    assert code == 0
    assert "checkpoints: 0" in out
    assert f"imported from {folder}" in out
    assert "round trip: byte-equal" in out

    code, out, _ = run(capsys, "sample", made, "--prompt", "abc", "--max-tokens", 8)
    assert code == 0
    assert out.startswith("abc")
    code, out, err = run(capsys, "eval", made)
    assert code == 65
    assert "an imported or fine-tuned model" in err

    code, out, _ = run(capsys, "convert", made, f"hf:{back}")
    assert code == 0
    assert "format: BF16" in out
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes(), name
    before, after = (json.loads((p / "config.json").read_text()) for p in (folder, back))
    assert after == before
    assert "round trip: byte-equal" in out
    assert not list(back.glob("token_ids*"))


def test_links_that_leave_the_folder_are_refused(capsys, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("password")
    link = folder / "vocab.txt"
    link.symlink_to(secret)
    for words in (("convert", f"hf:{folder}", tmp_path / "run"), ("sample", f"hf:{folder}")):
        code, _, err = run(capsys, *words)
        assert (code, f"{link}: is a link to {secret}, outside" in err) == (65, True)
    assert not (tmp_path / "run").exists()

    link.unlink()
    assert run(capsys, "convert", f"hf:{folder}", tmp_path / "run")[0] == 0
    (tmp_path / "run/source/vocab.txt").symlink_to(secret)
    code, _, err = run(capsys, "convert", tmp_path / "run", f"hf:{tmp_path / 'out'}")
    assert (code, "vocab.txt: is a link to" in err) == (65, True)
    assert not (tmp_path / "out/vocab.txt").exists()


def test_the_hub_s_cache_has_links_of_its_own(capsys, folder, tmp_path):
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/0a"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    code, _, err = run(capsys, "convert", f"hf:{snapshot}", tmp_path / "run")
    assert code == 0, err


def test_nothing_is_trained_in_an_imported_run(capsys, folder, tmp_path):
    run(capsys, "convert", f"hf:{folder}", tmp_path / "run")
    code, _, err = run(capsys, "train", tmp_path / "run")
    assert code == 78
    assert "holds an imported model" in err


def test_a_conversion_that_does_not_agree_is_an_error_with_its_certificate_in_place(
    capsys, folder, tmp_path, monkeypatch
):
    cast = safetensors.cast
    monkeypatch.setattr(safetensors, "cast", lambda tensor, dtype: cast(tensor + 1, dtype))
    code, _, err = run(capsys, "convert", f"hf:{folder}", tmp_path / "run")
    assert (code, "do not agree" in err) == (78, True)
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert "lm_head.weight" not in certificate["round trip"]["differ"]
    assert "model.norm.weight" in certificate["round trip"]["differ"]


@pytest.mark.parametrize("damage", ["not JSON", "{}"])
def test_weights_come_in_without_a_tokenizer_that_cannot_be_used(capsys, folder, tmp_path, damage):
    (folder / "tokenizer.json").write_text(damage)
    code, _, err = run(capsys, "convert", f"hf:{folder}", tmp_path / "run")
    assert (code, "cannot read text" in err) == (0, True)


@pytest.mark.slow
def test_the_number_format_of_an_export_can_be_chosen(capsys, folder, tmp_path):
    run(capsys, "convert", f"hf:{folder}", tmp_path / "run")
    assert (
        run(capsys, "convert", tmp_path / "run", f"hf:{tmp_path}/b", "--dtype", "float16")[0] == 0
    )
    source = safetensors.open_source(tmp_path / "b")
    assert {source.dtype(name) for name in source.names} == {"F16"}
    assert source.config["dtype"] == "float16"


def test_another_tokenizer_in_an_imported_run_is_refused(capsys, folder, tmp_path):
    run(capsys, "convert", f"hf:{folder}", tmp_path / "run")
    file = tmp_path / "run" / "tokenizer.json"
    file.write_text(file.read_text().replace('"!"', '"!!"'))
    code, _, err = run(capsys, "sample", tmp_path / "run")
    assert (code, "the tokenizer of" in err) == (78, True)


@pytest.mark.parametrize(
    ("source", "target", "exit_code", "told"),
    [
        ("hf:nowhere", "run", 2, "nowhere: no such folder"),
        ("nowhere", "hf:out", 2, "nowhere: no such folder"),
        ("hf:{folder}", "{folder}", 73, "is not empty"),
        ("hf:{folder}", "hf:out", 2, "one of the two must be a run folder"),
        ("hf:{folder}", ".", 73, "is not empty"),
        ("hf:{folder}", "az://bucket/run", 2, "az://bucket/run: gptjax reads local files, gs://"),
        ("run", "out", 2, "run: is no run folder; a Hugging Face folder is hf:run"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    capsys, folder, tmp_path, monkeypatch, source, target, exit_code, told
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(
        capsys, "convert", source.format(folder=folder), target.format(folder=folder)
    )
    assert (code, told in err) == (exit_code, True), err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_a_tokenizer_makes_a_run_that_says_so(capsys, folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    code, _, err = run(capsys, "convert", f"hf:{folder}", tmp_path / "run")
    assert code == 0
    assert "no tokenizer.json" in err
    code, _, err = run(capsys, "sample", tmp_path / "run", "--prompt", "a")
    assert code == 65
    assert "no tokenizer" in err


@pytest.fixture
def trained(tmp_path, on_mesh, random_params) -> Path:
    """A run of this project with a SentencePiece tokenizer."""
    texts = [f"def value_{i}(index):\n    return   index * {i}\n" for i in range(200)]
    tokenizer = tokenizers.train(texts, TokenizerConfig(vocab_size=300))
    path = tmp_path / "answers"
    path.mkdir()
    cfg = replace(Config(), run=str(path), model=MODEL, tokenizer=TokenizerConfig())
    run_dir.record_tuned(
        replace(cfg, finetune=replace(cfg.finetune, task="answer", base="runs/base")), tokenizer, {}
    )
    with (
        on_mesh(),
        Checkpointer(path / run_dir.CHECKPOINTS, CheckpointConfig()) as checkpointer,
    ):
        params = random_params(MODEL, std=0.1)
        checkpointer.save(7, {"step": jnp.int32(7), "params": params})
        checkpointer.finish()
    return path


@pytest.mark.slow
def test_an_export_is_a_whole_folder_that_other_libraries_open(capsys, trained, tmp_path):
    out = tmp_path / "my-model"
    code, text, err = run(capsys, "convert", trained, f"hf:{out}")
    assert code == 0, err
    assert {file.name for file in out.iterdir()} == {
        *("README.md", "certificate.json", "config.json", "generation_config.json"),
        *("model.safetensors", "special_tokens_map.json", "tokenizer.json"),
        "tokenizer_config.json",
    }
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in out.iterdir())
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["tokenizer"]["differ"] == 0
    assert certificate["tokenizer"]["texts"] > 1000
    assert "differ: 0" in text
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    card = (out / "README.md").read_text()
    assert "# my-model" in card
    assert "pipeline_tag: text-generation" in card
    assert "| Fine-tuned | answer, from base |" in card
    assert "| Steps | 7 |" in card

    words = ("--prompt", "def", "--temperature", 0, "--max-tokens", 8)
    before = run(capsys, "sample", trained, *words)
    after = run(capsys, "sample", f"hf:{out}", *words)
    assert before[:2] == after[:2]
    assert before[0] == 0


@pytest.mark.slow
def test_an_export_with_another_tokenizer_is_an_error_that_shows_it(
    capsys, trained, tmp_path, monkeypatch
):
    made = tokenizer_files.tokenizer_json
    monkeypatch.setattr(
        tokenizer_files,
        "tokenizer_json",
        lambda tokenizer: made(tokenizer).replace(
            b'"byte_fallback": true', b'"byte_fallback": false'
        ),
    )
    code, _, err = run(capsys, "convert", trained, f"hf:{tmp_path / 'out'}")
    assert code == 78
    assert "makes another tokenizer of it than the run's: the ids of " in err
    certificate = json.loads((tmp_path / "out/certificate.json").read_text())
    assert certificate["tokenizer"]["differ"] > 0
    assert certificate["round trip"] == "byte-equal"
