"""Spikes of loss and gradient: seen by robust statistics, and answered by a rewind.

A step is a spike where its loss or its gradient's norm lies more than spike.threshold deviations
above the median of the last spike.window steps, a deviation being 1.4826 times the median absolute
deviation (that of a normal distribution), or where one of them is not finite. The remedy is that of
PaLM (Chowdhery et al. 2022, section 5.1): go on from a checkpoint before it, without the batches
around it.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping

from gptjax.config.schema import SpikeConfig
from gptjax.training.callbacks import Callback, StepTimer

_WATCHED = ("loss", "grad_norm")
_LEAST = 10  # steps that are needed to judge one
_FLOOR = 1e-3  # of the median, at least, is a deviation


class Spike(Exception):
    """A step after which a run is to be rewound."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"step {step}: {why}")
        self.step, self.why = step, why


class SpikeWatch(Callback):
    """Raises Spike at a step that is one. Does nothing with a threshold of 0."""

    def __init__(self, cfg: SpikeConfig) -> None:
        self._threshold = cfg.threshold
        self._seen = {name: deque[float](maxlen=cfg.window) for name in _WATCHED}

    def on_metrics(self, step: int, metrics: dict[str, float], timer: StepTimer) -> None:
        if not self._threshold:
            return
        if metrics["nonfinite"] or not math.isfinite(metrics["param_norm"]):
            raise Spike(step, "loss, gradient or parameters not finite")
        for name, seen in self._seen.items():
            if why := judge(name, metrics[name], seen, self._threshold):
                raise Spike(step, why)
        for name, seen in self._seen.items():
            seen.append(metrics[name])

    def window(self) -> dict[str, list[float]]:
        """The steps that the next one is compared with, for a checkpoint's metadata."""
        return {name: list(seen) for name, seen in self._seen.items()} if self._threshold else {}

    def restore(self, window: Mapping[str, Iterable[float]]) -> None:
        """Continues from a window of `window`."""
        for name, seen in self._seen.items():
            seen.clear()
            seen.extend(window.get(name, ()))


def judge(name: str, value: float, seen: Iterable[float], threshold: float) -> str:
    """Why a value is a spike after those seen; empty where it is none."""
    before = list(seen)
    if len(before) < _LEAST:
        return ""
    median = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(one - median) for one in before)
    deviation = max(spread, _FLOOR * abs(median), 1e-12)
    if value <= median + threshold * deviation:
        return ""
    times = (value - median) / deviation
    return (
        f"{name} {value:.4g} is {times:.1f} deviations above {median:.4g}, the median of "
        f"{len(before)} steps"
    )
