"""Adapter checkpoints: the trainable part of the training tree alone, beside a base kept elsewhere.

They take a hundredth of the bytes. Each has a digest of the frozen parameters that it was trained
beside, and is not restored beside others.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.checkpoint.fingerprint import fingerprints, sha256_of
from gptjax.config import Config
from gptjax.errors import MismatchError
from gptjax.finetune import params as base_params
from gptjax.finetune.base_model import BaseModel
from gptjax.parallel import sharding
from gptjax.param_tree import Tree, leaves_by_path
from gptjax.training import param_groups
from gptjax.training.param_groups import LrMultipliers


class AdapterCheckpointer(Checkpointer):
    """A Checkpointer of whole states that saves their trainable part only.

    Restoring raises MismatchError where the checkpoint was written beside other frozen parameters.
    """

    def __init__(
        self, *args: Any, lr_multipliers: LrMultipliers, frozen: Callable[[], Tree], **kwargs: Any
    ) -> None:
        """`frozen()` makes the frozen part on the mesh, when there is a checkpoint to restore; the
        other arguments are those of Checkpointer.
        """
        super().__init__(*args, **kwargs)
        self._lr_multipliers, self._frozen = lr_multipliers, frozen
        self._digest: str | None = None
        describe = self._describe
        self._describe = lambda step: {**describe(step), "frozen": self._digest}

    def save(self, step: int, state: Any, *, local: bool = False) -> None:
        trainable, frozen = param_groups.partition(state.params, self._lr_multipliers)
        self._digest = self._digest or _digest(frozen)
        super().save(step, replace(state, params=trainable), local=local)

    def restore_newest(self, abstract: Any, *, partial: bool = False) -> Any | None:
        trainable, _ = param_groups.partition(abstract.params, self._lr_multipliers)
        restored, frozen = self._with_frozen(replace(abstract, params=trainable), partial)
        if restored is None:
            return None
        return replace(restored, params=param_groups.combine(frozen, restored.params))

    def restore_tree(self, abstract: Tree, part: str) -> tuple[Tree, int] | None:
        """The training tree of the newest valid checkpoint, and its step; None if there is none.

        `part` is the subtree of the state to take: "params", or "ema".
        """
        step = sharding.abstract(lambda: jax.numpy.int32(0))
        trainable, _ = param_groups.partition(abstract, self._lr_multipliers)
        restored, frozen = self._with_frozen({"step": step, part: trainable}, True)
        if restored is None:
            return None
        return param_groups.combine(frozen, restored[part]), int(restored["step"])

    def _with_frozen(self, trainable: Any, partial: bool) -> tuple[Any, Tree]:
        """The trainable part of the newest valid checkpoint, or None, and the frozen part."""
        if not self.steps():
            return super().restore_newest(trainable, partial=partial), {}
        frozen = self._frozen()
        self._digest = _digest(frozen)
        return super().restore_newest(trainable, partial=partial), frozen

    def _restore(self, step: int, abstract: Any, partial: bool) -> Any:
        if (saved := self.meta(step).get("frozen")) != self._digest:
            raise MismatchError(
                f"{self.folder / str(step)}: was trained beside other frozen parameters (digest "
                f"{str(saved)[:12]}, here {str(self._digest)[:12]}): its base has changed"
            )
        return super()._restore(step, abstract, partial)


def _digest(frozen: Tree) -> str:
    return sha256_of(fingerprints(leaves_by_path(frozen)))


def frozen_part(
    cfg: Config, base: BaseModel, lr_multipliers: LrMultipliers, say: Callable[[str], None]
) -> Tree:
    """The frozen part of the training tree, read from the base."""
    tree = base_params.starting_tree(cfg, base, say)
    return param_groups.partition(tree, lr_multipliers)[1]
