"""The audit of a step: computed twice from the same state, and compared bit for bit.

A device that computes wrongly without saying so spoils a run unseen, and where each device has a
part of its own there is no copy to compare it with. So every watch.audit_every steps all devices
compute a step twice. A difference names the device, keeps both results of what differs, and ends
the run unsaved.

    RUN/audit-STEP/process-N/LEAF.1.npy, LEAF.2.npy
"""

import io
import socket
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import bucket
from gptjax.checkpoint import replicas
from gptjax.config import Config
from gptjax.errors import AuditError, ConfigError
from gptjax.parallel import sharding
from gptjax.param_tree import Leaves, leaves_by_path
from gptjax.runtime import distributed
from gptjax.training.step import TrainState

StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def check(cfg: Config) -> None:
    """Raises ConfigError where a step need not have the same bits twice."""
    if cfg.watch.audit_every and sharding.platform() == "gpu" and not cfg.compute.deterministic:
        raise ConfigError(
            [
                f"watch.audit_every={cfg.watch.audit_every}: on GPUs a step has the same bits "
                "twice only with compute.deterministic"
            ]
        )


def audited(
    step_fn: StepFn, state: TrainState, batch: Any, step: int, run: str
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The step, computed twice; consumes the state. All processes call this together.

    Needs memory for the state once more. Raises AuditError where the results differ.
    """
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(state)
    result = step_fn(state, batch)
    again, _ = step_fn(copy, batch)
    one, two = leaves_by_path(result[0]), leaves_by_path(again)
    if unlike := replicas.unlike(replicas.part_sums(one), replicas.part_sums(two)):
        raise _error(unlike, one, two, step, run)
    return result


def _error(
    unlike: Mapping[str, list[jax.Device]], one: Leaves, two: Leaves, step: int, run: str
) -> AuditError:
    """What differs, where, and where both results were written."""
    hosts = distributed.gather(socket.gethostname())
    devices = sorted({d for found in unlike.values() for d in found}, key=lambda d: d.id)
    told = ", ".join(
        f"device {d.id} of process {d.process_index} on {hosts[d.process_index]}"
        for d in devices[:4]
    )
    more = f" and {len(devices) - 4} more" if len(devices) > 4 else ""
    paths = list(unlike)
    some = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    folder = bucket.path_of(run) / f"audit-{step}" / f"process-{distributed.index()}"
    try:
        for path in paths:
            for number, leaf in enumerate((one[path], two[path]), 1):
                _write(folder / f"{path.replace('/', '.')}.{number}.npy", leaf)
        kept = f"both are in {folder.parent}"
    except OSError as error:
        kept = f"they could not be kept: {error}"
    return AuditError(
        f"step {step} was computed twice, with two results, by {told}{more} ({some}): it computes "
        f"or remembers wrongly, leave that host out; nothing was saved; {kept}"
    )


def _write(file: Any, leaf: jax.Array) -> None:
    """Writes this process's shards of an array, one after another as rows of bytes."""
    shards = [np.asarray(one.data) for one in leaf.addressable_shards]
    stream = io.BytesIO()
    np.save(stream, np.stack(shards).view(np.uint8) if shards[0].ndim else np.stack(shards))
    if not bucket.remote(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(stream.getvalue())
