"""The hang watchdog: ends a job in which a process died or hangs, and says which one and where.

Each process posts heartbeats (its stage and step, for how long, and its stack) to the coordination
service, and process 0 reads them all. A process without a heartbeat for `watch.lost` seconds is
dead. Of the others, the one furthest behind is the one that all wait for, and it hangs when it is
past the deadline of its stage. Process 0 then posts a verdict, every process prints it, and the job
ends with EXIT_CODE, so that a scheduler starts it again. A single process watches itself.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from jax.errors import JaxRuntimeError

from gptjax.config import WatchConfig
from gptjax.errors import PeerError
from gptjax.runtime import distributed

EXIT_CODE = PeerError.exit_code
STAGES = ("prepare", "restore", "compile", "data", "step", "save", "eval")  # in a run's order
_HEARTBEATS = "gptjax/heartbeat/"
_FRAMES = 8  # innermost frames of the main thread that a heartbeat carries


@dataclass(frozen=True)
class Heartbeat:
    """A process's stage and step, and its seconds in that stage; `count` grows by one each time.

    `spent` has its seconds in each stage since it started.
    """

    count: int
    stage: str
    step: int
    seconds: float
    process: str
    stack: str
    spent: Mapping[str, float] = field(default_factory=dict)

    def position(self) -> tuple[int, int]:
        """How far the process has come, for comparison."""
        return self.step, STAGES.index(self.stage)


def find_fault(
    heartbeats: Mapping[int, Heartbeat], silence: Mapping[int, float], cfg: WatchConfig
) -> tuple[int, str] | None:
    """The dead or hung process and a sentence about it; None while there is none.

    `heartbeats` has the last one of each process, `silence` the seconds since it came.
    """
    if dead := [i for i, seconds in silence.items() if cfg.lost and seconds > cfg.lost]:
        worst = max(dead, key=lambda i: silence[i])
        last = heartbeats[worst]
        return worst, (
            f"{last.process} is dead: no heartbeat for {silence[worst]:.0f} s (limit watch.lost="
            f"{cfg.lost}); it was in stage {last.stage} of step {last.step}"
        )
    deadlines = {
        "prepare": 0,
        "restore": cfg.restore,
        "compile": cfg.compile,
        "data": cfg.data,
        "step": cfg.step,
        "save": cfg.save,
        "eval": cfg.eval,
    }
    seconds = {i: last.seconds + silence[i] for i, last in heartbeats.items()}
    worst = min(heartbeats, key=lambda i: (heartbeats[i].position(), -seconds[i]))
    last = heartbeats[worst]
    if not 0 < deadlines[last.stage] < seconds[worst]:
        return None
    return worst, (
        f"{last.process} hung: in stage {last.stage} of step {last.step} for "
        f"{seconds[worst]:.0f} s (limit watch.{last.stage}={deadlines[last.stage]}; raise it if "
        "this is only slow)"
    )


def own_part(
    silence: Mapping[int, float], own: int, stopped: tuple[float, float], cfg: WatchConfig
) -> str:
    """What to add to a verdict where this process may itself be the cause; empty where not.

    `silence` has the seconds since the last heartbeat of each process, and `stopped` for how long
    this process was last stopped itself, and how long ago that ended.
    """
    others = {i: seconds for i, seconds in silence.items() if i != own}
    duration, ago = stopped
    if not cfg.lost or max(others.values(), default=0.0) <= cfg.lost:
        return ""
    if duration and ago < max(others.values()) + cfg.lost:
        return (
            f"; process {own} was itself stopped for {duration:.0f} s until {ago:.0f} s ago: the "
            f"others end when it does not answer for {cfg.lost} s"
        )
    first, last = min(others.values()), max(others.values())
    if first > cfg.lost / 2 and last - first < cfg.lost / 2:
        who = "the other process is" if len(others) == 1 else "all other processes are"
        return f"; {who} silent, so it may be process {own} that was cut off from the network"
    return ""


class Watchdog:
    """While entered, watches this process; in process 0 it watches the whole job."""

    def __init__(self, cfg: WatchConfig) -> None:
        self._cfg = cfg
        self._interval = min(5.0, (cfg.lost or 30) / 6)
        self._stage = "restore", 0, time.monotonic()  # stage, step, and when it began
        self._entered, self._seconds = time.monotonic(), dict.fromkeys(STAGES, 0.0)
        self._count = 0
        self._last: dict[int, tuple[Heartbeat, float]] = {}  # by process, with its arrival
        self._answered = time.monotonic()  # when the coordination service last answered
        self._stopped = 0.0, 0.0  # for how long this process was stopped, and when that ended
        self._stopping = threading.Event()

    def __enter__(self) -> "Watchdog":
        now = self._answered = time.monotonic()
        for i in range(distributed.count()):
            self._last[i] = Heartbeat(0, "restore", 0, 0.0, f"process {i}", ""), now
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if distributed.several():  # its own thread: a call to a stopped coordinator never returns
            threading.Thread(target=self._exchange, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        """After a failed computation of several processes, waits for the verdict on the cause."""
        if kind is not None and issubclass(kind, JaxRuntimeError) and distributed.several():
            print(f"gptjax: {error}", file=sys.stderr)
            deadline = time.monotonic() + self._cfg.lost + 2 * self._interval
            while time.monotonic() < deadline and distributed.verdict() is None:
                time.sleep(0.2)
            if verdict := distributed.verdict():
                _end(verdict)
        self._stopping.set()

    def at(self, stage: str, step: int) -> None:
        """Notes that this process enters a stage (of STAGES) of a step, counted from 1."""
        now = time.monotonic()
        self._seconds[self._stage[0]] += now - self._entered
        self._stage, self._entered = (stage, step, now), now

    def seconds(self) -> dict[str, float]:
        """The seconds spent in each stage since this was made; of process 0's main thread."""
        running = {self._stage[0]: time.monotonic() - self._entered}
        return {stage: s + running.get(stage, 0.0) for stage, s in self._seconds.items()}

    def stacks(self) -> str:
        """What each process does, and its stack: as of its last heartbeat, of the others."""
        beats = {i: beat for i, (beat, _) in self._last.items()}
        beats[distributed.index()] = self._heartbeat()
        lines = []
        for _, beat in sorted(beats.items()):
            at = f"stage {beat.stage} of step {beat.step} for {beat.seconds:.1f} s"
            lines += [f"{beat.process}: {at}", beat.stack.rstrip()]
        return "\n".join(lines)

    def _heartbeat(self) -> Heartbeat:
        stage, step, since = self._stage
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)[-_FRAMES:]) if frame else ""
        self._count += 1
        seconds = time.monotonic() - since
        name = distributed.name()
        return Heartbeat(self._count, stage, step, seconds, name, stack, self.seconds())

    def spent(self) -> dict[str, Mapping[str, float]]:
        """The seconds of each process by stage, by its name, as of its last heartbeat."""
        return {beat.process: beat.spent for _, (beat, _) in sorted(self._last.items())}

    # --- heartbeats ---

    def _exchange(self) -> None:
        """Posts this process's heartbeats; process 0 reads everyone's, the others its verdict."""
        store, own = distributed.client(), f"{_HEARTBEATS}{distributed.index()}"
        while not self._stopping.wait(self._interval):
            try:
                posted = json.dumps(asdict(self._heartbeat()))
                store.key_value_set(own, posted, allow_overwrite=True)
                if distributed.first():
                    for key, value in store.key_value_dir_get(_HEARTBEATS):
                        self._receive(int(key.rpartition("/")[2]), Heartbeat(**json.loads(value)))
                self._answered = time.monotonic()
                if verdict := distributed.verdict():
                    _end(verdict)
            except Exception as error:  # of many types; if it lasts, heartbeats stop
                print(f"gptjax: the coordination service did not answer: {error}", file=sys.stderr)

    def _receive(self, i: int, heartbeat: Heartbeat) -> None:
        if self._last[i][0].count != heartbeat.count:
            self._last[i] = heartbeat, time.monotonic()

    # --- faults ---

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stopping.wait(self._interval):
            now = time.monotonic()
            self._discount(now - before - self._interval)
            before = now
            if not distributed.first():
                unanswered = now - self._answered
                if 0 < self._cfg.lost < unanswered:
                    _print(
                        f"process 0 (the coordinator) is dead: no answer for {unanswered:.0f} s "
                        f"(limit watch.lost={self._cfg.lost})"
                    )
                    os._exit(EXIT_CODE)
                continue
            if not distributed.several():
                self._receive(0, self._heartbeat())
            heartbeats = {i: heartbeat for i, (heartbeat, _) in self._last.items()}
            silence = {i: now - arrival for i, (_, arrival) in self._last.items()}
            if fault := find_fault(heartbeats, silence, self._cfg):
                i, sentence = fault
                duration, ended = self._stopped
                sentence += own_part(
                    silence, distributed.index(), (duration, now - ended), self._cfg
                )
                _end(f"{sentence}\n{heartbeats[i].stack}".rstrip())

    def _discount(self, stopped: float) -> None:
        """Leaves out of all durations the seconds in which this process itself was stopped."""
        if stopped > self._interval:
            self._stopped = stopped, time.monotonic()
            stage, step, since = self._stage
            self._stage = stage, step, since + stopped
            self._answered += stopped
            self._last = {i: (beat, arrival + stopped) for i, (beat, arrival) in self._last.items()}


_ending = threading.Lock()  # never released: the first thread prints and ends the process


def _print(verdict: str) -> None:
    _ending.acquire()
    print(f"gptjax: {verdict}\ngptjax: ending; run the same command again", file=sys.stderr)
    sys.stderr.flush()


def _end(verdict: str) -> None:
    """Prints the verdict, posts it to the other processes, and ends this process."""
    _print(verdict)
    distributed.leave(EXIT_CODE, verdict)
    os._exit(EXIT_CODE)
