"""Throughput, MFU (model FLOPs utilisation), and the writers of metrics.

A metric has one name everywhere: loss, perplexity, grad_norm, param_norm, lr, tokens_per_second,
data_wait (share of the wall time that the loop waited for a batch), mfu, …
"""

import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax

from gptjax.checkpoint.listing import EVALUATED, METRICS_FILE, split
from gptjax.checkpoint.run_dir import log_folder
from gptjax.config import CONFIG_FILE, Config, flatten, read_json
from gptjax.config.registry import METRIC_WRITERS
from gptjax.errors import ConfigError
from gptjax.model.flops import ModelCost
from gptjax.runtime import distributed, hardware


class Throughput:
    """Tokens per second and, where a peak is known, the model-FLOPs utilisation.

    MFU = tokens/s * FLOPs/token / (devices * peak), where FLOPs/token is what the model needs
    (`flops.ModelCost.flops_per_token`): of causal attention the causal half, no recomputation.
    """

    def __init__(
        self, flops_per_token: Callable[[int], float], dtype: str, peak_tflops: float, seq_len: int
    ) -> None:
        """`flops_per_token` of a length of sequences; `seq_len` is that which the description has.

        `peak_tflops` of one device; 0 looks it up, for bfloat16, in runtime/hardware.py.
        """
        self._flops = flops_per_token
        kind = jax.devices()[0].device_kind
        peak = peak_tflops
        if not peak and dtype == "bfloat16" and (device := hardware.find(kind)):
            peak = device.tflops
        self._peak = peak * 1e12 * jax.device_count()
        self.description = (
            f"MFU = tokens/s x {flops_per_token(seq_len):.4g} FLOPs/token / "
            f"({jax.device_count()} x {peak:g} TFLOP/s)"
            if peak
            else f"no peak known for {dtype} on {kind}, so no MFU; log.peak_tflops sets one"
        )

    def of(self, tokens_per_second: float, seq_len: int) -> dict[str, float]:
        """The metrics of a rate in sequences of this length."""
        metrics = {"tokens_per_second": tokens_per_second}
        if self._peak:
            metrics["mfu"] = tokens_per_second * self._flops(seq_len) / self._peak
        return metrics


def throughput(cfg: Config) -> Throughput:
    """The throughput of a configured run."""
    flops_of = ModelCost(cfg.model).flops_per_token
    return Throughput(flops_of, cfg.compute.dtype, cfg.log.peak_tflops, cfg.train.seq_len)


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
    """metrics.jsonl: one object a line and a step, with the time (seconds since 1970).

    What is evaluated at a step that has been written is added to its line, after the time of that
    as `evaluated`. A resume drops what it writes again: the lines after its first step, and what
    was evaluated at that step. Damaged lines go to metrics.jsonl.damaged.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        file = folder / METRICS_FILE
        kept, damaged = [], []
        self._step = -1  # of the last line
        raw = file.read_bytes() if file.exists() else b""
        for line in io.BytesIO(raw):
            if (entry := _entry(line)) is None:
                damaged.append(line)
            elif entry["step"] < first_step:
                kept.append(line.rstrip(b"\r\n") + b"\n")
            elif entry["step"] == first_step and "loss" in entry:
                kept.append(_line(split(entry)[0]))
                self._step = first_step
        if not raw.endswith(b"\n"):
            damaged = damaged[:-1]  # the last line, which a kill has cut
        if damaged:
            aside = folder / f"{METRICS_FILE}.damaged"
            with aside.open("ab") as stream:
                stream.writelines(damaged)
            print(
                f"gptjax: {file}: {len(damaged)} damaged lines were moved to {aside}",
                file=sys.stderr,
            )
        partial = folder / f".{METRICS_FILE}.partial"
        partial.write_bytes(b"".join(kept))
        partial.replace(file)
        self._stream = file.open("r+b", buffering=0)
        self._stream.seek(0, os.SEEK_END)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = round(time.time(), 3)
        if step == self._step:  # goes on with its line, in one write
            self._stream.seek(-len(b"}\n"), os.SEEK_END)
            self._stream.write(b", " + _line({EVALUATED: now, **metrics})[1:])
        else:
            self._stream.write(_line({"step": step, "time": now, **metrics}))
            self._step = step

    def close(self) -> None:
        self._stream.close()


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line; None for anything else."""
    try:
        whole = line.endswith(b"\n") and b"\r" not in line.rstrip(b"\r\n")
        entry = json.loads(line) if whole else None
    except (ValueError, RecursionError):
        return None
    known = isinstance(entry, dict) and isinstance(entry.get("step"), int)
    return entry if known else None


@METRIC_WRITERS.register("tensorboard")
class TensorBoardWriter:
    """TensorBoard event files in the run folder; a resume hides what came after its step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        with _left_unimported("torch", "google.cloud.storage"):  # seconds, for nothing used here
            from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._config, self._last = folder / CONFIG_FILE, dict[str, float]()
        if first_step == 0 and self._config.exists():
            self.text(0, "configuration", self._config.read_text())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(_tag(name), value, step)
        self._last |= {name: metrics[name] for name in _COMPARED if name in metrics}

    def text(self, step: int, name: str, text: str) -> None:
        """Shows a text, of samples say, as it is."""
        lines = "".join(f"    {line}\n" for line in text.splitlines())  # no Markdown
        self._writer.add_text(name, lines, step)

    def close(self) -> None:
        """Records the configuration beside the last losses, for TensorBoard's HPARAMS."""
        if self._last and self._config.exists():
            fields = flatten(read_json(self._config))
            values = {k: v if isinstance(v, int | float) else str(v) for k, v in fields.items()}
            last = {_tag(name): value for name, value in self._last.items()}
            self._writer.add_hparams(values, last, name="hparams")
        self._writer.close()


@contextmanager
def _left_unimported(*names: str) -> Iterator[None]:
    """Modules that are optional to what is imported in here are not imported by it."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


_COMPARED = ("loss", "valid_loss", "valid_bits_per_byte")


def _tag(name: str) -> str:
    """A metric's name after its group, by which TensorBoard sorts its charts."""
    if "/" in name:
        return name
    if name.startswith("valid_"):
        return f"valid/{name}"
    if name in ("loss", "perplexity", "lr", "grad_norm", "param_norm", "z_loss", "nonfinite"):
        return f"train/{name}"
    if name in ("tokens_per_second", "mfu", "data_wait", "save_seconds", "goodput"):
        return f"speed/{name}"
    return f"other/{name}"


class PrometheusWriter:
    """Serves the newest metrics on 127.0.0.1 as gauges: gptjax_loss, gptjax_step, ..."""

    def __init__(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        self._registry, self._gauge = CollectorRegistry(), Gauge
        self._gauges: dict[str, Any] = {}
        self._server, _ = start_http_server(port, addr="127.0.0.1", registry=self._registry)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in {"step": step, **metrics}.items():
            known = re.sub(r"\W", "_", f"gptjax_{name}")
            if known not in self._gauges:
                self._gauges[known] = self._gauge(known, name, registry=self._registry)
            self._gauges[known].set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Writers:
    """The metric writers of a run. One that fails is dropped with a warning; training goes on."""

    def __init__(self, factories: Sequence[Callable[[Path, int], Writer]], folder: Path) -> None:
        """`factories` make writers of (run folder, first step); `open` calls them."""
        self._factories, self._folder = factories, folder
        self._writers: list[Writer] = []

    def open(self, first_step: int) -> None:
        """Opens each writer, for a run that is resumed after a step."""
        for make in self._factories:
            try:
                self._writers.append(make(self._folder, first_step))
            except Exception as error:  # whatever a writer raises, training goes on
                self._left_out(getattr(make, "__name__", str(make)), error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands the metrics to each writer."""
        self._each(lambda writer: writer.write(step, metrics))

    def text(self, step: int, name: str, text: str) -> None:
        """Hands a text to each writer that takes texts (a method `text`)."""
        self._each(lambda writer: getattr(writer, "text", lambda *_: None)(step, name, text))

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
                self._left_out(type(writer).__name__, error)

    @staticmethod
    def _left_out(name: str, error: Exception) -> None:
        print(f"gptjax: {name} failed and is left out: {error}", file=sys.stderr)


def check_writers(cfg: Config) -> None:
    """Raises ConfigError for a writer whose package is not installed."""
    if cfg.log.metrics_port and importlib.util.find_spec("prometheus_client") is None:
        install = "pip install 'gptjax[serve]'"
        told = f"log.metrics_port={cfg.log.metrics_port}: needs the package prometheus_client"
        raise ConfigError([f"{told}: {install}"])
    for name in cfg.log.writers:
        package = getattr(METRIC_WRITERS[name], "package", "")
        if package and importlib.util.find_spec(package) is None:
            install = f"pip install 'gptjax[{name}]'"
            raise ConfigError([f"log.writers={name}: needs the package {package}: {install}"])


def metric_writers(cfg: Config) -> Writers:
    """The configured metric writers, of the first process alone. Raises ConfigError."""
    check_writers(cfg)
    port = cfg.log.metrics_port
    names = ["jsonl", *["tensorboard"] * cfg.log.tensorboard, *cfg.log.writers]
    factories = [METRIC_WRITERS[name] for name in dict.fromkeys(names)]
    factories += [lambda folder, step: PrometheusWriter(port)] if port else []
    return Writers(factories if distributed.first() else [], log_folder(cfg.run))
