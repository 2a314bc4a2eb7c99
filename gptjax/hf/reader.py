"""The declaration of a model family, and a reader of `config.json` that records the keys used."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptjax.config import ModelConfig
from gptjax.errors import DataError, MismatchError
from gptjax.hf.mapping import TensorMapping

Json = dict[str, Any]

BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
"""Parts of the names of buffers that older checkpoints hold beside the parameters."""


@dataclass(frozen=True)
class Family:
    """A `model_type` of `transformers`: its configuration both ways, and its tensors.

    `architecture` is its class for causal language modelling. `prefix` begins the names of its
    tensors in a full checkpoint, and is absent from those of the bare model. Tensors whose name has
    one of `ignored` in it hold no parameter.
    """

    architecture: str
    prefix: str
    to_model: Callable[["ConfigReader"], ModelConfig]
    to_config: Callable[[ModelConfig], Json]
    mappings: Callable[[ModelConfig], list[TensorMapping]]
    ignored: tuple[str, ...] = ()

    @property
    def classifier(self) -> str:
        """The class for sequence classification: score.weight in place of the output layer."""
        for ending in ("LMHeadModel", "ForCausalLM"):
            name = self.architecture.removesuffix(ending)
            if name != self.architecture:
                return f"{name}ForSequenceClassification"
        raise ValueError(self.architecture)


class ConfigReader:
    """Values of a config.json, which records the keys that are asked for.

    `location` names the file in messages; `nested` holds the readers of objects within it.
    """

    def __init__(self, values: Json, location: str) -> None:
        self.values, self.location = values, location
        self.used: set[str] = set()
        self.nested: dict[str, ConfigReader] = {}

    def unused(self) -> set[str]:
        """Keys that were never asked for, those of nested objects with a dot."""
        nested = {f"{name}.{key}" for name, r in self.nested.items() for key in r.unused()}
        return set(self.values) - self.used | nested

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, `default` where it is absent or null."""
        self.used.add(name)
        value = self.values.get(name, default)
        return default if value is None else value

    def require(self, name: str) -> Any:
        """The value of a key. Raises DataError where it is absent or null."""
        value = self.get(name)
        if value is None:
            raise DataError(f"{self.location}: has no {name}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """The value of a key that is true or false. Raises DataError."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise DataError(f"{self.location}: {name}={value!r:.100}: must be true or false")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The value of a number's key, required without a default. Raises DataError."""
        value = self.require(name) if default is None else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"{self.location}: {name}={value!r:.100}: must be a number")
        return float(value)

    def object_of(self, name: str) -> Json:
        """The object of a key, empty where it is absent or null. Raises DataError."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise DataError(f"{self.location}: {name}={value!r:.100}: must be an object")
        return value

    def one_of(self, name: str, *supported: Any, default: Any = None) -> Any:
        """The value of a key. Raises MismatchError unless it is one of those supported."""
        value = self.get(name, default)
        if value not in supported:
            raise MismatchError(
                f"{self.location}: {name}={value!r}: not supported; supported: "
                f"{', '.join(map(repr, supported))}"
            )
        return value


def unless_default(value: Any, default: Any) -> Any:
    """None where a field has its default, so that equal models have equal configurations."""
    return None if value == default else value
