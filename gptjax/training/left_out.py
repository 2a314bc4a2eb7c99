"""The steps that a run leaves out: told beforehand (train.leave_out), or after a spike.

RUN/left_out.json   all of them, each range with the rewind that added it, if one did

A step that is left out changes no parameter and no moment of the optimizer; its batch is passed
over, and the learning-rate schedule goes on. So every other step has the batch that it would have
had, and a run that left steps out after a spike has the bits of one that was told beforehand.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from gptjax import bucket
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.listing import LEFT_OUT
from gptjax.config.ranges import Range, parse
from gptjax.errors import DataError
from gptjax.runtime import distributed
from gptjax.training.step import TrainState


@dataclass(frozen=True)
class Rewind:
    """A return to the checkpoint of step `to`, for what was seen at a step."""

    step: int
    why: str
    to: int

    def __str__(self) -> str:
        return f"step {self.step} ({self.why}), back to step {self.to}"


@dataclass(frozen=True)
class Entry:
    """Steps first..last, counted from 1, that are left out."""

    first: int
    last: int
    rewind: Rewind | None = None


def advance(state: TrainState) -> TrainState:
    """The state after a step that is left out. To be jitted, with the state donated."""
    rate = state.opt_state["rate"]
    opt_state = state.opt_state | {"rate": rate._replace(count=rate.count + 1)}
    return replace(state, step=state.step + 1, opt_state=opt_state)


class LeftOut:
    """The steps that a run leaves out, in its file too."""

    def __init__(self, run: str, given: Sequence[str] = ()) -> None:
        """Reads what the run has, and adds the ranges that are given. Raises DataError."""
        self._file = bucket.path_of(run) / LEFT_OUT
        self.entries = self._read()
        for first, last in parse(given):
            if not any(one.first <= first and last <= one.last for one in self.entries):
                self.entries.append(Entry(first, last))

    def _read(self) -> list[Entry]:
        if not self._file.exists():
            return []
        try:
            entries = []
            for one in json.loads(self._file.read_text()):
                rewind = Rewind(**one["rewind"]) if one["rewind"] else None
                entries.append(Entry(int(one["first"]), int(one["last"]), rewind))
            return entries
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self._file}: is damaged ({error}); put it back") from None

    def record(self) -> None:
        """Writes the file, by process 0. Raises OutputError."""
        if self.entries and distributed.first():
            run_dir.write_json(self._file, [asdict(one) for one in self.entries])
        distributed.barrier()

    def __contains__(self, step: int) -> bool:
        return any(one.first <= step <= one.last for one in self.entries)

    @property
    def rewinds(self) -> list[Rewind]:
        """The rewinds of the run, in their order."""
        return [one.rewind for one in self.entries if one.rewind]

    def up_to(self, step: int) -> list[Range]:
        """What a checkpoint of a step has left out: ranges without a gap or an overlap."""
        merged: list[Range] = []
        for first, last in sorted((one.first, min(one.last, step)) for one in self.entries):
            if first > step:
                continue
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(merged[-1][1], last)
            else:
                merged.append((first, last))
        return merged

    def is_stale(self, meta: dict[str, Any]) -> bool:
        """Whether a checkpoint of these metadata has steps that a rewind leaves out."""
        then = [tuple(one) for one in meta.get("left_out", ())]
        covered = lambda one: any(
            a <= one.first and min(one.last, meta["step"]) <= b for a, b in then
        )
        return any(
            one.rewind and one.first <= meta["step"] and not covered(one) for one in self.entries
        )


advanced = jax.jit(advance, donate_argnums=0)
