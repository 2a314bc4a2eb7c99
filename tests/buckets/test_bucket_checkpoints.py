"""Checkpoints in a bucket: on any mesh, whole or not at all, whatever fails meanwhile."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from servers import EXPIRED, FULL, Bucket, Faults

from gptjax import bucket as buckets
from gptjax import config
from gptjax.checkpoint import head, run_dir, shard_store, shards
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.checkpoint.fingerprint import fingerprints
from gptjax.checkpoint.head import Head, Writer
from gptjax.config import CheckpointConfig, Config, MeshConfig
from gptjax.errors import CheckpointError, OutputError
from gptjax.parallel.mesh import make_mesh
from gptjax.param_tree import leaves_by_path

pytestmark = pytest.mark.usefixtures("quick_compile")

SLOW = pytest.mark.slow
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 1, 1)]
quiet = lambda line: None


def enter(shape: tuple[int, int, int] = (2, 2, 2)):
    sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    return jax.set_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(shape))]))


def state(seed: int = 0):
    """Made on the ambient mesh: a sharded matrix, half-width and whole numbers, a scalar."""
    rng = np.random.default_rng(seed)
    mesh = jax.sharding.get_mesh()
    put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))
    return {
        "params": {
            "w": put(rng.normal(size=(16, 32)).astype("f4"), "fsdp", "tensor"),
            "b": put(jnp.asarray(rng.normal(size=64), jnp.bfloat16), "fsdp"),
        },
        "mask": put(rng.integers(0, 2, 8).astype(bool)),
        "step": put(np.int32(seed)),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def of(place: str, keep: int = 2, say: Callable[[str], None] = quiet) -> Checkpointer:
    return Checkpointer(
        buckets.path_of(place) / "checkpoints", CheckpointConfig(keep=keep), say=say
    )


def saved(place: str, *steps: int, keep: int = 2) -> None:
    with Head(place).taken(quiet), of(place, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))
            checkpoints.finish()


def restored(place: str) -> int:
    """The step that a new process restores, with all its arrays as they were."""
    found = Checkpointer(buckets.path_of(place) / "checkpoints").restore_newest(abstract(state()))
    step = int(found["step"])
    assert fingerprints(leaves_by_path(found)) == fingerprints(leaves_by_path(state(step)))
    return step


def keys(place: str) -> list[str]:
    return [key.decode() for key in buckets.open_kvstore(place).list().result()]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries at once, and gives up soon."""
    monkeypatch.setattr(buckets, "_RETRIES", {"max_retries": 1, "initial_delay": "1ms"})
    monkeypatch.setattr(buckets, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(buckets, "_LONGEST_WAIT_S", 0.05)
    for module, name in ((shard_store, "_RETRY_S"), (head, "_PATIENCE_S"), (buckets, "_FILE_S")):
        monkeypatch.setattr(module, name, 0.3)


@contextmanager
def killed_later(place: str) -> Iterator[Head]:
    """The head of a job that ends without a word, on another machine."""
    own = Head(place)
    own._take(quiet, 0, replace(Writer.here(0.2), machine="far"))
    head.held[place] = own
    try:
        yield own
    finally:
        del head.held[place]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_is_restored_on_any_mesh(place: str, mesh) -> None:
    with enter((2, 4, 1)):
        saved(place, 3)
    with enter(mesh):
        assert restored(place) == 3


def test_large_shards_are_cut_into_chunks(place: str, monkeypatch) -> None:
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 64)
    with enter((1, 2, 1)):
        saved(place, 1)
        assert sum("params/w/c/" in key for key in keys(place)) == 16 * 32 * 4 // 64
        assert restored(place) == 1


def test_any_zarr_library_can_read_the_arrays(place: str) -> None:
    import tensorstore

    with enter((1, 2, 2)):
        saved(place, 2)
        (name,) = Head(place).read().checkpoints.values()
        kv = buckets.kvstore(f"{place}/checkpoints/{name}/state/params/w")
        found = tensorstore.open({"driver": "zarr3", "kvstore": kv}).result().read().result()
        np.testing.assert_array_equal(found, np.asarray(state(2)["params"]["w"]))


def test_old_checkpoints_are_removed_with_all_their_objects(place: str) -> None:
    with enter():
        saved(place, 1, 2, 3, 4)
        assert of_reader(place).steps() == [3, 4]
        folders = {key.split("/")[1].split("-")[0] for key in keys(place) if "/" in key}
        assert folders == {"3", "4"}


def of_reader(place: str) -> Checkpointer:
    return Checkpointer(buckets.path_of(place) / "checkpoints")


def test_a_damaged_chunk_is_found_and_the_one_before_restored(place: str) -> None:
    said: list[str] = []
    with enter():
        saved(place, 1, 2)
        name = Head(place).read().checkpoints[2]
        kv = buckets.open_kvstore(f"{place}/checkpoints/{name}")
        key = "state/params/w/c/1/0"
        contents = bytearray(kv.read(key).result().value)
        contents[5] ^= 1
        kv.write(key, bytes(contents)).result()
        with Head(place).taken(quiet), of(place, say=said.append) as checkpoints:
            found = checkpoints.restore_newest(abstract(state()))
        assert int(found["step"]) == 1
        assert [line for line in said if line.startswith("checkpoint 2 is set aside as 2-")]
        assert of_reader(place).steps() == [1]
        assert list(of_reader(place).store.left()) == [
            f"{name}: set aside as damaged; remove it if you like"
        ]


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(place: str) -> None:
    with enter():
        saved(place, 1)
        with Head(place).taken(quiet), of(place) as checkpoints:
            checkpoints.store.remove(1)
            with pytest.raises(CheckpointError, match="has no checkpoint, though step 1 was saved"):
                checkpoints.restore_newest(abstract(state()))


def test_a_copy_of_the_run_on_this_machine_is_read_as_it_is(place: str, tmp_path: Path) -> None:
    store = buckets.open_kvstore(place)
    with enter():
        saved(place, 5)
        for key in keys(place):
            file = tmp_path / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(store.read(key).result().value)
        assert restored(str(tmp_path)) == 5
        cfg = Config(run=str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict(cfg)))
        with run_dir.claim(cfg), of(str(tmp_path)) as checkpoints:
            checkpoints.save(6, state(6))
            checkpoints.finish()
        assert restored(str(tmp_path)) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_a_job_that_ends_at_any_request_leaves_whole_checkpoints(
    bucket: Bucket, place: str
) -> None:
    """From the bucket's side a job that is killed is one whose requests end."""
    newest = []
    with enter((1, 2, 1)):
        for number in range(1, 200):
            run = f"{place}/{number}"
            with killed_later(run), of(run) as checkpoints:
                checkpoints.save(1, state(1))
                checkpoints.finish()
                faults = bucket.proxy.faults = Faults(kinds=("reset",), burst=1 << 30)
                faults.hook = lambda n, faults=faults, last=number: vars(faults).update(
                    share=1.0 if n >= last else 0.0
                )
                checkpoints.save(2, state(2))
                try:
                    checkpoints.finish()
                    ended = not faults.told
                except OutputError:
                    ended = False
            bucket.proxy.faults = Faults()
            newest.append(restored(run))
            with Head(run).taken(quiet, lease=5), of(run) as after:
                assert after.steps()[-1] == newest[-1]
                assert not list(after.store.left())
                after.save(3, state(3))
                after.finish()
            assert restored(run) == 3
            if ended:
                break
    assert ended
    print(f"{number - 1} requests of a save: step 1 is left after {newest.count(1)} of them")
    assert newest == sorted(newest)
    assert newest.count(1) > 5
    assert newest[-1] == 2


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "seed",
    [
        *range(3),
        *(pytest.param(seed, marks=SLOW) for seed in range(3, 25)),
        *(pytest.param(seed, marks=(SLOW, pytest.mark.exhaustive)) for seed in range(25, 100)),
    ],
)
def test_faults_at_random_lose_nothing(bucket: Bucket, place: str, seed: int) -> None:
    """Each run ends with the bits that were saved, or with a sentence and those saved before."""
    safe, failed = 0, []
    with enter((1, 2, 1)):
        saved(place, 1)
        faults = Faults(seed=seed, share=(0.03, 0.1, 0.3)[seed % 3])
        bucket.proxy.faults = faults
        try:
            with Head(place).taken(quiet, lease=2), of(place, say=failed.append) as checkpoints:
                for step in (2, 3, 4):
                    checkpoints.save(step, state(step))
                    try:
                        checkpoints.finish()
                        safe = step
                    except OutputError as error:
                        failed.append(str(error))
                    failed += checkpoints.failures()
        except OutputError as error:
            failed.append(str(error))
        bucket.proxy.faults = Faults()
        found = restored(place)
    print(f"seed {seed}: {sum(faults.told.values())} faults, {len(failed)} sentences, step {found}")
    assert found >= max(1, safe)
    assert all("\n" not in one and len(one) < 600 for one in failed)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("answer", "told"), [(EXPIRED, "ExpiredToken"), (FULL, "QuotaExceeded")])
def test_a_bucket_that_takes_nothing_more_is_told_and_nothing_is_lost(
    bucket: Bucket, place: str, answer: bytes, told: str
) -> None:
    with enter((1, 2, 1)):
        saved(place, 1)
        with Head(place).taken(quiet), of(place) as checkpoints:
            bucket.proxy.faults = Faults(refused=answer)
            checkpoints.save(2, state(2))
            checkpoints.save(3, state(3))
            checkpoints.save(4, state(4))
            with pytest.raises(OutputError, match="3 checkpoints in a row were not written") as no:
                checkpoints.finish()
            assert (told if bucket.url == "s3://bucket" else "PERMISSION_DENIED") in str(no.value)
            bucket.proxy.faults = Faults()
        assert restored(place) == 1


def test_the_step_goes_on_while_a_save_is_retried(bucket: Bucket, place: str) -> None:
    said: list[str] = []
    with enter((1, 2, 1)), Head(place).taken(quiet), of(place, say=said.append) as checkpoints:
        bucket.proxy.faults = Faults(share=1.0, kinds=("503",))
        checkpoints.save(2, state(2))  # and returns
        while not said:
            pass
        assert not checkpoints.failures()
        bucket.proxy.faults = Faults()
        checkpoints.finish()
        assert restored(place) == 2
    assert all("checkpoint 2: " in line and "trying again in" in line for line in said)


def test_credentials_are_in_no_object_and_no_message(bucket: Bucket, place: str) -> None:
    with enter((1, 1, 1)):
        saved(place, 1)
    store = buckets.open_kvstore(place)
    contents = b"".join(store.read(key).result().value for key in keys(place))
    for name, value in bucket.environment.items():
        if "SECRET" in name or "KEY" in name:
            assert value.encode() not in contents
    assert json.loads(store.read(head.HEAD).result().value)["writer"] is None
    assert sys.modules.get("google.cloud.storage") is None
