"""Copies of an array that differ are found, on whatever mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.checkpoint import replicas
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import Config, MeshConfig
from gptjax.errors import NumericError
from gptjax.parallel.mesh import make_mesh
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training import callbacks, metrics, standard

pytestmark = pytest.mark.usefixtures("quick_compile")


def planted(array: np.ndarray, sharding: NamedSharding, device: int, bit: int) -> jax.Array:
    """The array, with one flipped bit in the copy of one device; none with device -1."""
    shards = []
    for number, (where, index) in enumerate(
        sharding.addressable_devices_indices_map(array.shape).items()
    ):
        part = np.array(array[index])
        if number == device:
            raw = part.reshape(-1).view(np.uint8)
            raw[bit // 8 % raw.size] ^= 1 << bit % 8
        shards.append(jax.device_put(part, where))
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("axes", [(None, None), ("tensor", None), (None, "fsdp")])
def test_any_flipped_bit_of_one_copy_is_found(dtype, axes) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    array = np.asarray(jnp.asarray(np.random.default_rng(0).integers(-9, 9, (8, 6)), dtype))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        assert replicas.differing({"w": planted(array, sharding, -1, 0)}) == []
        for device in range(8):
            leaves = {"v": planted(array, sharding, -1, 0)}
            leaves["w"] = planted(array, sharding, device, 37 * device + 5)
            (problem,) = replicas.differing(leaves)
            assert problem.startswith("w differs between devices ")
            assert str(jax.devices()[device].id) in problem or device == 0


def test_an_array_without_copies_has_none_to_compare() -> None:
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices())
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
        array = np.arange(64, dtype=np.float32)
        assert replicas.differing({"w": planted(array, sharding, 3, 8)}) == []


def test_a_difference_ends_the_run_before_it_is_saved(tmp_path) -> None:
    mesh, cfg = make_mesh(MeshConfig(data=8), jax.devices()), Config()
    watchdog, progress = Watchdog(cfg.watch), Progress(shown=False)
    at_border = callbacks.CheckReplicas(4, 6, watchdog, {5})
    at_border.begin(0, 100)
    assert at_border.due(5)
    check = callbacks.CheckReplicas(4, 6, watchdog)
    check.begin(0, 19)
    assert [step for step in range(1, 20) if check.due(step)] == [4, 6, 8, 12, 16, 18, 19]
    never = callbacks.CheckReplicas(0, 6, watchdog)
    never.begin(0, 19)
    assert not any(never.due(step) for step in range(20))

    array = np.arange(64, dtype=np.float32)
    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, PartitionSpec())
        for device, problem in ((-1, None), (5, "step 4: copies of the same numbers differ")):
            state = {"params": {"w": planted(array, whole, device, 77)}}
            snapshot = callbacks.Snapshot(4, state, task=None)
            if problem is None:
                check.run(snapshot)
            else:
                with pytest.raises(NumericError, match=f"{problem}.*params/w differs between"):
                    check.run(snapshot)

    checkpointer = Checkpointer(tmp_path / "checkpoints", cfg.checkpoint)
    evaluate = callbacks.Evaluate(
        lambda step: [], metrics.Writers([], tmp_path), watchdog, progress
    )
    kinds = [
        type(one)
        for one in standard.standard_callbacks(cfg, checkpointer, evaluate, watchdog, progress)
    ]
    assert kinds.index(callbacks.CheckReplicas) < kinds.index(callbacks.Save)
