"""What a person asks of a run while it is trained: a checkpoint, a profile, the stacks.

SIGUSR1 to process 0 asks for all of them. A file RUN/request asks for what it names: any of "save",
"profile" and "stacks"; it is removed when it has been read. In a job of several processes they are
heard at the next step that is a multiple of log.every, by all at the same step.
"""

import contextlib
import signal
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from gptjax.config import LogConfig
from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training.callbacks import Callback, Profile, Save, StepTimer

REQUEST = "request"
WORDS = ("save", "profile", "stacks")
_LOOK_S = 1.0
_TIMES, _SLOW_TRACES = 20, 3


class OnDemand(Callback):
    """Hears requests before a step, and sees to them."""

    def __init__(
        self, cfg: LogConfig, folder: Path, save: Save, watchdog: Watchdog, progress: Progress
    ) -> None:
        self._cfg, self._folder, self._save = cfg, folder, save
        self._watchdog, self._progress = watchdog, progress
        self._signalled, self._looked = False, 0.0
        self._profile: Profile | None = None
        self._times: deque[float] = deque(maxlen=_TIMES)
        self._slow, self._done = 0, 0.0  # traces of slow steps; when the last step was done
        self._action: Any = None

    def begin(self, first: int, last: int) -> None:
        super().begin(first, last)
        with contextlib.suppress(ValueError):  # not in the main thread: only the file is heard
            self._action = self._action or signal.signal(signal.SIGUSR1, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def before_step(self, step: int) -> None:
        for word in self._asked(step):
            self._progress.say(f"step {step}: asked to {word}")
            if word == "save":
                self._save.ask(step)
            elif word == "stacks":
                self._progress.say(self._watchdog.stacks())
            elif self._profile is None:
                self._start_profile(step)
        if self._profile is not None:
            self._profile.before_step(step)

    def _start_profile(self, step: int) -> None:
        folder = self._folder / f"profile-{step}"
        self._profile = Profile(replace(self._cfg, profile_start=step), folder)
        self._progress.say(f"steps from {step} are profiled into {folder}")

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        if self._profile is not None:
            self._profile.dispatched(step, metrics)
            if self._profile.done:
                self._profile = None
                self._times.clear()  # steps that were traced were slower

    def on_metrics(self, step: int, metrics: dict[str, float], timer: StepTimer) -> None:
        """Asks for a profile after a slow step, of this process alone."""
        spent = self._watchdog.seconds()
        done = spent["step"] + spent["data"]  # without saves and evaluations
        took, self._done = done - self._done, done
        limit, known = self._cfg.profile_slow, len(self._times) == _TIMES
        slow = (
            limit
            and known
            and self._profile is None
            and took > limit * statistics.median(self._times)
        )
        if slow and self._slow < _SLOW_TRACES:
            self._slow += 1
            self._progress.say(f"step {step} took {took:.2f} s: the next ones are profiled")
            self._start_profile(step + 2)  # the next one is under way
        self._times.append(took)

    def close(self) -> None:
        if self._profile is not None:
            self._profile.close()
        if self._action is not None:
            signal.signal(signal.SIGUSR1, self._action)
            self._action = None

    def _asked(self, step: int) -> list[str]:
        """The words that are asked for before a step, the same in all processes."""
        if not distributed.several():
            return self._words()
        if step % self._cfg.every:
            return []
        own = " ".join(self._words()) if distributed.first() else ""
        return distributed.from_first(own).split()

    def _words(self) -> list[str]:
        if self._signalled:
            self._signalled = False
            return list(WORDS)
        if time.monotonic() - self._looked < _LOOK_S:
            return []
        self._looked = time.monotonic()
        file = self._folder / REQUEST
        try:
            asked = file.read_text().split()
            file.unlink()
        except OSError:
            return []
        if unknown := [word for word in asked if word not in WORDS]:
            self._progress.say(f"{file}: {unknown[0][:40]!r} is none of {', '.join(WORDS)}")
        return [word for word in WORDS if word in asked]
