"""Checkpoints of what learns alone, beside a base that lies elsewhere.

Of a run with adapters that is a hundredth of the bytes. Each has a digest of the frozen parameters
that it was trained beside, so it is not restored beside others.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gptjax import parameters
from gptjax.checkpoint import Checkpoints, fingerprints, leaves_by_path, sha256_of
from gptjax.errors import MismatchError
from gptjax.parameters import Factors, Tree
from gptjax.train import TrainState


class SeparateCheckpoints(Checkpoints):
    """As Checkpoints, which take and give whole states; the frozen part is given, and not saved.

    Reading the newest raises MismatchError where it was written beside other frozen parameters.
    """

    def __init__(self, *args: Any, factors: Factors, frozen: Callable[[], Tree], **kwargs: Any):
        """`frozen()` makes the frozen part anew on the mesh, for a step donates what it is given;
        the other arguments are those of Checkpoints."""
        super().__init__(*args, **kwargs)
        self._factors, self._frozen = factors, frozen
        self._digest = _digest(frozen())
        describe = self._describe
        self._describe = lambda step: {**describe(step), "frozen": self._digest}

    def save(self, step: int, state: TrainState) -> None:
        super().save(step, self._learning(state))

    def restore_newest(self, abstract: TrainState, *, partial: bool = False) -> TrainState | None:
        restored = super().restore_newest(self._learning(abstract), partial=partial)
        if restored is None:
            return None
        return replace(restored, params=parameters.joined(self._frozen(), restored.params))

    def _learning(self, state: TrainState) -> TrainState:
        return replace(state, params=parameters.split(state.params, self._factors)[0])

    def _restore(self, step: int, abstract: Any, partial: bool) -> Any:
        if (saved := self.meta(step).get("frozen")) != self._digest:
            raise MismatchError(
                f"{self.folder / str(step)}: was trained beside other frozen parameters (digest "
                f"{str(saved)[:12]}, here {self._digest[:12]}); give the base that it began from"
            )
        return super()._restore(step, abstract, partial)


def _digest(frozen: Tree) -> str:
    return sha256_of(fingerprints(leaves_by_path(frozen)))
