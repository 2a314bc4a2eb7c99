"""The models that the device program trains, and a training run on tokens in memory.

Shapes: B sequences, W = T + 1 window length.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import Config, MoeConfig, load
from gptjax.config.phases import Phase
from gptjax.model import decoder
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training import callbacks, objective
from gptjax.training.step import TrainState
from gptjax.training.trainer import Trainer

EOS = 0
DOCUMENT = 300  # tokens of a document, on average


def changed(cfg: Config, **sections: dict[str, Any]) -> Config:
    """A configuration with fields of its sections replaced."""
    parts = {name: replace(getattr(cfg, name), **values) for name, values in sections.items()}
    return replace(cfg, **parts)


def tiny(name: str, **compute: Any) -> Config:
    """A model of a family small enough to be compared with a CPU: gpt2, llama or mixtral."""
    preset = {"gpt2": "gpt2:small", "llama": "llama:llama3_8b", "mixtral": "mixtral:mixtral_8x7b"}
    model: dict[str, Any] = {"layers": 1, "embed": 256, "heads": 4, "vocab_size": 1000}
    model |= {"context": 256, "mlp": 512}
    if name != "gpt2":
        model["kv_heads"] = 2
    if name == "mixtral":
        model["moe"] = MoeConfig(experts=4, top_k=2)
    return changed(
        load(preset[name]),
        model=model,
        compute={"loss_chunks": 1, "remat": "none"} | compute,
        train={"seq_len": 256, "batch_tokens": 4 * 256, "accumulation": 1, "tokens": 100 * 1024},
        optim={"warmup_tokens": 10 * 1024},
        tokenizer={"vocab_size": 1000},
        eval={"batch": 4},
    )


def workload(name: str, *, toy: bool) -> Config:
    """What is timed: gpt2 (124M), llama (1.2B) and mixture (0.5B), each also with "-masked"."""
    family, _, masked = name.partition("-")
    data = {"documents": "mask" if masked else "ignore"}
    if toy:
        tiny_name = {"mixture": "mixtral"}.get(family, family)
        return changed(tiny(tiny_name, dtype="bfloat16"), data=data)
    if family == "gpt2":
        cfg, length, sequences = load("gpt2:small"), 1024, 32
    elif family == "llama":
        cfg, length, sequences = load("llama:llama32_1b"), 4096, 8
    else:
        shape = {"layers": 8, "embed": 1024, "heads": 16, "kv_heads": 4, "mlp": 2816}
        cfg, length, sequences = load("mixtral:mixtral_8x7b"), 2048, 16
        cfg = changed(cfg, model=shape)
    return changed(
        cfg,
        data=data,
        compute={"dtype": "bfloat16", "remat": "none" if family == "gpt2" else "dots"},
        train={
            "seq_len": length,
            "batch_tokens": sequences * length,
            "accumulation": 1,
            "tokens": 10_000 * sequences * length,
        },
        optim={"warmup_tokens": 100 * sequences * length},
    )


def windows(cfg: Config, step: int) -> dict[str, np.ndarray]:
    """A step's batch of random tokens with documents of random lengths."""
    rng = np.random.default_rng([7, step])
    shape = cfg.train.batch, cfg.train.seq_len + 1
    tokens_BW = rng.integers(1, cfg.model.vocab_size, shape, dtype=np.int32)
    tokens_BW[rng.random(shape) < 1 / DOCUMENT] = EOS
    return {"windows_BW": tokens_BW, "lengths_B": np.full(len(tokens_BW), shape[1] - 1, np.int32)}


class MemoryTask:
    """Next-token prediction on `windows`."""

    lr_multipliers = None

    def __init__(self, cfg: Config) -> None:
        self._cfg, self._loss = cfg, objective.training_loss(cfg, EOS)

    def init(self, key: jax.Array) -> Any:
        return decoder.init(self._cfg.model, key)

    def starting_state(self) -> None:
        return None

    def loss_fn(self, phase: Phase) -> Any:
        return self._loss

    def abstract_batch(self, phase: Phase) -> Any:
        return objective.abstract_batch(self._cfg, phase)

    def batches(self, first: int, last: int) -> Iterator[Any]:
        return (windows(self._cfg, step) for step in range(first, last))

    def to_model_params(self, params: Any) -> Any:
        return params


class Clock(callbacks.Callback):
    """Notes when each step's metrics arrived, and its loss."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_metrics(self, step: int, metrics: dict[str, float], timer: Any) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(metrics["loss"])

    def median(self) -> float:
        """Seconds of a step, the median without the first two."""
        return float(np.median(np.diff(self.times)[1:]))


def train(
    cfg: Config, steps: int, folder: Path, *, save: int = 0, more: tuple[Any, ...] = ()
) -> tuple[TrainState, Clock, Any]:
    """Trains so many steps on the ambient mesh, from the newest checkpoint in the folder.

    With `save`, saves every so many steps. Returns the state, the times and the compiled step.
    """
    cfg = changed(cfg, train={"tokens": steps * cfg.train.batch_tokens})
    watchdog, quiet, clock = Watchdog(cfg.watch), Progress(shown=False), Clock()
    checkpointer = Checkpointer(folder, cfg.checkpoint if save else None)
    todo: list[Any] = [clock, *more]
    if save:
        todo.append(callbacks.Save(save, checkpointer, watchdog, quiet))
    trainer = Trainer(cfg, MemoryTask(cfg), checkpointer, todo, watchdog=watchdog, progress=quiet)
    state = trainer.fit()
    return jax.block_until_ready(state), clock, trainer._step_fn


def emptied(folder: Path) -> Path:
    """A folder that does not exist any more."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
