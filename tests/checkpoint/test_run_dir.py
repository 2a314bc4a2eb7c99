"""The run folder: one process at a time, one run, one tokenizer, one store."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import load_model
from gptjax.checkpoint import checkpointer, run_dir
from gptjax.config import Config, TokenizerConfig
from gptjax.data import store
from gptjax.data.mixture import Manifests
from gptjax.data.store import Manifest, Split
from gptjax.errors import CheckpointError, ConfigError, DataError, MismatchError, OutputError
from gptjax.model import decoder
from gptjax.parallel import mesh, sharding
from gptjax.tokenizer import ByteTokenizer, train_sentencepiece


@pytest.fixture
def cfg(tiny_config, tmp_path: Path) -> Config:
    made = tiny_config(
        model={"vocab_size": 264},
        tokenizer={"kind": "bytes"},
        eval={"sample_tokens": 8},
        log={"compile_cache": ""},
    )
    made.check(devices=8)
    return dataclasses.replace(made, run=str(tmp_path / "run"))


def changed(cfg: Config, section: str, **fields) -> Config:
    return dataclasses.replace(
        cfg, **{section: dataclasses.replace(getattr(cfg, section), **fields)}
    )


def manifests_of(*args, **fields) -> Manifests:
    return Manifests({"": manifest_of(*args, **fields)})


def manifest_of(tokenizer=None, files: tuple[str, ...] = ("00" * 32,)) -> Manifest:
    tokenizer = tokenizer or ByteTokenizer()
    return Manifest(
        tokenizer={
            "kind": tokenizer.kind,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        data={"sources": ["a.txt"]},
        counts={},
        dtype="<u2",
        splits={"train": Split(1, 100, 98, files), "valid": Split(1, 10, 8, files)},
    )


@pytest.fixture(scope="module")
def other_tokenizer():
    return train_sentencepiece(["some words to learn\n" * 50], TokenizerConfig(vocab_size=290))


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def recorded(cfg: Config) -> Config:
    """A run folder as training leaves it before its first step."""
    with run_dir.claim(cfg):
        run_dir.record(cfg, ByteTokenizer(), manifests_of())
    return cfg


# --- who may write ---------------------------------------------------------------------------


def test_a_claim_makes_the_folder_and_says_who_holds_it(cfg: Config) -> None:
    folder = Path(cfg.run)
    with run_dir.claim(cfg) as changes:
        assert changes == []
        assert f"process {os.getpid()} on " in (folder / "run.lock").read_text()
        with pytest.raises(OutputError) as caught, run_dir.claim(cfg):
            pass
        assert f"run={cfg.run}: in use by process {os.getpid()} on " in str(caught.value)
        assert f"process {os.getpid()} on " in (folder / "run.lock").read_text()
    assert contents(cfg.run) == {"run.lock": b""}
    with run_dir.claim(cfg):
        pass


def test_a_claim_ends_with_an_error_in_it(cfg: Config) -> None:
    def fail() -> None:
        with run_dir.claim(cfg):
            raise ZeroDivisionError

    for _ in range(2):  # the second time it is not in use
        with pytest.raises(ZeroDivisionError):
            fail()


def test_what_a_killed_process_wrote_into_the_lock_does_not_hold_it(cfg: Config) -> None:
    file = Path(cfg.run, "run.lock")
    file.parent.mkdir()
    file.write_text("process 42 on another machine with a very long name\n")
    with run_dir.claim(cfg):
        (line,) = file.read_text().splitlines()
        assert line.startswith(f"process {os.getpid()} on ")


def test_a_claim_tells_what_has_changed_since_the_run_was_begun(cfg: Config) -> None:
    recorded(cfg)
    with run_dir.claim(changed(changed(cfg, "optim", lr=0.5), "log", every=7)) as changes:
        assert changes == ["optim.lr: 0.0006 -> 0.5 (schedule)", "log.every: 10 -> 7 (free)"]
    with run_dir.claim(cfg) as changes:
        assert changes == []


def test_another_run_is_not_claimed_and_the_folder_stays_free(cfg: Config) -> None:
    recorded(cfg)
    before = contents(cfg.run)
    other = changed(cfg, "train", seed=1)
    with pytest.raises(MismatchError) as caught, run_dir.claim(other):
        pass
    assert caught.value.differences == ["train.seed: 0 in the run, 1 given"]
    assert {**contents(cfg.run), "run.lock": b""} == {**before, "run.lock": b""}
    with run_dir.claim(cfg):
        pass


def test_checkpoints_without_a_configuration_are_no_run_to_go_on_with(cfg: Config) -> None:
    recorded(cfg)
    save(cfg, 3)
    with run_dir.claim(cfg):
        pass
    Path(cfg.run, "config.json").unlink()
    with pytest.raises(MismatchError, match=f"{cfg.run} has checkpoints but no config.json"):
        run_dir.claim(cfg).__enter__()


# --- what a run is ---------------------------------------------------------------------------


def test_what_is_recorded_is_what_is_opened(cfg: Config) -> None:
    recorded(cfg)
    opened, tokenizer, manifest = run_dir.open_run(cfg.run)
    assert opened == cfg
    assert tokenizer.fingerprint == ByteTokenizer().fingerprint
    assert manifest == manifests_of()
    assert set(contents(cfg.run)) == {"run.lock", "config.json", "data.json", "tokenizer.bytes"}


def test_a_run_goes_on_with_changed_schedules_and_records_them(cfg: Config) -> None:
    recorded(cfg)
    other = changed(cfg, "optim", lr=0.5)
    moved = dataclasses.replace(manifest_of(), data={"sources": ["elsewhere.txt"]}, counts={"a": 1})
    run_dir.record(
        other, ByteTokenizer(), Manifests({"": moved})
    )  # the same tokens, from another place
    opened, _, manifest = run_dir.open_run(cfg.run)
    assert opened == other
    assert manifest == Manifests({"": moved})


def test_a_store_of_other_tokens_is_refused_and_nothing_is_written(cfg: Config) -> None:
    recorded(cfg)
    before = contents(cfg.run)
    with pytest.raises(MismatchError, match=f"data.store={cfg.data.store}: .*{cfg.run}"):
        run_dir.record(cfg, ByteTokenizer(), manifests_of(files=("11" * 32,)))
    assert contents(cfg.run) == before


def test_a_store_of_another_tokenizer_is_refused(cfg: Config, other_tokenizer) -> None:
    recorded(cfg)
    before = contents(cfg.run)
    prints = [t.fingerprint[:12] for t in (ByteTokenizer(), other_tokenizer)]
    with pytest.raises(MismatchError) as caught:
        run_dir.record(cfg, other_tokenizer, manifests_of(other_tokenizer))
    for part in (cfg.run, cfg.data.store, *prints):
        assert part in str(caught.value)
    assert contents(cfg.run) == before


def test_a_store_whose_tokenizer_was_exchanged_is_refused(cfg: Config, other_tokenizer) -> None:
    Path(cfg.run).mkdir()
    with pytest.raises(MismatchError, match=r"tokenizer of the manifest .* that of the store"):
        run_dir.record(cfg, other_tokenizer, manifests_of())
    assert contents(cfg.run) == {}


def test_a_run_whose_tokenizer_was_exchanged_is_not_opened(cfg: Config, other_tokenizer) -> None:
    recorded(cfg)
    other_tokenizer.save(Path(cfg.run))
    with pytest.raises(MismatchError, match=f"tokenizer of {cfg.run}/data.json"):
        run_dir.open_run(cfg.run)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    def shorten(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: len(raw) // 2])

    return shorten


@pytest.mark.parametrize(
    ("damage", "error", "wanted"),
    [
        (remove("config.json"), ConfigError, "{}: not a run folder, it has no config.json"),
        (remove("data.json"), DataError, "{}: this run has no data.json"),
        (remove("tokenizer.bytes"), DataError, "{}: no tokenizer found"),
        (cut("config.json"), ConfigError, "{}/config.json: not valid JSON"),
        (cut("data.json"), DataError, "data.json is damaged"),
    ],
    ids=["no config", "no data", "no tokenizer", "cut config", "cut data"],
)
def test_a_run_that_lacks_something_is_told(cfg: Config, damage, error, wanted) -> None:
    recorded(cfg)
    damage(Path(cfg.run))
    with pytest.raises(error, match=wanted.format(cfg.run)):
        run_dir.open_run(cfg.run)


def test_a_damaged_manifest_of_a_run_is_not_written_over(cfg: Config) -> None:
    recorded(cfg)
    file = Path(cfg.run, "data.json")
    file.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        run_dir.record(cfg, ByteTokenizer(), manifests_of())
    assert file.read_text() == "{"


def test_a_run_that_was_moved_is_opened_where_it_is(cfg: Config, tmp_path: Path) -> None:
    recorded(cfg)
    Path(cfg.run).rename(tmp_path / "moved")
    opened, _, _ = run_dir.open_run(str(tmp_path / "moved"))
    assert opened == dataclasses.replace(cfg, run=str(tmp_path / "moved"))


def test_a_run_of_another_machine_is_used_with_attention_and_mesh_of_this_one(cfg: Config) -> None:
    there = changed(changed(cfg, "mesh", data=2, fsdp=2, tensor=2), "compute", attention="splash")
    recorded(there)
    here = load_model.find_model(cfg.run).config_here()
    assert here == changed(there, "compute", attention="auto")  # a mesh of eight devices suits
    elsewhere = dataclasses.replace(
        changed(changed(cfg, "mesh", data=3), "eval", batch=21), run=f"{cfg.run}-3"
    )
    recorded(elsewhere)
    here = load_model.find_model(elsewhere.run).config_here()
    assert here == changed(changed(elsewhere, "mesh", data=-1), "eval", batch=24)


def test_the_store_of_a_run_is_there_and_is_its_own(cfg: Config, tmp_path: Path) -> None:
    cfg = changed(cfg, "data", store=str(tmp_path / "store"))
    with pytest.raises(DataError, match=f"{cfg.data.store}: not a token store"):
        run_dir.check_store(cfg, manifests_of())
    Path(cfg.data.store).mkdir()
    empty = dataclasses.replace(manifest_of(files=()), data={"sources": ["moved.txt"]})
    store.write_manifest(Path(cfg.data.store), empty)
    run_dir.check_store(cfg, manifests_of(files=()))  # the same tokens
    with pytest.raises(MismatchError, match=f"data.store={cfg.data.store}: .*{cfg.run}"):
        run_dir.check_store(cfg, manifests_of())


# --- parameters ------------------------------------------------------------------------------


def save(cfg: Config, step: int, **parts) -> None:
    with jax.set_mesh(mesh.make_mesh(cfg.mesh)):
        checkpoints = checkpointer.Checkpointer(Path(cfg.run) / run_dir.CHECKPOINTS, cfg.checkpoint)
        everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        checkpoints.save(step, {"step": jax.device_put(np.int32(step), everywhere), **parts})
        checkpoints.finish()


def params_of(cfg: Config, value: float) -> decoder.Params:
    with jax.set_mesh(mesh.make_mesh(cfg.mesh)):
        abstract = sharding.abstract(lambda: decoder.init(cfg.model, jax.random.key(0)))
        fill = lambda x: jax.device_put(np.full(x.shape, value, x.dtype), x.sharding)
        return jax.tree.map(fill, abstract)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.slow
def test_the_newest_parameters_are_restored_averaged_ones_if_so_trained(cfg: Config) -> None:
    for step, value in ((5, 1.0), (9, 2.0)):
        save(cfg, step, params=params_of(cfg, value), ema=params_of(cfg, -value))
    for decay, wanted in ((0.0, 2.0), (0.9, -2.0)):
        averaged = changed(cfg, "train", ema_decay=decay)
        with mesh.entered_mesh(averaged):
            params, step = run_dir.restore_params(cfg.run, averaged)
        assert step == 9
        assert {float(x) for leaf in jax.tree.leaves(params) for x in np.unique(leaf)} == {wanted}
        assert jax.tree.structure(params) == jax.tree.structure(params_of(cfg, 0.0))


def test_a_run_without_a_checkpoint_has_no_parameters(cfg: Config) -> None:
    with (
        mesh.entered_mesh(cfg),
        pytest.raises(CheckpointError, match=f"{cfg.run}: .*no checkpoint"),
    ):
        run_dir.restore_params(cfg.run, cfg)


def test_the_mesh_of_the_configuration_is_the_ambient_one_within(cfg: Config) -> None:
    cfg = changed(cfg, "mesh", fsdp=2, tensor=2)
    with mesh.entered_mesh(cfg):
        shape = jax.sharding.get_mesh().shape
        assert {axis: n for axis, n in shape.items() if n > 1} == dict.fromkeys(
            ("data", "fsdp", "tensor"), 2
        )
    assert jax.sharding.get_mesh().empty


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", "float32"), ("bfloat16", None)])
def test_float32_is_computed_in_float32_on_accelerators_too(cfg, dtype, wanted) -> None:
    before = jax.config.jax_default_matmul_precision
    try:
        with mesh.entered_mesh(changed(cfg, "compute", dtype=dtype)):
            assert jax.config.jax_default_matmul_precision == wanted
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_the_manifest_of_a_run_is_that_of_its_store(cfg: Config, tmp_path: Path) -> None:
    recorded(cfg)
    store.write_manifest(tmp_path, manifest_of())
    one, two = Path(cfg.run, "data.json"), tmp_path / store.MANIFEST
    assert json.loads(one.read_text()) == json.loads(two.read_text())
