"""The watch: a job in which a process dies or hangs ends, and says which and where.

Each process posts where it is (stage, step, for how long, and its stack) to the coordination
service, and process 0 reads them all. What is silent for `watch.lost` seconds is lost. Of the
others, the one furthest behind is what they wait for, and it is late when it stays in its stage
beyond that stage's limit. Process 0 then posts a verdict, everyone prints it, and the job ends with
LOST for a scheduler to start it again. A process alone watches itself.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from jax.errors import JaxRuntimeError

from gptjax.config import WatchConfig
from gptjax.errors import PeerError
from gptjax.runtime import distributed

LOST = PeerError.exit_code
STAGES = ("prepare", "restore", "compile", "data", "step", "save", "eval")  # a run, in order
_BEAT = "gptjax/beat/"
_FRAMES = 8  # innermost frames of the main thread that are posted


@dataclass(frozen=True)
class Beat:
    """Where a process was, `seconds` after it came there; `count` grows with every beat."""

    count: int
    stage: str
    step: int
    seconds: float
    who: str
    stack: str

    def place(self) -> tuple[int, int]:
        """How far it had come, to compare."""
        return self.step, STAGES.index(self.stage)


def judge(
    beats: Mapping[int, Beat], silent: Mapping[int, float], cfg: WatchConfig
) -> tuple[int, str] | None:
    """The process at fault and a sentence about it, or None while all is well.

    `silent` is for how many seconds nothing new was heard of each process.
    """
    if lost := [i for i, seconds in silent.items() if cfg.lost and seconds > cfg.lost]:
        worst = max(lost, key=lambda i: silent[i])
        beat = beats[worst]
        return worst, (
            f"{beat.who} has not been heard of for {silent[worst]:.0f} s (watch.lost={cfg.lost}); "
            f"it was in stage {beat.stage} of step {beat.step}"
        )
    limits = {
        "prepare": 0,
        "restore": cfg.restore,
        "compile": cfg.compile,
        "data": cfg.data,
        "step": cfg.step,
        "save": cfg.save,
        "eval": cfg.eval,
    }
    ages = {i: beat.seconds + silent[i] for i, beat in beats.items()}
    worst = min(beats, key=lambda i: (beats[i].place(), -ages[i]))
    beat = beats[worst]
    if not 0 < limits[beat.stage] < ages[worst]:
        return None
    return worst, (
        f"{beat.who} is late: in stage {beat.stage} of step {beat.step} for {ages[worst]:.0f} s "
        f"(watch.{beat.stage}={limits[beat.stage]}; raise it if this is only slow)"
    )


class Watchdog:
    """While it is entered, watches this process, and with process 0 the whole job."""

    def __init__(self, cfg: WatchConfig) -> None:
        self._cfg = cfg
        self._interval = min(5.0, (cfg.lost or 30) / 6)
        self._place = "restore", 0, time.monotonic()
        self._count = 0
        self._heard: dict[int, tuple[Beat, float]] = {}  # each process's last, and when it was new
        self._answered = time.monotonic()  # when the coordinator last did
        self._stopping = threading.Event()

    def __enter__(self) -> "Watchdog":
        now = self._answered = time.monotonic()
        for i in range(distributed.count()):
            self._heard[i] = Beat(0, "restore", 0, 0.0, f"process {i}", ""), now
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        if distributed.several():  # apart: a call to a coordinator that is stopped never returns
            threading.Thread(target=self._talk, name="watch-talk", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        """Where a computation over several processes failed, waits for who was lost to show."""
        if kind is not None and issubclass(kind, JaxRuntimeError) and distributed.several():
            print(f"gptjax: {error}", file=sys.stderr)
            ends = time.monotonic() + self._cfg.lost + 2 * self._interval
            while time.monotonic() < ends and distributed.verdict() is None:
                time.sleep(0.2)
            if verdict := distributed.verdict():
                _end(verdict)
        self._stopping.set()

    def at(self, stage: str, step: int) -> None:
        """This process is now in a stage (of STAGES) of a step, counted from 1."""
        self._place = stage, step, time.monotonic()

    def _beat(self) -> Beat:
        stage, step, since = self._place
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)[-_FRAMES:]) if frame else ""
        self._count += 1
        seconds = time.monotonic() - since
        return Beat(self._count, stage, step, seconds, distributed.name(), stack)

    # --- talking to the others ---

    def _talk(self) -> None:
        """Posts this process's beats; process 0 hears everyone's, the others its verdict."""
        store, own = distributed.client(), f"{_BEAT}{distributed.index()}"
        while not self._stopping.wait(self._interval):
            try:
                store.key_value_set(own, json.dumps(asdict(self._beat())), allow_overwrite=True)
                if distributed.first():
                    for key, posted in store.key_value_dir_get(_BEAT):
                        self._hear(int(key.rpartition("/")[2]), Beat(**json.loads(posted)))
                self._answered = time.monotonic()
                if verdict := distributed.verdict():
                    _end(verdict)
            except Exception as error:  # of many kinds; what lasts shows in the silence
                print(f"gptjax: the coordination service did not answer: {error}", file=sys.stderr)

    def _hear(self, i: int, beat: Beat) -> None:
        if self._heard[i][0].count != beat.count:
            self._heard[i] = beat, time.monotonic()

    # --- judging ---

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stopping.wait(self._interval):
            now = time.monotonic()
            self._forgive(now - began - self._interval)
            began = now
            if not distributed.first():
                unanswered = now - self._answered
                if 0 < self._cfg.lost < unanswered:
                    _tell(
                        f"process 0, which coordinates, has not answered for {unanswered:.0f} s "
                        f"(watch.lost={self._cfg.lost})"
                    )
                    os._exit(LOST)
                continue
            if not distributed.several():
                self._hear(0, self._beat())
            beats = {i: beat for i, (beat, _) in self._heard.items()}
            silent = {i: now - when for i, (_, when) in self._heard.items()}
            if fault := judge(beats, silent, self._cfg):
                who, sentence = fault
                _end(f"{sentence}\n{beats[who].stack}".rstrip())

    def _forgive(self, overslept: float) -> None:
        """Takes no account of time in which this process was itself stopped."""
        if overslept > self._interval:
            stage, step, since = self._place
            self._place = stage, step, since + overslept
            self._answered += overslept
            self._heard = {i: (beat, when + overslept) for i, (beat, when) in self._heard.items()}


_ending = threading.Lock()  # never given back: of several threads one tells, and ends them all


def _tell(verdict: str) -> None:
    _ending.acquire()
    print(f"gptjax: {verdict}\ngptjax: ending; run the same command again", file=sys.stderr)
    sys.stderr.flush()


def _end(verdict: str) -> None:
    """Tells the verdict here and to the others, and ends this process."""
    _tell(verdict)
    distributed.leave(LOST, verdict)
    os._exit(LOST)
