"""`gptjax finetune` and `gptjax predict`, in process, on a tiny model."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config, load_model
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import MoeConfig, StageConfig, TokenizerConfig
from gptjax.finetune import defaults
from gptjax.parallel.mesh import entered_mesh

from conftest import labelled  # isort: skip

pytestmark = pytest.mark.usefixtures("quick_compile")

QUICK = ("--optim.lr", "3e-3", "--finetune.epochs", "4", "--train.seq_len", "16")


@pytest.fixture
def finetune(command_line, base, write, tmp_path):
    """Runs the command on a task of capitals; exit code, output, what was told."""
    write("train.jsonl", labelled(48, 0))
    write("valid.jsonl", labelled(20, 1))

    def call(out: str, *words: object, task: str = "classify", start: str = base):
        data = ("--data", tmp_path / "train.jsonl", "--valid", tmp_path / "valid.jsonl")
        given = ("finetune", start, "--task", task, *data, "--run", tmp_path / out)
        return command_line(*given, *QUICK, *words)

    return call


def fingerprints(folder: Path) -> dict:
    checkpoints = Checkpointer(folder / run_dir.CHECKPOINTS)
    return checkpoints.meta(checkpoints.steps()[-1])["fingerprints"]


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_labels_are_learnt_told_and_predicted(finetune, command_line, write, tmp_path) -> None:
    code, out, err = finetune("out", "--finetune.epochs", "12")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["valid_accuracy"] == result["valid_f1"] == 1.0
    assert "begins from" in err
    assert "only 18 optimizer steps in all" in err
    folder = tmp_path / "out"
    assert f"{folder} is trained: 18 steps, " in err
    assert f"next: gptjax predict {folder} --file JSONL --output JSONL" in err
    report = json.loads((tmp_path / "out/classification.json").read_text())
    assert report["confusion"] == [[10, 0], [0, 10]]
    assert list(report["labels"]) == ["high", "low"]
    cfg = config.load(str(tmp_path / "out"))
    assert cfg.finetune.labels == ("high", "low")
    assert (cfg.model.vocab_size, cfg.model.table) == (261, 384)
    assert cfg.optim.lr_schedule == "linear"
    assert cfg.steps == 12 * 48 // 32

    valid = labelled(20, 1)
    write("new.jsonl", [one | {"label": "nonsense"} for one in valid[:10]] + valid[10:])
    files = ("--file", tmp_path / "new.jsonl", "--output", tmp_path / "told.jsonl")
    code, _, err = command_line("predict", tmp_path / "out", *files)
    assert code == 0, err
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert [one["label"] for one in told] == [one["label"] for one in valid]
    for one in told:
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert max(one["probabilities"], key=one["probabilities"].get) == one["label"]
    code, _, err = command_line("train", tmp_path / "out")
    assert code == 2
    assert "`gptjax finetune`" in err


@pytest.mark.parametrize(
    "task",
    ["answer", *(pytest.param(t, marks=pytest.mark.exhaustive) for t in ("choose", "classify"))],
)
@pytest.mark.slow
def test_a_run_that_goes_on_ends_with_the_same_bits(finetune, write, tmp_path, task) -> None:
    texts = [one["text"] for one in labelled(48, 0)]
    if task == "choose":
        rows = [{"text": "q", "choices": [t[:5], t[:5].swapcase()], "label": 0} for t in texts]
    if task == "answer":
        rows = [{"prompt": text[:3], "answer": text[3:6].upper() or "-"} for text in texts]
    if task != "classify":
        write("train.jsonl", rows)
        write("valid.jsonl", rows[:8])
    often = ("--checkpoint.every", 2, "--checkpoint.keep", 9, "--model.dropout", "0.1")
    often += ("--train.tokens", 6 * 16 * 8, "--train.batch-tokens", 16 * 8)
    assert finetune("whole", *often, task=task)[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"cut/checkpoints/{step}")
    code, out, err = finetune("cut", *often, task=task)
    assert code == 0
    assert "resumed after step 2 of 6" in err
    assert "begins from" not in err
    assert fingerprints(tmp_path / "cut") == fingerprints(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    changed = json.loads(out)["run"]
    assert changed == str(tmp_path / "cut")


def test_the_recipe_takes_the_model_and_not_how_it_was_trained(base) -> None:
    begun_from = load_model.find_base(base)
    cfg = begun_from.cfg
    grows = {"batch_ramp_tokens": 64, "batch_start_tokens": 32, "batch_increment_tokens": 32}
    trained = dataclasses.replace(cfg.train, ema_decay=0.99, z_loss=0.1, accumulation=4, **grows)
    optim = dataclasses.replace(cfg.optim, name="muon", lr=0.5, weight_decay=0.3)
    begun_from = dataclasses.replace(
        begun_from,
        cfg=dataclasses.replace(cfg, train=trained, optim=optim, stages={"a": StageConfig()}),
    )
    recipe_of = defaults.begun(begun_from, "classify", "a", "b")
    train, optim = recipe_of.train, recipe_of.optim
    assert (train.ema_decay, train.z_loss, train.accumulation) == (0, 0, 1)
    assert recipe_of.stages == {}
    assert {getattr(train, name) for name in grows} == {0}
    assert (optim.name, optim.weight_decay) == ("adamw", 0.01)
    assert recipe_of.model == cfg.model
    rate = lambda cfg: defaults.resolved(cfg, longest=10, rows=64).optim.lr
    tune = recipe_of.finetune
    adapters = dataclasses.replace(tune, lora=dataclasses.replace(tune.lora, rank=4))
    assert rate(recipe_of) == 6.25e-5
    assert rate(dataclasses.replace(recipe_of, finetune=adapters)) == pytest.approx(6.25e-4)
    given = dataclasses.replace(recipe_of, optim=dataclasses.replace(optim, lr=0.0))
    assert rate(given) == 0


@pytest.mark.slow
def test_other_examples_are_another_run(finetune, write) -> None:
    assert finetune("out", "--finetune.epochs", 1)[0] == 0
    write("train.jsonl", labelled(48, 5))
    code, _, err = finetune("out", "--finetune.epochs", 1)
    assert code == 78
    assert "was begun with other examples" in err
    assert "train: " in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "mesh"),
    [
        ("classify", ("--mesh.context", 2, "--mesh.data", 4, "--train.accumulation", 2)),
        ("answer", ("--mesh.fsdp", 2, "--mesh.tensor", 2, "--mesh.data", 2)),
        pytest.param(
            *("classify", ("--mesh.fsdp", 2, "--mesh.tensor", 2, "--mesh.data", 2)),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_every_mesh_has_the_same_losses(finetune, write, tmp_path, task, mesh) -> None:
    few = ("--finetune.epochs", 2, "--model.dropout", "0.1", "--train.batch-tokens", 32 * 16)
    if task == "answer":
        rows = [{"prompt": one["text"][:6], "answer": one["label"]} for one in labelled(48, 0)]
        write("train.jsonl", rows)
        write("valid.jsonl", rows[:8])
        few += ("--train.tokens", 3 * 32 * 16)
    assert finetune("one", *few, task=task)[0] == 0
    code, _, err = finetune("other", *few, *mesh, task=task)
    assert code == 0, err
    assert len(losses(tmp_path / "one")) == 3
    np.testing.assert_allclose(losses(tmp_path / "other"), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.slow
def test_choices_are_learnt(finetune, command_line, write, tmp_path) -> None:
    def choices(count: int, seed: int) -> list[dict]:
        texts = [one["text"].lower() for one in labelled(count, seed)]
        made = []
        for i, text in enumerate(texts):
            options = [text.upper(), text][:: 1 if i % 2 else -1]
            made.append({"text": "q", "choices": [o[:5] for o in options], "label": (i + 1) % 2})
        made[0] = {"text": "q", "choices": ["ab", "CD", "ef"], "label": 1}
        return made

    write("train.jsonl", choices(48, 0))
    write("valid.jsonl", choices(20, 1))
    code, out, err = finetune("out", "--finetune.epochs", 12, task="choose")
    assert code == 0, err
    assert json.loads(out)["valid_accuracy"] >= 0.95
    write("new.jsonl", [{"text": "q", "choices": ["AB", "xyz"]}])
    files = ("--file", tmp_path / "new.jsonl", "--output", tmp_path / "told.jsonl")
    assert command_line("predict", tmp_path / "out", *files)[0] == 0
    (told,) = map(json.loads, (tmp_path / "told.jsonl").read_text().splitlines())
    assert told["label"] == 0
    assert len(told["probabilities"]) == 2


@pytest.mark.slow
def test_the_table_grows_where_the_special_tokens_have_no_room(
    make_base, finetune, tmp_path
) -> None:
    tight = make_base(tmp_path / "tight", vocab_multiple=1, tied_embeddings=False)
    code, _, err = finetune("out", "--finetune.epochs", 1, "--optim.lr", 0, start=tight)
    assert code == 0, err
    cfg = config.load(str(tmp_path / "out"))
    assert cfg.model.table == 261
    with entered_mesh(cfg):
        before, _ = run_dir.restore_params(tight, config.load(tight))
        after, _ = run_dir.restore_params(str(tmp_path / "out"), cfg)
        for name in ("embed", "head"):
            old, new = np.asarray(before[name]), np.asarray(after[name])
            np.testing.assert_array_equal(new[:258], old)
            assert 0.01 < new[258:].std() < 0.03
        np.testing.assert_array_equal(before["positions"], after["positions"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "positions": "rope",
            "norm": "rmsnorm",
            "activation": "swiglu",
            "mlp": 48,
            "linear_bias": False,
            "kv_heads": 2,
            "tied_embeddings": False,
        },
    ],
)
def test_an_export_has_the_scores_of_the_public_implementation(
    make_base, finetune, command_line, tmp_path, fields
) -> None:
    pytest.importorskip("transformers")
    start = make_base(tmp_path / "start", **fields)
    assert finetune("out", "--finetune.epochs", 2, start=start)[0] == 0
    code, _, err = command_line("convert", tmp_path / "out", f"hf:{tmp_path / 'folder'}")
    assert code == 0, err
    certificate = json.loads((tmp_path / "folder/certificate.json").read_text())
    assert certificate["round trip"] == "byte-equal"
    compared = certificate["transformers"]
    assert compared["architecture"].endswith("ForSequenceClassification")
    assert compared["largest_score"] > 0.1
    assert compared["largest_difference"] < 1e-5
    exported = json.loads((tmp_path / "folder/config.json").read_text())
    assert exported["id2label"] == {"0": "high", "1": "low"}
    assert exported["task_specific_params"]["classify"]["extract"] == 260


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="all", marks=pytest.mark.exhaustive),
        pytest.param(("--finetune.lora.rank", 4, "--optim.lr", "1e-2"), id="adapters"),
    ],
)
def test_a_hugging_face_folder_is_a_base(
    make_base, finetune, command_line, write, tmp_path, words
) -> None:
    texts = [one["text"] for one in labelled(200, 3)]
    kind = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=270)
    start = make_base(tmp_path / "start", tokenizers.train(texts, kind), vocab_size=270)
    assert command_line("convert", start, f"hf:{tmp_path / 'folder'}", "--no-compare")[0] == 0
    tokenizers.load(Path(start)).save(tmp_path / "folder")
    given = f"hf:{tmp_path / 'folder'}"
    code, out, err = finetune("out", "--finetune.epochs", 12, *words, start=given)
    assert code == 0, err
    assert f"begins from {given}" in err
    trained = json.loads(out)["valid_loss"]
    assert trained < 0.6
    new = write("new.jsonl", labelled(20, 1))
    files = ("--file", new, "--output", tmp_path / "told.jsonl")
    assert command_line("predict", tmp_path / "out", *files)[0] == 0
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    wanted = [one["label"] for one in labelled(20, 1)]
    nats = [-np.log(t["probabilities"][label]) for t, label in zip(told, wanted, strict=True)]
    assert np.mean(nats) == pytest.approx(trained, rel=1e-4)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_mixtures_learn_labels(make_base, finetune, tmp_path) -> None:
    moe = MoeConfig(experts=4, top_k=2)
    start = make_base(tmp_path / "start", moe=moe, linear_bias=False, activation="swiglu")
    code, out, err = finetune("one", "--finetune.epochs", 12, start=start)
    assert code == 0, err
    assert json.loads(out)["valid_accuracy"] >= 0.9
    code, _, err = finetune("two", "--finetune.epochs", 12, "--mesh.expert", 4, start=start)
    assert code == 0, err
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-4)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--model.layers", 3), 2, "model.layers=3: the base has 2"),
        (("--mesh.stage", 2), 2, "mesh.stage=2: fine-tuning has no pipeline"),
        (("--finetune.lm-weight", -1), 2, "finetune.lm_weight=-1.0: must not be negative"),
        (("--finetune.task", "none"), 2, "give them as RUN and as --task"),
        (("--finetune.labels", "low"), 2, "finetune.labels: are those of the data"),
        (("--finetune.epochs", 0), 2, "finetune.epochs=0: must be at least 1"),
        (("--valid", "/nowhere"), 65, "--valid=/nowhere: cannot be read"),
    ],
)
def test_what_is_wrong_is_told_before_the_run_folder_is_made(
    finetune, tmp_path, words, code, says
) -> None:
    got, _, err = finetune("out", *words)
    assert (got, says in err) == (code, True), err
    assert not (tmp_path / "out").exists() or words[0] == "--mesh.stage"


def test_a_base_must_have_parameters(finetune, base, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copy(Path(base) / "config.json", tmp_path / "empty")
    code, _, err = finetune("out", start=str(tmp_path / "empty"))
    assert code == 74
    assert "has no checkpoint yet" in err


def test_help_needs_neither_data_nor_jax(command_line, base) -> None:
    code, out, _ = command_line("finetune", base, "--help")
    assert code == 0
    assert "--finetune.lm-weight" in out
    assert command_line("finetune", base)[0] == 2


def test_predict_is_for_runs_with_a_task(command_line, base, write, tmp_path) -> None:
    file = write("new.jsonl", [{"text": "a"}])
    code, _, err = command_line("predict", base, "--file", file, "--output", tmp_path / "o")
    assert code == 2
    assert "predict is for classify and choose" in err


@pytest.mark.slow
def test_answers_are_learnt_and_measured_and_sampled(
    finetune, command_line, write, tmp_path
) -> None:
    pairs = [{"prompt": f"{c}{c}?", "answer": c.upper()} for c in "abcdefgh"]
    write("train.jsonl", pairs * 4)
    write("valid.jsonl", pairs)
    words = ("--finetune.epochs", 40, "--checkpoint.every", 1000, "--eval.every", 0)
    words += ("--train.batch_tokens", 8 * 16, "--optim.lr", "1e-2")
    code, out, err = finetune("out", *words, task="answer")
    assert code == 0, err
    result = json.loads(out)
    assert result["valid_exact_match"] == result["valid_f1"] == 1.0
    assert "train: 32 examples" in err
    code, out, err = command_line(
        *("sample", tmp_path / "out", "--prompt", "cc?", "--temperature", 0, "--max-tokens", 4)
    )
    assert code == 0, err
    assert out.strip() == "cc? C"
    write("valid.jsonl", [{"prompt": "a", "answer": "b" * 20}])
    code, _, err = finetune("long", task="answer")
    assert code == 65
    assert "valid.jsonl:1: the answer has 22 tokens, more than train.seq_len=16" in err


# --- adapters, and what else learns only in part ---------------------------------------------

LORA = ("--finetune.lora.rank", 4, "--finetune.lora.targets", "blocks/.*/attn/[qkvo]")


@pytest.mark.slow
def test_adapters_are_learnt_resumed_merged_and_used(
    finetune, command_line, write, tmp_path, base
) -> None:
    often = (*LORA, "--finetune.epochs", 12, "--checkpoint.every", 6, "--checkpoint.keep", 9)
    code, out, err = finetune("whole", *often, "--optim.lr", "1e-2")
    assert code == 0, err
    assert "trains 2,112 of " in err
    assert json.loads(out)["valid_accuracy"] >= 0.9
    tree = Checkpointer(tmp_path / "whole/checkpoints").meta(18)["tree"]
    saved = {path for path in tree if path.startswith("params/")}
    assert all(p.startswith(("params/adapters/", "params/base/head_task/")) for p in saved)

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (12, 18):
        shutil.rmtree(tmp_path / f"cut/checkpoints/{step}")
    code, _, err = finetune("cut", *often, "--optim.lr", "1e-2")
    assert code == 0, err
    assert "resumed after step 6 of 18" in err
    assert fingerprints(tmp_path / "cut") == fingerprints(tmp_path / "whole")

    new = write("new.jsonl", labelled(20, 2))
    code, out, err = command_line("convert", tmp_path / "whole", tmp_path / "merged")
    assert code == 0, err
    told = []
    for name in ("whole", "merged"):
        files = ("--file", new, "--output", tmp_path / f"{name}.jsonl")
        code, _, err = command_line("predict", tmp_path / name, *files)
        assert code == 0, err
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        told.append([json.loads(line)["probabilities"]["low"] for line in lines])
    np.testing.assert_allclose(told[0], told[1], rtol=1e-6)

    code, _, err = command_line("convert", tmp_path / "whole", f"peft:{tmp_path / 'adapters'}")
    assert code == 2
    assert "finetune.task=classify has a layer and tokens of its own" in err
    code, _, err = command_line("convert", tmp_path / "merged", tmp_path / "again")
    assert (code, "no adapters to merge" in err) == (2, True)
    shutil.move(base, f"{base}.away")
    try:
        code, _, err = command_line("predict", tmp_path / "whole", *files)
        assert (code, f"its adapters need finetune.base={base}" in err) == (2, True), err
        assert command_line("predict", tmp_path / "merged", *files)[0] == 0
    finally:
        shutil.move(f"{base}.away", base)
    code, _, err = finetune("more", start=str(tmp_path / "whole"))
    assert (code, "has adapters beside a base; merge them" in err) == (2, True), err


@pytest.mark.slow
def test_adapters_go_with_the_step_of_the_base_that_they_began_from(
    make_base, finetune, command_line, write, tmp_path
) -> None:
    start = make_base(tmp_path / "start")
    assert finetune("out", *LORA, "--finetune.epochs", 1, start=start)[0] == 0
    new = write("new.jsonl", labelled(4, 2))
    predict = ("predict", tmp_path / "out", "--file", new, "--output", tmp_path / "told.jsonl")
    assert command_line(*predict)[0] == 0
    told = (tmp_path / "told.jsonl").read_text()
    # The base learns on: its newest parameters are others, and those of step 0 are still there.
    cfg = config.load(start)
    with (
        entered_mesh(cfg),
        Checkpointer(Path(start) / run_dir.CHECKPOINTS, cfg.checkpoint) as c,
    ):
        params, _ = run_dir.restore_params(start, cfg)
        c.save(7, {"step": jnp.int32(7), "params": jax.tree.map(lambda x: x + 1, params)})
        c.finish()
    assert command_line(*predict)[0] == 0
    assert (tmp_path / "told.jsonl").read_text() == told
    shutil.rmtree(Path(start) / run_dir.CHECKPOINTS / "0")
    code, _, err = command_line(*predict)
    assert code == 74
    assert "checkpoint 0 not found; available: 7" in err


@pytest.mark.slow
def test_adapters_go_to_peft_and_come_back(finetune, command_line, base, write, tmp_path) -> None:
    pairs = [{"prompt": f"{c}{c}?", "answer": c.upper()} for c in "abcdefgh"]
    write("train.jsonl", pairs)
    write("valid.jsonl", pairs)
    code, _, err = finetune("out", *LORA, "--optim.lr", "1e-2", task="answer")
    assert code == 0, err
    code, out, err = command_line("convert", tmp_path / "out", f"peft:{tmp_path / 'adapters'}")
    assert code == 0, err
    assert "base_model_name_or_path: nowhere" in out  # whence the base was imported
    words = ("convert", f"peft:{tmp_path / 'adapters'}", tmp_path / "back")
    assert command_line(*words)[0] == 2
    code, _, err = command_line(*words, "--base", tmp_path / "out")
    assert (code, "is fine-tuned; give what the adapters began from" in err) == (2, True), err
    code, _, err = command_line(*words, "--base", base)
    assert code == 0, err
    cfg = config.load(str(tmp_path / "back"))
    with entered_mesh(cfg):
        (ours, _), (theirs, _), (plain, _) = (
            load_model.find_model(str(folder)).read_params()
            for folder in (tmp_path / "out", tmp_path / "back", base)
        )
        layers = (p["blocks"]["layer_0"]["attn"] for p in (ours, theirs, plain))
        for mine, back, old in zip(*([layer[n] for n in "qkvo"] for layer in layers), strict=True):
            np.testing.assert_allclose(np.asarray(mine), np.asarray(back), atol=1e-6)
            assert np.abs(np.asarray(mine) - np.asarray(old)).max() > 1e-3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--finetune.freeze", "nothing"), "finetune.freeze=nothing: matches none of "),
        (("--finetune.freeze", ".*"), "nothing is left to train"),
        (("--finetune.freeze-layers", 3), "finetune.freeze_layers=3: must be at least 0"),
        (("--finetune.layer-decay", 0), "finetune.layer_decay=0.0: must be above 0"),
        (LORA[2:], "finetune.lora.rank=0: there are no adapters"),
        (("--finetune.lora.rank", -1), "finetune.lora.rank=-1: must not be negative"),
        ((*LORA[:3], "q"), "finetune.lora.targets=q: matches none of blocks/"),
    ],
)
def test_what_cannot_learn_is_told(finetune, words, says) -> None:
    code, _, err = finetune("out", *words)
    assert (code, says in err) == (2, True), err


@pytest.mark.slow
def test_what_is_frozen_stays(finetune, base, tmp_path) -> None:
    frozen = ("--finetune.freeze", "embed", "positions", "--finetune.freeze-layers", 1)
    code, _, err = finetune("out", *frozen, "--finetune.layer-decay", 0.5)
    assert code == 0, err
    cfg = config.load(str(tmp_path / "out"))
    with entered_mesh(cfg):
        before, _ = run_dir.restore_params(base, config.load(base))
        after, _ = run_dir.restore_params(str(tmp_path / "out"), cfg)
        np.testing.assert_array_equal(after["embed"][:258], before["embed"][:258])
        np.testing.assert_array_equal(after["positions"], before["positions"])
        old, new = (np.asarray(p["blocks"]["layer_0"]["attn"]["q"]) for p in (before, after))
        np.testing.assert_array_equal(new[0], old[0])
        assert np.abs(new[1] - old[1]).max() > 1e-4
