"""Throughput, MFU (model FLOPs utilisation), and the writers of metrics.

A metric has one name everywhere: loss, perplexity, grad_norm, param_norm, lr, tokens_per_second,
data_wait (share of the wall time that the loop waited for a batch), mfu, …
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax

from gptjax.config import Config
from gptjax.config.registry import METRIC_WRITERS
from gptjax.model.flops import ModelCost
from gptjax.runtime import distributed, hardware

METRICS_FILE = "metrics.jsonl"


class Throughput:
    """Tokens per second and, where a peak is known, the model-FLOPs utilisation.

    MFU = tokens/s * FLOPs/token / (devices * peak), where FLOPs/token is what the model needs
    (`flops.ModelCost.flops_per_token`): of causal attention the causal half, no recomputation.
    """

    def __init__(self, flops_per_token: float, dtype: str, peak_tflops: float) -> None:
        """`peak_tflops` of one device; 0 looks it up, for bfloat16, in runtime/hardware.py."""
        self._flops = flops_per_token
        kind = jax.devices()[0].device_kind
        peak = peak_tflops
        if not peak and dtype == "bfloat16" and (device := hardware.find(kind)):
            peak = device.tflops
        self._peak = peak * 1e12 * jax.device_count()
        self.description = (
            f"MFU = tokens/s x {self._flops:.4g} FLOPs/token / "
            f"({jax.device_count()} x {peak:g} TFLOP/s)"
            if peak
            else f"no peak known for {dtype} on {kind}, so no MFU; log.peak_tflops sets one"
        )

    def of(self, tokens_per_second: float) -> dict[str, float]:
        """The metrics of a rate."""
        metrics = {"tokens_per_second": tokens_per_second}
        if self._peak:
            metrics["mfu"] = tokens_per_second * self._flops / self._peak
        return metrics


def throughput(cfg: Config) -> Throughput:
    """The throughput of a configured run."""
    flops = ModelCost(cfg.model).flops_per_token(cfg.train.seq_len)
    return Throughput(flops, cfg.compute.dtype, cfg.log.peak_tflops)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class Writer(Protocol):
    """A place that metrics are written to; made with the run folder and the step it resumes after.

    Further ones are registered in config/registry.py's METRIC_WRITERS and named in log.writers.
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step."""

    def close(self) -> None:
        """Flushes and ends."""


@METRIC_WRITERS.register("jsonl")
class JsonlWriter:
    """metrics.jsonl: one object a line, with its step.

    A resume drops the lines that it writes again: those after its first step, and what was measured
    at that step but its training loss.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        file = folder / METRICS_FILE
        entries = [(json.loads(line), line) for line in _lines(file)]
        kept = [
            line
            for entry, line in entries
            if entry["step"] < first_step or (entry["step"] == first_step and "loss" in entry)
        ]
        partial = folder / f".{METRICS_FILE}.partial"
        partial.write_text("".join(kept))
        partial.replace(file)
        self._stream = file.open("a", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        self._stream.close()


def _lines(file: Path) -> list[str]:
    """Whole lines of a file that a kill may have cut."""
    if not file.exists():
        return []
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("}\n")]


@METRIC_WRITERS.register("tensorboard")
class TensorBoardWriter:
    """TensorBoard event files in the run folder; a resume hides what came after its step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Writers:
    """The metric writers of a run. One that fails is dropped with a warning; training goes on."""

    def __init__(self, factories: Sequence[Callable[[Path, int], Writer]], folder: Path) -> None:
        """`factories` make writers of (run folder, first step); `open` calls them."""
        self._factories, self._folder = factories, folder
        self._writers: list[Writer] = []

    def open(self, first_step: int) -> None:
        """Opens each writer, for a run that is resumed after a step."""
        self._writers = [make(self._folder, first_step) for make in self._factories]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands the metrics to each writer."""
        self._each(lambda writer: writer.write(step, metrics))

    def close(self) -> None:
        """Closes each writer."""
        self._each(lambda writer: writer.close())
        self._writers = []

    def _each(self, call: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception as error:  # whatever a writer raises, training goes on
                self._writers.remove(writer)
                name = type(writer).__name__
                print(f"gptjax: {name} failed and is left out: {error}", file=sys.stderr)


def metric_writers(cfg: Config) -> Writers:
    """The configured metric writers, of the first process alone. Raises ConfigError."""
    names = ["jsonl", *["tensorboard"] * cfg.log.tensorboard, *cfg.log.writers]
    factories = [METRIC_WRITERS[name] for name in dict.fromkeys(names)]
    return Writers(factories if distributed.first() else [], Path(cfg.run))
