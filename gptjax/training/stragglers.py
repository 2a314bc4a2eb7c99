"""Processes and devices that all others wait for, because they are slower.

What a process does by itself between steps, reading or saving, is known by the watchdog's stages.
Which device computes slowly cannot be seen in a step, whose sums hold all of them up alike: so each
is timed alone at the same matrix products, when a run stands still for a checkpoint.
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from gptjax.parallel import sharding
from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training.callbacks import Callback, Snapshot, StepTimer, is_due

OWN_WORK = {"data": "waiting for data", "save": "saving", "eval": "evaluating"}
_EVERY_S = 30.0

Spent = Mapping[str, Mapping[str, float]]
"""Seconds by stage, by the name of the process."""


class NameStragglers(Callback):
    """Tells, in process 0, of a process that costs the others more than a share of the time."""

    def __init__(self, share: float, watchdog: Watchdog, progress: Progress) -> None:
        self._share, self._watchdog, self._progress = share, watchdog, progress
        self._before: Spent = {}
        self._looked = time.monotonic()

    def on_metrics(self, step: int, metrics: dict[str, float], timer: StepTimer) -> None:
        elapsed = time.monotonic() - self._looked
        if not (self._share and distributed.several() and distributed.first()):
            return
        if elapsed < _EVERY_S:
            return
        now = self._watchdog.spent()
        for line in stragglers(self._before, now, elapsed, self._share):
            self._progress.say(f"step {step}: {line}")
        self._before, self._looked = now, time.monotonic()


def stragglers(before: Spent, now: Spent, elapsed: float, share: float) -> Iterator[str]:
    """A line for each process that spent more seconds in a stage of its own than the median of all,
    by more than a share of the seconds since `before`."""
    for stage, what in OWN_WORK.items():
        took = {
            name: spent.get(stage, 0.0) - before[name].get(stage, 0.0)
            for name, spent in now.items()
            if name in before
        }
        median = statistics.median_low(took.values()) if took else 0.0
        for name, seconds in took.items():
            if seconds - median > share * elapsed:
                yield (
                    f"{name} was {seconds:.1f} s {what} of the last {elapsed:.0f} s, the median "
                    f"of all processes is {median:.1f} s: the others wait for it"
                )


class NameSlowDevices(Callback):
    """Tells, in process 0, of a device that needs more time than the median of all for the same
    work, by more than a share of it, at two checkpoints in a row.

    On CPUs one device of each process is timed: they share the cores.
    """

    def __init__(self, share: float, every: int, watchdog: Watchdog, progress: Progress) -> None:
        self._share, self._every = share, every
        self._watchdog, self._progress = watchdog, progress
        self._before: set[str] = set()

    def due(self, step: int) -> bool:
        alone = jax.device_count() == 1 or (
            sharding.platform() == "cpu" and not distributed.several()
        )
        return self._share > 0 and not alone and is_due(self._every, step, self._last)

    def run(self, snapshot: Snapshot) -> None:
        self._watchdog.at("save", snapshot.step)
        jax.block_until_ready(snapshot.state)
        own = {f"device {d.id} of {distributed.name()}": _seconds_of(d) for d in _timed_devices()}
        took: dict[str, float] = {}
        for one in distributed.gather(json.dumps(own)):
            took |= json.loads(one)
        median = statistics.median_low(took.values())
        slow = {name for name, seconds in took.items() if seconds > median * (1 + self._share)}
        for name in sorted(slow & self._before):
            self._progress.say(
                f"step {snapshot.step}: {name} took {took[name] / median:.2f} times the median of "
                "all devices for the same products, at two checkpoints in a row: all wait for it"
            )
        self._before = slow


def _timed_devices() -> Sequence[jax.Device]:
    devices = jax.local_devices()
    return devices[:1] if devices[0].platform == "cpu" else devices


def _products(x: jax.Array) -> jax.Array:
    """Some products one after another, of a size that the device is busy with for a millisecond."""
    size, dtype = (256, jnp.float32) if sharding.platform() == "cpu" else (4096, jnp.bfloat16)
    x_NN = jnp.full((size, size), x, dtype)
    return lax.fori_loop(0, 8, lambda _, x_NN: (x_NN @ x_NN) / size, x_NN)[0, 0]


def _seconds_of(device: jax.Device) -> float:
    """The least of five times that a device takes for the products."""
    with jax.set_mesh(Mesh(np.array([device]), ("device",))):
        x = jax.device_put(jnp.float32(0.5), device)
        run = jax.jit(_products)
        run(x).block_until_ready()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            run(x).block_until_ready()
            times.append(time.perf_counter() - began)
    return min(times)
