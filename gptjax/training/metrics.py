"""What a run reports: throughput and MFU, and the writers of metrics.

A metric has one name everywhere: loss, perplexity, grad_norm, param_norm, lr, tokens_per_second,
data_wait (share of the wall time that the loop waited for a batch), mfu, …
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from gptjax.config import Config
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


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class Writer(Protocol):
    """A sink of metrics."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step."""

    def close(self) -> None:
        """Flushes and ends."""


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
    """All sinks of a run. One that fails is dropped with a warning and never stops training."""

    def __init__(self, writers: list[Writer]) -> None:
        self._writers = writers

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands the metrics to each sink."""
        self._each(lambda writer: writer.write(step, metrics))

    def close(self) -> None:
        """Closes each sink."""
        self._each(lambda writer: writer.close())

    def _each(self, call: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception as error:  # whatever a sink raises, training goes on
                self._writers.remove(writer)
                name = type(writer).__name__
                print(f"gptjax: {name} failed and is left out: {error}", file=sys.stderr)


def writers(cfg: Config, step: int) -> Writers:
    """The sinks of the metrics of a run that goes on after a step; of the first process alone."""
    kinds: list[Any] = [JsonlWriter]
    if cfg.log.tensorboard:
        kinds.append(TensorBoardWriter)
    if not distributed.first():
        kinds = []
    return Writers([kind(Path(cfg.run), step) for kind in kinds])
