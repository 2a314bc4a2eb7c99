"""The base class of fine-tuning tasks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Config
from gptjax.config.phases import Phase
from gptjax.data.permutation import Order
from gptjax.finetune import params as base_params
from gptjax.finetune.base_model import BaseModel
from gptjax.model import heads
from gptjax.model.decoder import Params
from gptjax.parallel import arrays, sharding
from gptjax.param_tree import Tree
from gptjax.runtime.progress import Progress
from gptjax.training.callbacks import Evaluator
from gptjax.training.step import LossFn, TrainState, state_of


class Rows(Protocol):
    """Tokenized examples, as rows of one length."""

    @property
    def cut(self) -> int:
        """How many examples were too long and lost a part."""

    def __len__(self) -> int:
        """Number of rows."""

    def take(self, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        """The rows of these numbers, by the names of the arrays of a batch."""


RowsT = TypeVar("RowsT", bound=Rows)


class FinetuneTask(ABC, Generic[RowsT]):
    """A task that starts from a base model and is trained on rows; see training/task.py.

    A subclass gives the loss on the model's parameters, and the evaluators.
    """

    def __init__(
        self,
        cfg: Config,
        base: BaseModel,
        rows: Mapping[str, RowsT],
        loss: LossFn,
        say: Callable[[str], None],
    ) -> None:
        """`rows` of "train" and "valid"; `loss` takes the model's parameters. Raises ConfigError
        for patterns of parameters that match nothing.
        """
        self.cfg, self.base, self.rows = cfg, base, rows
        self._loss, self._say = loss, say
        self.lr_multipliers = base_params.lr_multipliers(cfg)
        self._order = Order(len(rows["train"]), cfg.train.batch, cfg.train.seed)

    def init(self, key: jax.Array) -> Tree:
        return base_params.training_tree(self.cfg, heads.init_params(self.cfg, key))

    def starting_state(self) -> TrainState | None:
        tree = base_params.starting_tree(self.cfg, self.base, self._say)
        return state_of(self.cfg, tree, self.lr_multipliers)

    def loss_fn(self, phase: Phase) -> LossFn:
        return lambda params, *rest: self._loss(self.to_model_params(params), *rest)

    def abstract_batch(self, phase: Phase) -> Any:
        mesh, batch = jax.sharding.get_mesh(), phase.batch

        def abstract(row: np.ndarray) -> jax.ShapeDtypeStruct:
            axes = sharding.spec("batch", *[None] * (row.ndim - 1))
            layout = jax.NamedSharding(mesh, axes)
            return jax.ShapeDtypeStruct((batch, *row.shape[1:]), jnp.int32, sharding=layout)

        return jax.tree.map(abstract, dict(self.rows["train"].take(np.arange(1))))

    def batches(self, first: int, last: int) -> Iterator[Any]:
        own = arrays.host_rows(self.cfg.train.batch)
        return (self.rows["train"].take(self._order.ids(step, own)) for step in range(first, last))

    def to_model_params(self, params: Tree) -> Params:
        return base_params.model_params(self.cfg, params)

    @abstractmethod
    def evaluators(self, progress: Progress) -> list[tuple[int, Evaluator]]:
        """Evaluators on the validation rows, each with its period in steps."""

    def report(self, progress: Progress) -> Mapping[str, Any]:
        """Details of the last evaluation, to be kept in the run; shows the main ones."""
        return {}
