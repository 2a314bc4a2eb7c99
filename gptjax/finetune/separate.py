"""Checkpoints of what learns alone, beside a base that lies elsewhere.

Of a run with adapters that is a hundredth of the bytes. Each has a digest of the frozen parameters
that it was trained beside, so it is not restored beside others.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from gptjax import parameters, run, sharding
from gptjax.checkpoint import Checkpoints, fingerprints, leaves_by_path, sha256_of
from gptjax.config import Config
from gptjax.errors import CheckpointError, ConfigError, MismatchError
from gptjax.finetune import recipe, start
from gptjax.model.decoder import Params
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

    def restore_learnt(self, abstract: Tree, part: str) -> tuple[Tree, int] | None:
        """What learns of the newest one, its subtree `part`, and the step; None if none exists.

        `abstract` is of that alone. Raises as Checkpoints.restore_newest does.
        """
        step = sharding.abstract(lambda: jax.numpy.int32(0))
        restored = super().restore_newest({"step": step, part: abstract}, partial=True)
        return None if restored is None else (restored[part], int(restored["step"]))

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


def restore_params(folder: str, cfg: Config, say: Callable[[str], None]) -> tuple[Params, int]:
    """The model's parameters of a run with adapters, merged, and their step: as
    `run.restore_params`, which calls it. Raises what `restore` raises.
    """
    learnt, step = restore(folder, cfg, say)
    merge = jax.jit(lambda tree: start.plain(cfg, tree))
    return merge(learnt), step


def restore(folder: str, cfg: Config, say: Callable[[str], None]) -> tuple[Tree, int]:
    """The tree that training took of a run with adapters, and its step; the moving average where
    the run keeps one.

    Raises ConfigError where the base is not where the run says, MismatchError where it has changed,
    CheckpointError where there is no checkpoint.
    """
    try:
        base = recipe.base_of(cfg.finetune.base)
    except ConfigError as error:
        raise ConfigError(
            [f"{folder}: its adapters go with a base: {problem}" for problem in error.problems]
        ) from None
    factors = start.factors(cfg)
    assert factors is not None
    make = jax.jit(lambda given: start.tree(cfg, given))
    begun = make(start.params(cfg, base, lambda line: None))
    frozen = parameters.split(begun, factors)[1]
    checkpoints = SeparateCheckpoints(
        Path(folder) / run.CHECKPOINTS, say=say, factors=factors, frozen=lambda: frozen
    )
    learning = parameters.split(start.abstract(cfg), factors)[0]
    restored = checkpoints.restore_learnt(learning, "ema" if cfg.train.ema_decay else "params")
    if restored is None:
        raise CheckpointError(f"{folder}: this run has no checkpoint yet")
    learnt, step = restored
    return parameters.joined(frozen, learnt), step
