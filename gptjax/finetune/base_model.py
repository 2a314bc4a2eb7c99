"""The base of a fine-tuned run: the model whose parameters it starts from."""

from collections.abc import Callable
from typing import Protocol

from gptjax.config import Config
from gptjax.errors import ConfigError, DataError
from gptjax.finetune.tokenize import check_vocab_size
from gptjax.model.decoder import Params
from gptjax.tokenizer import Tokenizer

BASE_STEP = "base step"
"""The key in RUN/finetune.json of the base's checkpoint that a run's adapters go with."""


class BaseModel(Protocol):
    """A model on disk, of which only the configuration and the tokenizer have been read."""

    @property
    def path(self) -> str:
        """A run folder, or hf:FOLDER."""

    @property
    def cfg(self) -> Config:
        """Its configuration; of a Hugging Face folder, one that has its model and tokenizer."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, if it has one."""

    @property
    def step(self) -> int | None:
        """The checkpoint to read; None: the newest valid one, or there are no checkpoints."""

    def at_step(self, step: int | None) -> "BaseModel":
        """The same base at a checkpoint; None: at its newest. A Hugging Face folder has but one."""

    def read_params(self, say: Callable[[str], None]) -> tuple[Params, int | None]:
        """The parameters on the ambient mesh, and their step. Raises CheckpointError."""


def tokenizer_of(base: BaseModel) -> Tokenizer:
    """The base's tokenizer. Raises DataError where it has none."""
    if base.tokenizer is None:
        raise DataError(f"{base.path}: has no tokenizer, which fine-tuning needs")
    return base.tokenizer


def check_base(base: BaseModel) -> None:
    """Raises ConfigError or DataError for a model that cannot be fine-tuned."""
    if base.cfg.finetune.lora.rank:
        raise ConfigError(
            [f"{base.path}: has adapters beside a base; merge them: gptjax convert {base.path} NEW"]
        )
    check_vocab_size(tokenizer_of(base), base.cfg.model.vocab_size)
