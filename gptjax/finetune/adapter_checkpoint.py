"""Checkpoints of what learns alone, beside a base that lies elsewhere.

Of a run with adapters that is a hundredth of the bytes. Each has a digest of the frozen parameters
that it was trained beside, so it is not restored beside others.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer, fingerprints, leaves_by_path, sha256_of
from gptjax.config import Config
from gptjax.errors import CheckpointError, ConfigError, MismatchError
from gptjax.finetune import params as base_params
from gptjax.finetune.base_model import Base, base_of, pinned
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.param_tree import Tree
from gptjax.training import param_groups
from gptjax.training.param_groups import LrMultipliers

BASE_STEP = "base step"  # in RUN/finetune.json: the checkpoint of the base that adapters go with


class SeparateCheckpoints(Checkpointer):
    """As Checkpoints, which take and give whole states; the frozen part is given, and not saved.

    Reading the newest raises MismatchError where it was written beside other frozen parameters.
    """

    def __init__(
        self, *args: Any, lr_multipliers: LrMultipliers, frozen: Callable[[], Tree], **kwargs: Any
    ):
        """`frozen()` makes the frozen part on the mesh, where there is a checkpoint to restore; the
        other arguments are those of Checkpoints."""
        super().__init__(*args, **kwargs)
        self._factors, self._frozen = lr_multipliers, frozen
        self._digest: str | None = None
        describe = self._describe
        self._describe = lambda step: {**describe(step), "frozen": self._digest}

    def save(self, step: int, state: Any) -> None:
        learning, frozen = param_groups.partition(state.params, self._factors)
        self._digest = self._digest or _digest(frozen)
        super().save(step, replace(state, params=learning))

    def restore_newest(self, abstract: Any, *, partial: bool = False) -> Any | None:
        learning, _ = param_groups.partition(abstract.params, self._factors)
        restored, frozen = self._beside(replace(abstract, params=learning), partial)
        if restored is None:
            return None
        return replace(restored, params=param_groups.combine(frozen, restored.params))

    def restore_tree(self, abstract: Tree, part: str) -> tuple[Tree, int] | None:
        """The tree that training took, of the newest one, and its step; None if none exists.

        `part` is the state's that learnt: "params", or "ema".
        """
        step = sharding.abstract(lambda: jax.numpy.int32(0))
        learning, _ = param_groups.partition(abstract, self._factors)
        restored, frozen = self._beside({"step": step, part: learning}, True)
        if restored is None:
            return None
        return param_groups.combine(frozen, restored[part]), int(restored["step"])

    def _beside(self, learning: Any, partial: bool) -> tuple[Any, Tree]:
        """What learnt of the newest one, or None, and the frozen part."""
        if not self.steps():
            return super().restore_newest(learning, partial=partial), {}
        frozen = self._frozen()
        self._digest = _digest(frozen)
        return super().restore_newest(learning, partial=partial), frozen

    def _restore(self, step: int, abstract: Any, partial: bool) -> Any:
        if (saved := self.meta(step).get("frozen")) != self._digest:
            raise MismatchError(
                f"{self.folder / str(step)}: was trained beside other frozen parameters (digest "
                f"{str(saved)[:12]}, here {str(self._digest)[:12]}): its base has changed"
            )
        return super()._restore(step, abstract, partial)


def _digest(frozen: Tree) -> str:
    return sha256_of(fingerprints(leaves_by_path(frozen)))


def restore_params(
    folder: str, cfg: Config, say: Callable[[str], None] = lambda line: None
) -> tuple[Params, int]:
    """As `run.restore_params`; adapters merged into their base. Raises as that and `restore` do."""
    if not cfg.finetune.lora.rank:
        return run_dir.restore_params(folder, cfg, say)
    tree, step = restore(folder, cfg, say)
    return base_params.plain(cfg, tree), step


def restore(folder: str, cfg: Config, say: Callable[[str], None]) -> tuple[Tree, int]:
    """The tree that training took of a run with adapters, and its step; the moving average where
    the run keeps one.

    Raises ConfigError where the base is not where the run says, CheckpointError where its
    checkpoint or the run's is not there, MismatchError where the base has changed.
    """
    try:
        base = base_of(cfg.finetune.base)
    except ConfigError as error:
        raise ConfigError(
            [
                f"{folder}: its adapters go with finetune.base={cfg.finetune.base}, which its "
                f"config.json may name anew: {problem}"
                for problem in error.problems
            ]
        ) from None
    base = pinned(base, run_dir.examples_of(folder).get(BASE_STEP))
    lr_multipliers = base_params.lr_multipliers(cfg)
    assert lr_multipliers is not None
    checkpoints = SeparateCheckpoints(
        Path(folder) / run_dir.CHECKPOINTS,
        say=say,
        lr_multipliers=lr_multipliers,
        frozen=lambda: frozen_of(cfg, base, lr_multipliers, say),
    )
    part = "ema" if cfg.train.ema_decay else "params"
    if (restored := checkpoints.restore_tree(base_params.abstract(cfg), part)) is None:
        raise CheckpointError(f"{folder}: this run has no checkpoint yet")
    return restored


def frozen_of(
    cfg: Config, base: Base, lr_multipliers: LrMultipliers, say: Callable[[str], None]
) -> Tree:
    """What does not learn of the tree that training takes."""
    return param_groups.partition(
        base_params.tree(cfg, base_params.params(cfg, base, say)), lr_multipliers
    )[1]
