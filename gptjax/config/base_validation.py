"""Validation of what a run takes from another model: warm starts, fine-tuning, adapters.

Problems are told as in validation.py.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any


def start_problems(cfg: Any) -> Iterator[str]:
    """Problems of a warm start's fields together."""
    start = cfg.start
    if start.base and cfg.finetune.task != "none":
        yield f"start.base={start.base}: only used by `gptjax train`; leave it out"
    if start.optimizer and not start.base:
        yield "start.optimizer=True: requires start.base, the run to go on from"
    if start.optimizer and start.base.startswith("hf:"):
        yield "start.optimizer=True: a Hugging Face folder has no optimizer state; set it to False"
    if start.keep_step and not start.optimizer:
        yield "start.keep_step=True: requires start.optimizer=True"


def finetune_problems(cfg: Any) -> Iterator[str]:
    """Problems of fine-tuning and adapters, and of their fields in a pre-training."""
    tune = cfg.finetune
    if tune.task == "none":
        defaults = vars(type(tune)())
        for name, value in vars(tune).items():
            if value != defaults[name]:
                yield f"finetune.{name}={value}: only used by `gptjax finetune`; leave it out"
    yield from tune_problems(tune, cfg.model, "finetune")
    yield from lora_problems(tune.lora, "finetune.lora")


def tune_problems(tune: Any, model: Any, option: str) -> Iterator[str]:
    """Problems of a TuneConfig; `option` is its dotted name."""
    yield from _pattern_problems(tune.freeze, f"{option}.freeze")
    if not 0 <= tune.freeze_layers <= model.layers:
        yield (
            f"{option}.freeze_layers={tune.freeze_layers}: must be at least 0 and at most "
            f"model.layers={model.layers}"
        )
    if not 0 < tune.layer_decay <= 1:
        yield f"{option}.layer_decay={tune.layer_decay}: must be above 0 and at most 1"


def lora_problems(lora: Any, option: str) -> Iterator[str]:
    """Problems of a LoraConfig; `option` is its dotted name."""
    if lora.rank < 0:
        yield f"{option}.rank={lora.rank}: must not be negative"
    if lora.rank == 0 and lora != type(lora)():
        yield f"{option}.rank=0: there are no adapters, yet other fields of it are set; give a rank"
    if not lora.alpha > 0:
        yield f"{option}.alpha={lora.alpha}: must be above 0"
    if not lora.targets:
        yield f"{option}.targets=(): give at least one, such as blocks/.*/attn/(q|v)"
    yield from _pattern_problems(lora.targets, f"{option}.targets")


def _pattern_problems(patterns: Sequence[str], option: str) -> Iterator[str]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{option}={pattern}: not a regular expression: {error}"
