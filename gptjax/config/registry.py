"""Registries: the implementations that a configuration may name, extensible from outside.

A registry lists gptjax's own names, and the module that registers each, without importing that
module, so a configuration is validated before JAX is loaded. A preset file that names an extension
imports the package that registers it:

    from gptjax.config.registry import OPTIMIZERS

    @OPTIMIZERS.register("sgd")
    class Sgd: ...
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gptjax.errors import ConfigError

Item = TypeVar("Item")


class Registry:
    """Implementations of one kind by name. `option` is the configuration field that names them."""

    def __init__(self, option: str, builtin: Mapping[str, str]) -> None:
        """`builtin` maps each of gptjax's own names to the module that registers it."""
        self.option = option
        self._builtin = builtin
        self._items: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Item], Item]:
        """A decorator that registers a class or a function under a name.

        Raises ValueError if another item has that name.
        """

        def add(item: Item) -> Item:
            module = getattr(item, "__module__", None)
            foreign = self._builtin.get(name, module) != module and hasattr(item, "__module__")
            if foreign or self._items.get(name, item) is not item:
                raise ValueError(f"{self.option}={name}: this name is registered already")
            self._items[name] = item
            return item

        return add

    def names(self) -> list[str]:
        """All registered names, gptjax's own first."""
        return list(dict.fromkeys([*self._builtin, *self._items]))

    def __getitem__(self, name: str) -> Any:
        """The item registered under a name. Raises ConfigError for an unknown name."""
        if name not in self._items and name in self._builtin:
            importlib.import_module(self._builtin[name])
        if name not in self._items:
            raise ConfigError([self.unknown(name)])
        return self._items[name]

    def unknown(self, name: str) -> str:
        """The error message for a name that is not registered."""
        return f"{self.option}={name}: unknown; known: {', '.join(self.names())}"


OPTIMIZERS = Registry(
    "optim.name",
    dict.fromkeys(("adamw", "adafactor", "lion", "muon"), "gptjax.training.optimizer"),
)
ATTENTION_BACKENDS = Registry(
    "compute.attention",
    {
        "splash": "gptjax.model.attention.vendor",
        "cudnn": "gptjax.model.attention.vendor",
        "cudnn_ring": "gptjax.model.attention.cudnn_ring",
        "native": "gptjax.model.attention.native",
        "blockwise": "gptjax.model.attention.blockwise",
        "ring": "gptjax.model.attention.ring",
        "reference": "gptjax.model.attention.reference",
    },
)
DATA_SOURCES = Registry("data.sources", {"tfds": "gptjax.data.sources"})
METRIC_WRITERS = Registry(
    "log.writers",
    dict.fromkeys(("jsonl", "tensorboard"), "gptjax.training.metrics")
    | dict.fromkeys(("wandb", "mlflow", "trackio"), "gptjax.training.trackers"),
)
