"""`gptjax verify RUN`: a part of a run again, compared with what was saved and recorded."""

from collections.abc import Sequence

import jax

from gptjax.checkpoint import replicas
from gptjax.checkpoint.fingerprint import fingerprints
from gptjax.errors import CheckpointError, ConfigError, NumericError
from gptjax.param_tree import Leaves, leaves_by_path
from gptjax.pretrain import rerun
from gptjax.pretrain.rerun import Difference, RunAgain
from gptjax.runtime.progress import Progress

BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative deviations that other meshes, devices and versions may have, by compute.dtype."""


def verify_run(path: str, first: int | None, steps: int | None) -> None:
    """Verifies a run from a checkpoint on, by default from that before the newest. Raises
    NumericError where something differs."""
    with rerun.opened(path, Progress()) as again:
        first, last = _range(again, first, steps)
        print(f"{path}: trains again from step {first} to step {last}", flush=True)
        verify(again, first, last)


def _range(again: RunAgain, first: int | None, steps: int | None) -> tuple[int, int]:
    """The step to begin after, and the last one: by default to the newest checkpoint from the one
    before it."""
    saved = again.checkpoints.steps()
    if not saved:
        raise CheckpointError(f"{again.path}: this run has no checkpoint yet")
    done = max([*saved, *again.recorded])
    if first is None:
        first = max((one for one in saved if one < saved[-1]), default=0)
    elif first and first not in saved:
        have = ", ".join(map(str, [0, *saved]))
        raise ConfigError([f"--from={first}: there is no such checkpoint; available: {have}"])
    if steps is not None and not 1 <= steps <= again.last - first:
        raise ConfigError([f"--steps={steps}: from step {first} there are {again.last - first}"])
    last = first + steps if steps else min((n for n in saved if n > first), default=done)
    if last > done or last <= first:
        raise ConfigError([f"--from={first}: nothing was trained after it; the run is at {done}"])
    if not any(first < n <= last for n in (*saved, *again.recorded)):
        raise ConfigError([f"--steps={steps}: nothing was saved or recorded of these steps"])
    return first, last


def verify(again: RunAgain, first: int, last: int) -> None:
    """Trains again, prints what was compared and found equal. Raises NumericError."""
    saved = [step for step in again.checkpoints.steps() if first <= step <= last]
    metas = {step: again.checkpoints.meta(step) for step in saved}
    reasons = (again.bits_may_differ(meta, step) for step, meta in metas.items())
    why = next((reason for reason in reasons if reason), "")
    bound = BOUNDS[again.cfg.compute.dtype] if why else 0.0
    names = ", ".join(rerun.COMPARED)
    what = f"{names} to within {bound:g} of their values, as bits may differ ({why})"
    print(f"compares {what if why else f'{names} and all arrays, bit for bit'}", flush=True)
    wrong: list[Difference] = []
    compared = arrays = 0
    for step, state, metrics in again.steps(again.state_at(first), last):
        if metrics and step in again.recorded:
            compared += 1
            found = rerun.difference(step, metrics, again.recorded[step], bound)
            wrong += [found] if found else []
        if step in metas and not why:
            prints = fingerprints(leaves_by_path(state))
            unlike = [
                path for path, own in prints.items() if metas[step]["fingerprints"][path] != own
            ]
            arrays += len(prints)
            if unlike:
                parts = _differing_parts(again, step, leaves_by_path(state), unlike)
                raise NumericError(
                    _told(again, wrong, f"checkpoint {step}: of {len(prints)} arrays {parts}")
                )
            print(f"checkpoint {step}: all {len(prints)} arrays are equal")
    if wrong:
        raise NumericError(_told(again, wrong))
    counted = f"{compared} recorded steps"
    print(f"{counted}: all within the bound" if why else f"{counted}, {arrays} arrays: all equal")


def _differing_parts(again: RunAgain, step: int, leaves: Leaves, unlike: Sequence[str]) -> str:
    """The arrays that are not those of a checkpoint, and the devices that differ; which of a
    device's own part alone says that it was this device, now or then."""
    now = replicas.part_sums({path: leaves[path] for path in unlike})
    for leaf in leaves.values():
        leaf.delete()  # the checkpoint needs their memory
    saved = leaves_by_path(again.state_at(step))
    devices = replicas.unlike(now, replicas.part_sums({path: saved[path] for path in unlike}))
    told = [f"{path} ({_names(devices.get(path, []))})" for path in unlike[:5]]
    more = f" and {len(unlike) - 5} more" if len(unlike) > 5 else ""
    return f"{len(unlike)} differ: {', '.join(told)}{more}"


def _names(devices: Sequence[jax.Device]) -> str:
    """Devices by their processes, or that they are all."""
    if len(devices) == jax.device_count() > 1:
        return "on all devices"
    processes = sorted({device.process_index for device in devices})
    ids = lambda process: ", ".join(str(d.id) for d in devices if d.process_index == process)
    return "; ".join(f"in the part of device {ids(one)} of process {one}" for one in processes)


def _told(again: RunAgain, wrong: list[Difference], arrays: str = "") -> str:
    """What differs: the first step by its metrics, and the arrays of a checkpoint."""
    parts = [f"the first difference that was recorded is at {wrong[0]}"] if wrong else []
    parts += [arrays] if arrays else []
    return f"{again.path}: was not trained as it is now: {'; '.join(parts)}"
