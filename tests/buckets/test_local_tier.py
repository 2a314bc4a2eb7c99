"""Checkpoints on the machines' own disks, beside those in the bucket."""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from servers import Bucket, Faults
from test_bucket_checkpoints import abstract, enter, quiet, restored, state

from gptjax import bucket as buckets
from gptjax.checkpoint import local_tier
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.checkpoint.fingerprint import fingerprints
from gptjax.checkpoint.head import Head
from gptjax.config import CheckpointConfig
from gptjax.param_tree import leaves_by_path

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def place(s3_bucket: Bucket, request: pytest.FixtureRequest) -> str:
    return f"{s3_bucket.url}/{request.node.name.partition('[')[0]}"


def of(place: str, disk: Path, say: Callable[[str], None] = quiet, keep: int = 1) -> Checkpointer:
    cfg = CheckpointConfig(local=str(disk), local_keep=keep)
    return Checkpointer(buckets.path_of(place) / "checkpoints", cfg, say=say)


def trained(place: str, disk: Path, *steps: int, keep: int = 1) -> None:
    """A run that saves its first step in the bucket, and the others on this machine's disk."""
    with Head(place).taken(quiet), of(place, disk, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), local=step != steps[0])
            checkpoints.finish()
        assert not checkpoints.failures()


def begun_again(place: str, disk: Path, say: Callable[[str], None] = quiet) -> int:
    """The step that the run goes on from, with all its arrays as they were."""
    with Head(place).taken(quiet), of(place, disk, say) as checkpoints:
        found = checkpoints.restore_newest(abstract(state()))
    step = int(found["step"])
    assert fingerprints(leaves_by_path(found)) == fingerprints(leaves_by_path(state(step)))
    return step


def on_disk(disk: Path) -> list[str]:
    return sorted(path.name for path in disk.glob("*/0-of-1/*"))


def test_the_newest_of_both_is_restored(place: str, tmp_path: Path) -> None:
    said: list[str] = []
    with enter():
        trained(place, tmp_path / "a", 1, 2, 3)
        assert on_disk(tmp_path / "a") == ["3"]
        assert begun_again(place, tmp_path / "a", said.append) == 3
        assert said == ["step 3 was on the machines' own disks"]
        assert begun_again(place, tmp_path / "empty") == 1
        assert restored(place) == 1  # as another machine sees it
        trained(place, tmp_path / "b", 5)
        assert begun_again(place, tmp_path / "a") == 5


def test_disks_of_another_mesh_are_no_use(place: str, tmp_path: Path) -> None:
    with enter((1, 2, 2)):
        trained(place, tmp_path, 1, 2)
    with enter((1, 4, 1)):
        assert begun_again(place, tmp_path) == 1
    with enter((1, 2, 2)):
        assert begun_again(place, tmp_path) == 2


def test_what_is_damaged_on_a_disk_is_left_out(place: str, tmp_path: Path) -> None:
    said: list[str] = []
    with enter():
        trained(place, tmp_path, 1, 2, 3, keep=2)
        (chunk,) = tmp_path.glob("*/0-of-1/3/state/params/b/c/0")
        contents = bytearray(chunk.read_bytes())
        contents[0] ^= 1
        chunk.write_bytes(contents)
        assert begun_again(place, tmp_path, said.append) == 2
        assert said[0].startswith("local checkpoint 3 failed verification (")
        assert on_disk(tmp_path) == ["2"]
        (meta,) = tmp_path.glob("*/0-of-1/2/meta.json")
        meta.write_text(meta.read_text().replace('"step": 2', '"step": 7'))
        assert begun_again(place, tmp_path, said.append) == 1
        assert on_disk(tmp_path) == []


def test_a_run_of_the_same_name_that_was_begun_anew_does_not_see_them(
    place: str, tmp_path: Path
) -> None:
    import tensorstore

    with enter():
        trained(place, tmp_path, 1, 2)
        buckets.open_kvstore(place).delete_range(tensorstore.KvStore.KeyRange()).result()
        with Head(place).taken(quiet), of(place, tmp_path) as checkpoints:
            assert checkpoints.restore_newest(abstract(state())) is None


def test_a_full_disk_is_told_and_the_bucket_goes_on(place: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_text("a file, where a folder must be")
    with enter(), Head(place).taken(quiet), of(place, disk) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, state(step), local=step != 4)
        checkpoints.finish()
        told = checkpoints.failures()
    assert len(told) == 5
    assert told[0].startswith("local checkpoint 1 was not written: process 0 (")
    with enter():
        assert restored(place) == 4


def test_a_local_save_does_not_wait_for_an_upload(
    place: str, s3_bucket: Bucket, tmp_path: Path
) -> None:
    with enter(), Head(place).taken(quiet), of(place, tmp_path) as checkpoints:
        s3_bucket.proxy.faults = Faults(share=1.0, kinds=("503",))
        checkpoints.save(1, state(1))
        checkpoints.save(2, state(2), local=True)
        while "2" not in on_disk(tmp_path):
            pass
        assert checkpoints.steps() == []
        s3_bucket.proxy.faults = Faults()
        checkpoints.finish()
        assert checkpoints.steps() == [1]


def test_the_rate_of_uploads_is_limited(s3_bucket: Bucket, place: str) -> None:
    sent: list[float] = []
    cfg = CheckpointConfig(upload_mb_s=0.001)  # of a state of 2.3 kB
    folder = buckets.path_of(place) / "checkpoints"
    with enter((1, 1, 1)), Head(place).taken(quiet), Checkpointer(folder, cfg) as checkpoints:
        began = time.monotonic()
        checkpoints.save(1, state(1))
        sent.append(time.monotonic() - began)
        checkpoints.finish()
        sent.append(time.monotonic() - began)
    assert sent[0] < 1
    assert sent[1] > 2


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2)])
def test_parts_are_copied_from_the_devices_that_hold_them(mesh) -> None:
    with enter(mesh):
        whole = leaves_by_path(state(3))
        held = set(jax.devices()[4:]) if mesh[0] == 2 else set(jax.devices()[-mesh[2] :])
        wrecked = {
            path: jax.make_array_from_single_device_arrays(
                leaf.shape,
                leaf.sharding,
                [
                    shard.data if shard.device in held else jax.device_put(
                        np.ones(shard.data.shape, leaf.dtype), shard.device
                    )
                    for shard in leaf.addressable_shards
                ],
            )
            for path, leaf in whole.items()
        }  # fmt: skip
        found = local_tier.copied(wrecked, lambda device: device in held)
        for path, leaf in whole.items():
            assert found[path].sharding == leaf.sharding
            pairs = zip(found[path].addressable_shards, leaf.addressable_shards, strict=True)
            for one, other in pairs:
                assert np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes()


def test_signs_of_zeros_and_what_is_not_a_number_are_copied(tmp_path: Path) -> None:
    with enter((8, 1, 1)):
        mesh = jax.sharding.get_mesh()
        values = np.array([-0.0, np.nan, np.inf, -1.5], np.float32)
        leaf = jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.P()))
        last = jax.devices()[7]
        found = local_tier.copied({"x": leaf}, lambda device: device == last)["x"]
        assert np.asarray(found).tobytes() == values.tobytes()


def test_a_run_in_a_folder_has_no_such_tier(command_line, tmp_path: Path) -> None:
    words = ("config", "debug", "--run", tmp_path, "--checkpoint.local", tmp_path)
    code, _, err = command_line(*words)
    assert code == 2
    assert f"checkpoint.local={tmp_path}: is beside a run in a bucket" in err
