"""Processes that all others wait for, because they read or write more slowly.

Which process computes slowly cannot be seen from outside of a step: its sums hold all of them up
alike. What a process does by itself between steps can.
"""

import statistics
import time
from collections.abc import Iterator, Mapping

from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training.callbacks import Callback, StepTimer

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
