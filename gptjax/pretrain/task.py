"""The pre-training task: what the training loop has to know of it (training/task.py)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from gptjax.config import Config, phases
from gptjax.config.phases import Phase
from gptjax.data import loader
from gptjax.data.mixture import Manifests
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.parallel import arrays, pipeline
from gptjax.param_tree import Tree
from gptjax.pretrain.warm_start import WarmStart
from gptjax.training import objective
from gptjax.training.param_groups import LrMultipliers
from gptjax.training.step import LossFn, TrainState


class PretrainTask:
    """Next-token prediction on the training split of a prepared store.

    In an interleaved pipeline schedule the training tree has the layers in the pipeline's order.
    """

    lr_multipliers: LrMultipliers | None = None

    def __init__(
        self,
        cfg: Config,
        data: loader.TrainData,
        manifests: Manifests,
        start: WarmStart | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """With `start`, of a run that begins with parameters of another."""
        self._start, self._say = start, say
        self._cfg, self._data, self._manifests = cfg, data, manifests
        periods = cfg.model.layers // len(cfg.model.pattern)
        self._order: list[int] = pipeline.order(periods, cfg.compute.rounds).tolist()

    @property
    def layer_order(self) -> list[int] | None:
        """The model's layer (of a pattern: period) at each place of the tree; None: the same."""
        return None if self._order == sorted(self._order) else self._order

    def init(self, key: jax.Array) -> Tree:
        return self._reordered(decoder.init(self._cfg.model, key), self._order)

    def starting_state(self) -> TrainState | None:
        if self._start is None:
            return None
        place = lambda params: self._reordered(params, self._order)
        return self._start.state(self.layer_order, place, self._say)

    def loss_fn(self, phase: Phase) -> LossFn:
        cfg = replace(self._cfg, model=phases.model_of(self._cfg, phase.stage))
        return objective.training_loss(cfg, self._manifests.eos_id, self._manifests.start_id)

    def abstract_batch(self, phase: Phase) -> Any:
        return objective.abstract_batch(self._cfg, phase)

    def batches(self, first: int, last: int) -> Iterator[Any]:
        sizes = {phase.batch for phase in self._data.phases}
        rows_of = {size: arrays.host_rows(size) for size in sizes}
        batches = self._data.batches(first, last, rows_of, self._cfg.data.prefetch)
        return (vars(batch) for batch in batches)

    def to_model_params(self, params: Tree) -> Params:
        return self._reordered(params, np.argsort(self._order).tolist())

    def _reordered(self, params: Tree, order: list[int]) -> Tree:
        if self.layer_order is None:
            return params
        return params | {"blocks": pipeline.reordered(params["blocks"], order)}
