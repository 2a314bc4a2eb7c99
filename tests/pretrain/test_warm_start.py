"""Warm starts: pre-training that begins with the parameters of another run or of a folder."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import checkpointer, run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)
from gptjax.data.mixture import Manifests
from gptjax.data.store import Manifest, Split
from gptjax.errors import DataError, MismatchError
from gptjax.finetune import defaults
from gptjax.model import decoder
from gptjax.parallel import mesh
from gptjax.param_tree import leaves_by_path
from gptjax.pretrain import train as pretraining
from gptjax.pretrain.train import train
from gptjax.pretrain.warm_start import WarmStart, find_base, with_base
from gptjax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, train_huggingface
from gptjax.training.step import create_state

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS, HALF = 8, 4
Run = Callable[..., tuple[int, str, str]]


def _text(folder: Path, line: str) -> str:
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"{line} {number}\n" * 60)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    """A run with a moving average, with checkpoints after half of its steps and at the end, as
    training would leave it; nothing is trained."""
    folder = tmp_path_factory.mktemp("base")
    cfg = Config(
        run=str(folder / "base"),
        model=ModelConfig(vocab_size=264, context=64, layers=2, embed=16, heads=8),
        mesh=MeshConfig(fsdp=8),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            sources=(_text(folder / "old", "this text is read here"),),
            store=str(folder / "store"),
            workers=1,
        ),
        optim=OptimConfig(lr=1e-2, warmup_tokens=512, lr_schedule="constant"),
        train=TrainConfig(tokens=STEPS * 512, batch_tokens=512, seq_len=32, ema_decay=0.5),
        eval=EvalConfig(batch=8, sample_tokens=8),
        checkpoint=CheckpointConfig(every=HALF),
        log=LogConfig(every=1, tensorboard=False, compile_cache=""),
    )
    split = Split(1, 100, 98, ("00" * 32,))
    known = {"kind": "bytes", "sha256": ByteTokenizer().fingerprint, "vocab_size": 258}
    manifest = Manifest(known | {"eos_id": 256}, {}, {}, "<u2", {"train": split, "valid": split})
    with run_dir.claim(cfg), on(cfg):
        run_dir.record(cfg, ByteTokenizer(), Manifests({"": manifest}))
        state = jax.jit(lambda: create_state(cfg, lambda key: decoder.init(cfg.model, key)))()
        with Checkpointer(folder / "base" / run_dir.CHECKPOINTS, cfg.checkpoint) as saver:
            for step in (HALF, STEPS):
                counted = jax.tree.map(lambda x: x + step if x.ndim == 0 else x, state)  # noqa: B023
                saver.save(step, replace(counted, nonfinite=state.nonfinite))
            saver.finish()
    return cfg


@pytest.fixture(scope="module")
def trained(base: Config) -> Config:
    """The same run, really trained."""
    cfg = replace(base, run=f"{base.run}-trained")
    train(cfg)
    return cfg


@pytest.fixture
def other(base: Config, tmp_path: Path) -> Config:
    """Another run on other text, of a configuration without the base's model."""
    store, text = str(tmp_path / "store"), _text(tmp_path / "new", "dieser Text wird gelesen")
    return replace(
        base,
        run=str(tmp_path / "run"),
        model=ModelConfig(),
        data=replace(base.data, sources=(text,), store=store),
    )


def meta(cfg: Config, step: int) -> dict[str, Any]:
    return Checkpointer(Path(cfg.run) / run_dir.CHECKPOINTS).meta(step)


def losses(cfg: Config) -> dict[int, float]:
    lines = map(json.loads, (Path(cfg.run) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def started(cfg: Config, *words: str, folder: Path) -> Config:
    """The configuration of a command line whose CONFIG is a preset like `cfg`."""
    file = folder / "preset.py"
    values = json.dumps(config.to_dict(cfg))
    file.write_text(
        "import json\nfrom gptjax import config\n"
        f"def main():\n    return config.from_dict(json.loads({values!r}))\n"
    )
    return with_base(config.resolve(str(file), words), str(file), words)


# --- what is taken -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_branch_with_optimizer_and_step_that_changes_nothing_is_the_same_run(
    trained: Config, tmp_path: Path
) -> None:
    base = trained
    words = ["--start", f"{base.run}@{HALF}", "--start.optimizer", "--start.keep-step"]
    words += ["--run", str(tmp_path / "branch"), "--data.store", base.data.store]
    branch = with_base(config.resolve(base.run, words), base.run, words)
    assert branch.start == config.StartConfig(f"{base.run}@{HALF}", True, True)
    train(branch)
    assert min(losses(branch)) == HALF + 1
    assert meta(branch, STEPS)["fingerprints"] == meta(base, STEPS)["fingerprints"]


@pytest.mark.slow
def test_a_run_on_other_text_starts_from_the_average_and_needs_the_base_no_more(
    trained: Config, other: Config, tmp_path: Path, monkeypatch
) -> None:
    base, copy = trained, tmp_path / "copy"
    shutil.copytree(base.run, copy)
    cfg = started(other, "--start", str(copy), folder=tmp_path)
    assert cfg.model == base.model
    shorter = replace(cfg, train=replace(cfg.train, tokens=HALF * 512))
    read = []
    state_of = pretraining.warm_start.state_of
    monkeypatch.setattr(
        pretraining.warm_start,
        "state_of",
        lambda cfg, params: read.append(jax.device_get(params["embed"])) or state_of(cfg, params),
    )
    train(shorter)
    with mesh.entered_mesh(base):
        average, step = run_dir.restore_params(base.run, base)
        np.testing.assert_array_equal(read[0], average["embed"])
    facts = run_dir.start_of(cfg.run)
    assert facts is not None
    assert (step, facts["base"]) == (STEPS, f"{copy}@{STEPS}")
    assert meta(cfg, HALF)["start"] == facts
    shutil.rmtree(copy)
    again = started(other, "--start", str(copy), folder=tmp_path)
    assert again == cfg
    train(again)
    assert meta(cfg, STEPS)["start"] == facts
    assert sorted(losses(cfg)) == list(range(1, STEPS + 1))


def test_an_optimizer_state_is_taken_and_the_schedule_begins_anew(
    base: Config, other: Config, tmp_path: Path
) -> None:
    cfg = started(other, "--start", base.run, "--start.optimizer", folder=tmp_path)
    saved = meta(base, STEPS)["fingerprints"]
    with mesh.entered_mesh(cfg):
        start = WarmStart.find(cfg, print)
        assert start is not None
        Path(cfg.run).mkdir()
        state = start.state(None, lambda params: params, print)
        found = checkpointer.fingerprints(leaves_by_path(state))
    changed = {path for path in found if found[path] != saved[path]}
    assert changed == {"step", "opt_state/rate/count"}
    assert int(state.step) == int(state.opt_state["rate"].count) == 0
    assert int(state.opt_state["adamw"].count) == STEPS


@pytest.mark.slow
def test_a_hugging_face_folder_gives_the_same_parameters_as_its_run(
    base: Config, other: Config, tmp_path: Path, command_line: Run
) -> None:
    plain = replace(
        base,
        run=str(tmp_path / "plain"),
        model=replace(base.model, vocab_multiple=8),  # no rows that the export leaves out
        train=replace(base.train, ema_decay=0.0),
    )
    train(plain)
    folder = tmp_path / "exported"
    assert command_line("convert", "--no-compare", plain.run, f"hf:{folder}")[0] == 0
    facts = []
    for number, name in enumerate((plain.run, f"hf:{folder}")):
        words = "--start", name, "--run", str(tmp_path / f"run{number}")
        words += "--data.store", str(tmp_path / f"store{number}")
        cfg = started(other, *words, folder=tmp_path)
        train(cfg)
        facts.append(run_dir.start_of(cfg.run))
    assert facts[0]["parameters_sha256"] == facts[1]["parameters_sha256"]
    assert facts[1]["base"] == f"hf:{folder}"


@pytest.mark.slow
def test_layers_come_in_the_order_of_a_pipeline_with_rounds(
    base: Config, other: Config, tmp_path: Path
) -> None:
    deep = replace(base, run=str(tmp_path / "deep"), model=replace(base.model, layers=4))
    train(deep)
    seen = []
    for name, axes, rounds in (("flat", MeshConfig(fsdp=8), 1), ("piped", MeshConfig(stage=2), 2)):
        for optimizer in ((), ("--start.optimizer",)):
            words = "--start", deep.run, "--run", str(tmp_path / f"{name}{len(optimizer)}")
            cfg = started(other, *words, *optimizer, folder=tmp_path)
            train(replace(cfg, mesh=axes, compute=replace(cfg.compute, rounds=rounds)))
            seen.append([losses(cfg)[step] for step in (1, 2, STEPS)])
    np.testing.assert_allclose(seen[0], seen[2], rtol=1e-4)
    np.testing.assert_allclose(seen[1], seen[3], rtol=1e-4)
    assert abs(seen[0][2] - seen[1][2]) > 1e-3


# --- vocabularies --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of a tokenizer, of one with further pieces, and of one with other pieces."""
    root = tmp_path_factory.mktemp("tokenizers")
    settings = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=277)
    made = {name: root / name for name in ("known", "more", "another")}
    for folder in made.values():
        folder.mkdir()
    known = train_huggingface(["some text to merge pieces of, and more text"] * 9, settings)
    known.save(made["known"])
    train_huggingface(["völlig andere Wörter, anders verschmolzen"] * 9, settings).save(
        made["another"]
    )
    files = known.files()
    parsed = json.loads(files["tokenizer.json"])
    first = known.vocab_size
    parsed["added_tokens"] += [
        {
            **{"id": first + number, "content": content, "special": False, "normalized": False},
            **{"single_word": False, "lstrip": False, "rstrip": False},
        }
        for number, content in enumerate(("<thought>", "</thought>"))
    ]
    HuggingFaceTokenizer(files | {"tokenizer.json": json.dumps(parsed).encode()}).save(made["more"])
    return made


@contextmanager
def on(cfg: Config) -> Iterator[None]:
    with mesh.entered_mesh(cfg):
        yield


def imported(folder: Path, cfg: Config, tokenizer: Any) -> str:
    """A run as an import leaves it: nothing is trained."""
    folder.mkdir()
    with on(cfg):
        params = decoder.init(cfg.model, jax.random.key(1))
        run_dir.record_imported(replace(cfg, run=str(folder)), tokenizer, {"folder": "nowhere"})
        with Checkpointer(folder / run_dir.CHECKPOINTS, CheckpointConfig()) as saver:
            saver.save(0, {"step": jnp.int32(0), "params": params})
            saver.finish()
    return str(folder)


@pytest.mark.parametrize(
    ("tied", "axes"), [(False, MeshConfig(fsdp=2, tensor=2, data=2)), (True, MeshConfig(fsdp=8))]
)
def test_added_pieces_get_the_mean_of_the_others_and_these_keep_their_bits(
    base: Config, other: Config, folders, tmp_path: Path, tied, axes
) -> None:
    known = tokenizers.load(folders["known"])
    model = replace(base.model, vocab_size=known.vocab_size, vocab_multiple=8, tied_embeddings=tied)
    cfg = replace(base, model=model, mesh=axes, train=replace(base.train, ema_decay=0.0))
    name = imported(tmp_path / "imported", cfg, known)
    words = "--start", name, "--tokenizer.path", str(folders["more"])
    grown = replace(started(other, *words, folder=tmp_path), mesh=axes)
    assert grown.model == replace(model, vocab_size=known.vocab_size + 2)
    told: list[str] = []
    start = WarmStart.find(grown, told.append)
    assert start is not None
    assert (start.pieces, start.added) == (known.vocab_size + 2, 2)
    assert any("2 pieces are new" in line for line in told)
    with on(grown):
        before, _ = run_dir.restore_params(name, cfg)
        tables = {n: np.asarray(before[n]) for n in ("embed", "head") if n in before}
        assert set(tables) == ({"embed"} if tied else {"embed", "head"})
        after = jax.jit(start._with_rows)(before)
        for path, old in tables.items():
            new = np.asarray(after[path])
            assert new.shape == (grown.model.table, model.embed)
            np.testing.assert_array_equal(new[: known.vocab_size], old[: known.vocab_size])
            rows = new[known.vocab_size : known.vocab_size + 2]
            np.testing.assert_allclose(rows[0], old[: known.vocab_size].mean(0), atol=1e-6)
            np.testing.assert_array_equal(rows[0], rows[1])
            assert after[path].sharding.spec == before[path].sharding.spec


@pytest.mark.parametrize("multiple", [8, 16])
def test_rows_beyond_the_bases_vocabulary_are_the_mean_too(
    base: Config, other: Config, folders, tmp_path: Path, multiple: int
) -> None:
    known = tokenizers.load(folders["known"])
    model = replace(base.model, vocab_size=known.vocab_size + 2, vocab_multiple=8)
    cfg = replace(base, model=model, train=replace(base.train, ema_decay=0.0))
    name = imported(tmp_path / "imported", cfg, known)
    words = "--start", name, "--model.vocab-size", "300", "--model.vocab-multiple", str(multiple)
    grown = started(other, *words, folder=tmp_path)
    start = WarmStart.find(grown, lambda line: None)
    assert start is not None
    with on(grown):
        before, _ = run_dir.restore_params(name, cfg)
        old = np.asarray(before["embed"])
        new = np.asarray(jax.jit(start._with_rows)(before)["embed"])
    size = model.vocab_size  # with rows of the base that no piece has, and that are its own
    np.testing.assert_array_equal(new[:size], old[:size])
    np.testing.assert_allclose(
        new[size:300], np.tile(old[:size].mean(0), (300 - size, 1)), atol=1e-6
    )


def test_another_tokenizer_is_refused_before_any_text_is_prepared(
    base: Config, other: Config, folders, tmp_path: Path
) -> None:
    known = tokenizers.load(folders["known"])
    cfg = replace(base, model=replace(base.model, vocab_size=known.vocab_size))
    name = imported(tmp_path / "imported", cfg, known)
    words = "--start", name, "--tokenizer.path", str(folders["another"])
    with pytest.raises(MismatchError, match="another tokenizer than that of"):
        train(started(other, *words, folder=tmp_path))
    assert not Path(other.data.store).exists()


# --- what is refused -----------------------------------------------------------------------------


REFUSED = {
    "another shape": (["--model.layers", "3"], "model.layers: 2 in the base, 3 here"),
    "learned positions": (["--model.context", "128"], "model.context: 64 in the base, 128 here"),
    "fewer pieces": (["--model.vocab-size", "260"], "model.vocab_size=260: the base has 264"),
    "optimizer": (
        ["--start.optimizer", "--optim.name", "lion"],
        "has optim.name=adamw, and lion is given",
    ),
    "batch": (
        ["--start.optimizer", "--start.keep-step", "--train.batch-tokens", "1024"],
        "had 16 x 32 tokens in step 1, and this run would have 32 x 32; give the same",
    ),
    "length": (
        ["--start.optimizer", "--start.keep-step", "--train.seq-len", "16"],
        "had 16 x 32 tokens in step 1, and this run would have 32 x 16; give the same",
    ),
    "budget": (
        ["--start.optimizer", "--start.keep-step", "--train.tokens", "4096"],
        "has been trained on 4096 by its step 8",
    ),
    "step alone": (["--start.keep-step"], "start.keep_step=True: requires start.optimizer=True"),
    "vocabulary": (
        ["--start.optimizer", "--model.vocab-size", "265"],  # within the padding of the table
        "has another vocabulary, so its state has other shapes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_suit_the_base_is_refused_in_a_sentence(
    base: Config, tmp_path: Path, command_line: Run, name: str
) -> None:
    words, wanted = REFUSED[name]
    run = tmp_path / "run"
    code, _, err = command_line("train", base.run, "--start", base.run, "--run", run, *words)
    assert code == 2
    assert wanted in err
    assert not (run / run_dir.START).exists()


def test_an_empty_base_is_no_fresh_run(base: Config, command_line: Run) -> None:
    for words in (["--start="], ["--start", ""]):
        code, _, err = command_line("train", base.run, *words)
        assert code == 2
        assert "--start is empty; give RUN, RUN@STEP or hf:FOLDER" in err


def test_a_base_that_is_not_one_is_named(base: Config, tmp_path: Path, command_line: Run) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    tuned = replace(
        base, finetune=FinetuneConfig(task="answer", base=base.run, lora=LoraConfig(rank=2))
    )
    run_dir.record_tuned(replace(tuned, run=str(adapters)), ByteTokenizer(), {})
    empty = tmp_path / "empty"
    shutil.copytree(base.run, empty, ignore=lambda _, names: {"checkpoints"} & set(names))
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").touch()
    for name, wanted in {
        str(tmp_path / "none"): "no such folder",
        f"{base.run}@7": "no checkpoint of that step; available: 4, 8",
        str(adapters): "has adapters beside a base; merge them: gptjax convert",
        str(empty): "this run has no checkpoint yet",
        str(weights): f"give hf:{weights}",
    }.items():
        code, _, err = command_line("train", base.run, "--start", name, "--run", tmp_path / "run")
        assert code in (2, 74), err
        assert wanted in err


def test_a_base_that_has_changed_since_the_run_was_begun_is_refused(
    base: Config, other: Config, tmp_path: Path
) -> None:
    cfg = started(other, "--start", base.run, folder=tmp_path)
    Path(cfg.run).mkdir()
    run_dir.record_start(cfg.run, {"base": f"{base.run}@8", "parameters_sha256": "another"})
    with pytest.raises(MismatchError, match="parameters were others than those of"):
        train(cfg)


def test_a_base_that_has_gone_on_is_read_where_the_run_was_begun(
    base: Config, other: Config, tmp_path: Path
) -> None:
    cfg = started(other, "--start", base.run, folder=tmp_path)
    Path(cfg.run).mkdir()
    run_dir.record_start(cfg.run, {"base": f"{base.run}@{HALF}", "parameters_sha256": "known"})
    start = WarmStart.find(cfg, print)
    assert start is not None
    assert start.base.step == HALF


def test_steps_that_go_on_need_a_mixture_that_does(base: Config, tmp_path: Path) -> None:
    given = config.StartConfig(base.run, optimizer=True, keep_step=True)
    longer = replace(base.train, tokens=2 * STEPS * 512)
    cfg = replace(base, run=str(tmp_path / "run"), start=given, train=longer)
    start = WarmStart.find(cfg, print)
    assert start is not None
    start.check_steps(cfg)
    with pytest.raises(DataError, match=f"text for {STEPS} steps, and {base.run} has done {STEPS}"):
        start.check_steps(replace(cfg, train=base.train))


def test_a_run_that_was_started_from_a_model_can_be_fine_tuned(base: Config) -> None:
    found = find_base(base.run)
    started_run = replace(found, cfg=replace(base, start=config.StartConfig("somewhere")))
    assert defaults.begun(started_run, "answer", "a", "b").start == config.StartConfig()


def test_a_resumed_run_without_its_record_is_refused(base: Config, other, tmp_path: Path) -> None:
    cfg = started(other, "--start", base.run, folder=tmp_path)
    shutil.copytree(base.run, cfg.run)
    with pytest.raises(DataError, match=r"its start.json is missing"):
        WarmStart.find(cfg, print)


def test_an_imported_run_is_no_place_to_train_but_one_to_start_from(
    base: Config, tmp_path: Path, command_line: Run
) -> None:
    name = imported(tmp_path / "imported", base, ByteTokenizer())
    code, _, err = command_line("train", base.run, "--run", name)
    assert code == 78
    assert f"give --start {name} and another --run" in err
    assert find_base(name).path == name


# --- the configuration ---------------------------------------------------------------------------


def test_the_configuration_shows_what_comes_from_the_base(
    base: Config, other: Config, tmp_path: Path, command_line: Run
) -> None:
    started(other, folder=tmp_path)
    preset = tmp_path / "preset.py"
    words = ["--start", base.run, "--model.dropout", "0.1"]
    code, out, _ = command_line("config", preset, *words)
    assert code == 0
    origins = {line.split()[0]: line.split()[-1] for line in out.splitlines()}
    assert origins["model.embed"] == origins["tokenizer.path"] == base.run
    assert origins["model.dropout"] == origins["start.base"] == "line"
    code, out, _ = command_line("config", preset, *words, "--json")
    whole = tmp_path / "whole.json"
    whole.write_text(out)
    resolved = config.load(str(whole))
    assert with_base(resolved, str(whole), []) == resolved
    assert resolved.model == replace(base.model, dropout=0.1)
