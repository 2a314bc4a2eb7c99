"""Checkpoints: layouts, fingerprints, damage, failed saves, retention."""

import importlib
import importlib.metadata
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.checkpoint import orbax_store
from gptjax.checkpoint.checkpointer import Checkpointer, fingerprints, leaves_by_path
from gptjax.config import CheckpointConfig, MeshConfig
from gptjax.errors import CheckpointError, MismatchError, OutputError
from gptjax.parallel.mesh import make_mesh
from gptjax.runtime.preemption import Interrupted, PreemptionHandler

pytestmark = pytest.mark.usefixtures("quick_compile")

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


def enter(shape=(2, 2, 2)):
    sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    count = int(np.prod(shape))
    return jax.set_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[:count]))


def state(seed: int = 0, rows: int = 64):
    """Made on the ambient mesh: sharded matrices, a half-width vector, integers, a scalar."""
    rng = np.random.default_rng(seed)
    mesh = jax.sharding.get_mesh()
    put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))
    return {
        "params": {
            "w": put(rng.normal(size=(rows, 256)).astype("f4"), "fsdp", "tensor"),
            "b": put(jnp.asarray(rng.normal(size=64), jnp.bfloat16), "fsdp"),
        },
        "opt_state": (put(rng.integers(0, 99, (8, 8)).astype("i4"), None, "tensor"),),
        "step": put(np.int32(seed)),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(folder: Path, steps, keep=10, keep_every=0) -> Checkpointer:
    checkpoints = Checkpointer(folder, CheckpointConfig(keep=keep, keep_every=keep_every))
    for step in steps:
        checkpoints.save(step, state(step))
        checkpoints.finish()
    return checkpoints


@pytest.mark.parametrize("shape", MESHES)
def test_fingerprints_do_not_depend_on_the_layout(shape) -> None:
    with enter((1, 1, 1)):
        one = fingerprints(leaves_by_path(state()))
    with enter(shape):
        many = state()
        assert many["params"]["w"].sharding.num_devices == 8
        assert fingerprints(leaves_by_path(many)) == one


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_any_flipped_bit_changes_the_fingerprint(dtype) -> None:
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.integers(-9, 9, (5, 7)), dtype))
    raw = x.tobytes()
    with enter((1, 1, 1)):
        before = fingerprints({"x": jnp.asarray(x)})
        for bit in rng.choice(len(raw) * 8, 64, replace=False):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            y = np.frombuffer(bytes(flipped), x.dtype).reshape(x.shape)
            assert fingerprints({"x": jnp.asarray(y)}) != before


def test_swapped_elements_change_the_fingerprint() -> None:
    with enter((1, 1, 1)):
        assert fingerprints({"x": jnp.float32([1, 2])}) != fingerprints({"x": jnp.float32([2, 1])})


@pytest.mark.parametrize("shape", MESHES)
def test_restores_bit_equal_on_another_mesh(tmp_path, shape) -> None:
    with enter((2, 2, 2)):
        saved(tmp_path, [3])
        before = fingerprints(leaves_by_path(state(3)))
    with enter(shape):
        wanted = abstract(state(3))
        restored = Checkpointer(tmp_path).restore_newest(wanted)
        assert fingerprints(leaves_by_path(restored)) == before
        assert restored["params"]["w"].sharding == wanted["params"]["w"].sharding
        assert isinstance(restored["opt_state"], tuple)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1)])
def test_an_array_larger_than_the_memory_for_saving_is_saved(tmp_path, monkeypatch, shape) -> None:
    """Of 128 MiB and more, as the table of GPT-2 124M on one device."""
    monkeypatch.setattr(orbax_store, "_SURGE_BYTES", 1024)
    with enter(shape):
        restored = saved(tmp_path, [3]).restore(3, abstract(state(3)))
        assert fingerprints(leaves_by_path(restored)) == fingerprints(leaves_by_path(state(3)))


def test_layers_saved_in_another_order_are_restored_in_the_requested_one(tmp_path) -> None:
    """A pipeline's checkpoint holds the layers in its own order, and records it."""
    layers = lambda numbers: {
        "params": {
            "blocks": {"w": jnp.array(list(numbers), jnp.float32)[:, None] + jnp.arange(3) / 8},
            "rest": 1.0,
        }
    }
    with enter((1, 1, 1)):
        natural = jax.tree.map(jnp.asarray, layers([0, 1, 2, 3, 4, 5]))
        staged = jax.tree.map(jnp.asarray, layers([0, 2, 4, 1, 3, 5]))
        # Not its own inverse, as that of few layers is.
        orders = {
            "staged": [0, 2, 4, 1, 3, 5],
            "natural": None,
            "other": [1, 2, 3, 4, 5, 0],
        }
        with Checkpointer(tmp_path, CheckpointConfig(), order=orders["staged"]) as checkpoints:
            checkpoints.save(1, staged)
            checkpoints.finish()
        for name, order in orders.items():
            restored = Checkpointer(tmp_path, order=order).restore_newest(abstract(natural))
            want = layers(range(6) if order is None else order)["params"]["blocks"]["w"]
            assert np.array_equal(restored["params"]["blocks"]["w"], want), name


def test_damage_that_says_nothing_is_damage(tmp_path, monkeypatch) -> None:
    """An error with an empty text; a run must not begin anew for it."""
    told: list[str] = []
    restore = Checkpointer._restore

    def failing(self, step, *rest):
        if step == 3:
            raise EOFError
        return restore(self, step, *rest)

    monkeypatch.setattr(Checkpointer, "_restore", failing)
    with enter():
        saved(tmp_path, [1, 3])
        restored = Checkpointer(tmp_path, say=told.append).restore_newest(abstract(state(1)))
    assert restored is not None
    assert told == ["checkpoint 3 failed verification (EOFError())"]


def test_orbax_still_has_the_limits_that_are_lifted() -> None:
    for module in orbax_store._BARRIERS:
        assert hasattr(importlib.import_module(module), "_DEFAULT_BARRIER_TIMEOUT"), module


def test_restores_a_part_alone(tmp_path) -> None:
    with enter():
        saved(tmp_path, [3])
        wanted = {"params": abstract(state(3)["params"])}
        restored = Checkpointer(tmp_path).restore_newest(wanted, partial=True)
        np.testing.assert_array_equal(restored["params"]["w"], state(3)["params"]["w"])
        assert set(restored) == {"params"}


def test_other_shapes_are_listed(tmp_path) -> None:
    with enter():
        saved(tmp_path, [3])
        wanted = abstract(state(3, rows=32))
        wanted["params"]["extra"] = wanted["params"]["b"]
        with pytest.raises(MismatchError) as caught:
            Checkpointer(tmp_path).restore_newest(wanted)
    assert caught.value.differences == [
        "params/extra: absent in the checkpoint, bfloat16[64] in the model",
        "params/w: float32[64, 256] in the checkpoint, float32[32, 256] in the model",
    ]


def test_no_checkpoint_is_none(tmp_path) -> None:
    with enter():
        assert Checkpointer(tmp_path / "none").restore_newest(abstract(state())) is None


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("seen", [True, False])
def test_a_signal_while_a_checkpoint_is_read_is_no_damage(tmp_path, monkeypatch, seen) -> None:
    """Neither where the exception arrives, nor where a library makes an error of its own of it."""
    restore = Checkpointer._restore

    def told_to_stop(self, *args):
        monkeypatch.setattr(Checkpointer, "_restore", restore)
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            if seen:
                raise
            raise ValueError("of a library") from None

    monkeypatch.setattr(Checkpointer, "_restore", told_to_stop)
    with enter(), PreemptionHandler() as handler:
        saved(tmp_path, [10, 20])
        checkpoints = Checkpointer(tmp_path, CheckpointConfig())
        try:
            with handler.at_once():
                assert int(checkpoints.restore_newest(abstract(state(20)))["step"]) == 20
        except Interrupted:
            assert seen
        assert handler.signal is signal.SIGTERM
        assert checkpoints.steps() == [10, 20]


def flip_bit(folder: Path) -> None:
    file = largest(folder / "state")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


DAMAGE = {
    "flipped bit": flip_bit,
    "truncated data": lambda f: largest(f / "state").write_bytes(
        largest(f / "state").read_bytes()[:1000]
    ),
    "deleted data": lambda f: largest(f / "state").unlink(),
    "deleted manifest": lambda f: (f / "state" / "manifest.ocdbt").unlink(),
    "empty metadata": lambda f: (f / "state" / "_METADATA").write_text(""),
    "empty meta": lambda f: (f / "meta" / "data.json").write_text(""),
    "no state": lambda f: shutil.rmtree(f / "state"),
    "no meta": lambda f: shutil.rmtree(f / "meta"),
}


OFTEN = ("flipped bit", "empty metadata", "no state")


@pytest.mark.parametrize(
    "damage", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in DAMAGE]
)
def test_damage_falls_back_to_the_step_before_and_says_so(tmp_path, damage) -> None:
    lines: list[str] = []
    with enter():
        saved(tmp_path, [10, 20])
        DAMAGE[damage](tmp_path / "20")
        checkpoints = Checkpointer(tmp_path, CheckpointConfig(), say=lines.append)
        restored = checkpoints.restore_newest(abstract(state(10)))
        assert fingerprints(leaves_by_path(restored)) == fingerprints(leaves_by_path(state(10)))
        assert "checkpoint 20 failed verification" in lines[0]
        assert (tmp_path / "20.corrupt-1").is_dir()
        checkpoints.save(20, state(20))
        checkpoints.finish()
        assert checkpoints.steps() == [10, 20]
        restored = checkpoints.restore_newest(abstract(state(20)))
        assert int(restored["step"]) == 20


def test_flipped_bit_is_named(tmp_path) -> None:
    lines: list[str] = []
    with enter():
        saved(tmp_path, [10, 20])
        flip_bit(tmp_path / "20")
        Checkpointer(tmp_path, say=lines.append).restore_newest(abstract(state(10)))
    assert "fingerprint" in lines[0] or "DATA_LOSS" in lines[0]
    assert (tmp_path / "20").is_dir()  # a reader that does not save sets nothing aside


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_told_or_changes_nothing(tmp_path) -> None:
    """In the arrays, our metadata, Orbax's: never another model, never other arrays."""
    told: list[str] = []
    with enter():
        saved(tmp_path / "made", [1, 2])
        files = sorted(path for path in (tmp_path / "made/2").rglob("*") if path.is_file())
        wanted = {step: leaves_by_path(jax.device_get(state(step))) for step in (1, 2)}
        draws = np.random.default_rng(3)
        own = [path for path in files if path.parent.name == "meta"]
        assert own
        for file in [*files, *files, *own * 12]:
            name = file.relative_to(tmp_path / "made")
            folder = tmp_path / "flipped"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "made", folder)
            raw = bytearray((folder / name).read_bytes())
            if not raw:
                continue
            bit = int(draws.integers(8 * len(raw)))
            raw[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(raw)
            before = len(told)
            checkpoints = Checkpointer(folder, say=told.append)
            restored = leaves_by_path(jax.device_get(checkpoints.restore_newest(abstract(state()))))
            step = 1 if len(told) > before else 2
            for path, leaf in wanted[step].items():
                np.testing.assert_array_equal(restored[path], leaf, f"{name}, bit {bit}")
    assert any("its metadata differ from their checksum" in line for line in told)


def test_never_begins_anew_where_no_checkpoint_is_whole(tmp_path) -> None:
    with enter():
        saved(tmp_path, [10, 20])
        for step in (10, 20):
            shutil.rmtree(tmp_path / str(step) / "state")
        with pytest.raises(CheckpointError, match="none of the checkpoints 10, 20"):
            Checkpointer(tmp_path).restore_newest(abstract(state()))


@pytest.mark.parametrize("lost", ["folder", "contents", "metadata"])
def test_a_run_whose_checkpoints_are_gone_never_begins_anew(tmp_path, lost) -> None:
    folder = tmp_path / "checkpoints"
    with enter():
        checkpointer = saved(folder, [1, 2])
        checkpointer.finish()
        assert json.loads((tmp_path / "checkpoints.json").read_text()) == {"saved": 2}
        if lost == "metadata":
            for file in folder.glob("*/_CHECKPOINT_METADATA"):
                file.unlink()
        else:
            shutil.rmtree(folder)
        if lost == "contents":
            folder.mkdir()
        with pytest.raises(CheckpointError, match=r"checkpoints.json says that one was saved"):
            Checkpointer(folder).restore_newest(abstract(state()))


def test_an_empty_or_strange_folder_is_no_checkpoint(tmp_path) -> None:
    with enter():
        saved(tmp_path, [10])
        (tmp_path / "30").mkdir()
        (tmp_path / "10.corrupt-1").mkdir()
        assert Checkpointer(tmp_path).steps() == [10]


def test_what_an_interrupted_save_left_is_cleared_away(tmp_path) -> None:
    lines: list[str] = []
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    Checkpointer(tmp_path, CheckpointConfig(), say=lines.append)
    assert not list(tmp_path.iterdir())
    assert lines == ["discarded unfinished checkpoint 7"]


def test_what_a_kill_in_retention_left_is_cleared_away(tmp_path, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with enter():
        saved(tmp_path, [1, 2], keep=2)
        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(OutputError):
            saved(tmp_path, [3], keep=2)
        monkeypatch.undo()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1.removed", "2", "3"]
        told: list[str] = []
        checkpoints = Checkpointer(tmp_path, CheckpointConfig(), say=told.append)
        assert checkpoints.steps() == [2, 3]
        assert not list(tmp_path.glob("*.removed"))
    assert told == ["removed the rest of 1"]


def test_a_checkpoint_is_on_disk_before_it_is_called_saved(tmp_path, monkeypatch) -> None:
    folder, synced = tmp_path / "checkpoints", []
    fsync, replace = os.fsync, Path.replace

    def recorded(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replaced(self, target):
        synced.append(f"-> {target}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "replace", replaced)
    with enter():
        saved(folder, [1])
    before = synced[: synced.index(f"-> {tmp_path / 'checkpoints.json'}")]
    tree = list((folder / "1").rglob("*"))
    assert len(tree) > 10
    assert {str(path) for path in [*tree, folder / "1", folder]} <= set(before)
    assert str(tmp_path / ".checkpoints.json.partial") in before


def test_other_versions_are_told(tmp_path, monkeypatch) -> None:
    told: list[str] = []
    with enter():
        saved(tmp_path, [1])
        monkeypatch.setattr(jax, "__version__", "0.99")
        checkpoints = Checkpointer(tmp_path, CheckpointConfig(), say=told.append)
        checkpoints.restore_newest(abstract(state()))
    own = importlib.metadata.version("jax")
    assert told == [f"checkpoint 1 was written with jax {own}, now 0.99"]


def test_retention_keeps_the_newest_and_every_so_many(tmp_path) -> None:
    with enter():
        assert saved(tmp_path, range(1, 9), keep=2, keep_every=3).steps() == [3, 6, 7, 8]


def test_meta_says_what_is_in_it(tmp_path) -> None:
    with enter():
        checkpoints = Checkpointer(tmp_path, CheckpointConfig(), lambda step: {"own": step + 1})
        checkpoints.save(4, state(4))
        checkpoints.finish()
        meta = checkpoints.meta(4)
    assert (meta["step"], meta["own"]) == (4, 5)
    assert meta["tree"]["params/w"] == [[64, 256], "float32"]
    assert meta["versions"]["jax"] == jax.__version__
    assert set(meta["fingerprints"]) == set(meta["tree"])
    json.dumps(meta)


@pytest.fixture
def full_disk():
    """Files of this process may not grow past a size that lets no checkpoint through."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        soft = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


def test_a_failed_save_is_told_and_the_next_one_works(tmp_path, full_disk) -> None:
    with enter():
        checkpoints = saved(tmp_path, [1])
        full_disk(8192)
        checkpoints.save(2, state(2))
        with checkpoints:
            pass  # waits for the thread, raises nothing
        full_disk(None)
        (problem,) = checkpoints.failures()
        assert problem.startswith("checkpoint 2 was not written: ")
        assert checkpoints.failures() == []
        assert checkpoints.steps() == [1]
        assert not list(tmp_path.glob("*tmp*"))
        checkpoints.save(3, state(3))
        checkpoints.finish()
        assert checkpoints.steps() == [1, 3]


def test_three_failed_saves_in_a_row_end_the_run(tmp_path, full_disk) -> None:
    with enter():
        checkpoints = saved(tmp_path, [1])
        full_disk(8192)
        checkpoints.save(2, state(2))
        checkpoints.save(3, state(3))
        checkpoints.save(4, state(4))
        with pytest.raises(OutputError, match="3 checkpoints in a row"):
            checkpoints.finish()
        full_disk(None)
        assert checkpoints.steps() == [1]


def test_paths_are_those_of_the_tree() -> None:
    tree = {"a": {"b": 1}, "c": (2, [3])}
    assert leaves_by_path(tree) == {"a/b": 1, "c/0": 2, "c/1/0": 3}
