"""The contract between a training task and the training loop."""

from collections.abc import Iterator
from typing import Any, Protocol

import jax

from gptjax.config.phases import Phase
from gptjax.model.decoder import Params
from gptjax.param_tree import Tree
from gptjax.training.param_groups import LrMultipliers
from gptjax.training.step import LossFn, TrainState


class Task(Protocol):
    """A model to train, its loss and its batches: all that the loop has to know of them.

    The training tree is what the optimizer sees. It may differ from the model's parameters: layers
    in a pipeline's order, adapters beside a frozen base. `to_model_params` alone knows how.
    """

    lr_multipliers: LrMultipliers | None
    """Which leaves of the training tree are trainable, and how fast; None: all of them alike."""

    def init(self, key: jax.Array) -> Tree:
        """A freshly drawn training tree. Traced: it gives the state's shapes and layouts too."""

    def starting_state(self) -> TrainState | None:
        """The state to start from, read from elsewhere; None: the one that `init` draws."""

    def loss_fn(self, phase: Phase) -> LossFn:
        """The loss of a phase of the run (config/phases.py)."""

    def abstract_batch(self, phase: Phase) -> Any:
        """Shapes and layouts of a whole batch of a phase on the ambient mesh."""

    def batches(self, first: int, last: int) -> Iterator[Any]:
        """This process's rows, as host arrays, of the batches of steps first..last-1, from 0 on."""

    def to_model_params(self, params: Tree) -> Params:
        """The model's parameters in the model's order: for evaluation, sampling and export."""
