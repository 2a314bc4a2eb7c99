"""A family's declaration, and a reader of `config.json` that knows which keys were read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptjax.config import ModelConfig
from gptjax.errors import DataError, MismatchError
from gptjax.hf.mapping import TensorMapping

Json = dict[str, Any]

BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
"""Parts of names of tensors that older checkpoints hold and that are no parameters."""


@dataclass(frozen=True)
class Family:
    """A `model_type`. `ignored` are parts of names of tensors that hold no parameter."""

    architecture: str
    prefix: str
    to_model: Callable[["Reader"], ModelConfig]
    to_config: Callable[[ModelConfig], Json]
    pieces: Callable[[ModelConfig], list[TensorMapping]]
    ignored: tuple[str, ...] = ()

    @property
    def classifier(self) -> str:
        """The architecture with a layer of scores, score.weight, in place of the output layer."""
        for ending in ("LMHeadModel", "ForCausalLM"):
            name = self.architecture.removesuffix(ending)
            if name != self.architecture:
                return f"{name}ForSequenceClassification"
        raise ValueError(self.architecture)


class Reader:
    """Values of a config.json, remembering which were asked for."""

    def __init__(self, values: Json, place: str) -> None:
        self.values, self.place = values, place
        self.read: set[str] = set()
        self.inner: dict[str, Reader] = {}

    def unread(self) -> set[str]:
        """Keys that nobody asked for, those of inner objects with a dot."""
        inner = {f"{name}.{key}" for name, r in self.inner.items() for key in r.unread()}
        return set(self.values) - self.read | inner

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.values.get(name, default)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise DataError(f"{self.place}: has no {name}")
        return value

    def demand(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """The value, which must be one that can be represented here."""
        value = self.get(name, default)
        if value not in allowed:
            raise MismatchError(
                f"{self.place}: {name}={value!r} has no counterpart here (known: "
                f"{', '.join(map(repr, allowed))})"
            )
        return value


def unless_default(value: Any, default: Any) -> Any:
    """None where a field has its default, so that equal models are equal."""
    return None if value == default else value
