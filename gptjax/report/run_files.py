"""The files of a run, read without JAX: configuration, metrics, sessions, checkpoints, samples."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gptjax import bucket, config
from gptjax.checkpoint import head, listing
from gptjax.config import Config, ModelConfig, phases
from gptjax.errors import ConfigError
from gptjax.runtime import goodput
from gptjax.runtime.goodput import Session

SAMPLES = "samples"


@dataclass(frozen=True)
class RunFiles:
    """A run folder, local or in a bucket."""

    path: str
    cfg: Config

    @classmethod
    def open(cls, path: str) -> "RunFiles":
        """The run in a folder. Raises ConfigError where there is none."""
        if not bucket.remote(path) and not (Path(path) / config.CONFIG_FILE).is_file():
            raise ConfigError([f"{path}: is no run folder; it has no {config.CONFIG_FILE}"])
        return cls(path, config.load(path))

    @property
    def folder(self) -> Any:
        """The folder, with pathlib's methods."""
        return bucket.path_of(self.path)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, those of evaluations by themselves; no damaged lines."""
        return list(listing.read_rows(self.folder / listing.METRICS_FILE))

    @cached_property
    def sessions(self) -> list[Session]:
        """The processes that trained the run."""
        return goodput.read(self.folder / goodput.SESSIONS)

    @cached_property
    def goodput(self) -> dict[str, float]:
        """Seconds by what they were spent on; empty for a run of before this was recorded."""
        return goodput.summarize(self.sessions) if self.sessions else {}

    @cached_property
    def checkpoints(self) -> dict[int, Any]:
        """The folder of each checkpoint by its step, ascending."""
        folder = self.folder / listing.CHECKPOINTS
        if (self.folder / head.HEAD).exists():
            record = head.of(self.path).read()
            return {step: folder / name for step, name in sorted(record.checkpoints.items())}
        return {step: folder / str(step) for step in listing.steps_in(Path(folder))}

    @cached_property
    def left_out(self) -> list[dict[str, Any]]:
        """The steps that the run leaves out, with their rewinds (training/left_out.py)."""
        file = self.folder / listing.LEFT_OUT
        try:
            return list(json.loads(file.read_text())) if file.exists() else []
        except ValueError:
            return []

    @property
    def step(self) -> int:
        """The last step that is known of."""
        recorded = (int(row["step"]) for row in self.rows)
        return max([0, *self.checkpoints, *recorded])

    @property
    def last_step(self) -> int:
        """The step at which the run is trained."""
        return max(phases.phases(self.cfg)[-1].last, self.step)

    @property
    def tokens(self) -> int:
        """Tokens seen at `step`."""
        return phases.tokens_at(self.cfg, self.step)

    def newest(self, *, training: bool) -> dict[str, tuple[int, float]]:
        """The newest value of each metric, with its step: of training, or of evaluation."""
        found: dict[str, tuple[int, float]] = {}
        for row in self.rows:
            if ("loss" in row) == training:
                values = {k: v for k, v in row.items() if k not in ("step", "time")}
                found |= {name: (row["step"], value) for name, value in values.items()}
        return found

    def parameters(self) -> tuple[int, int] | None:
        """The model's parameters and those of them that a token uses, by the newest checkpoint;
        None without one, for a run with adapters, and where its metadata cannot be read."""
        if not self.checkpoints or self.cfg.finetune.lora.rank:
            return None
        place = self.checkpoints[max(self.checkpoints)]
        in_bucket, in_folder = place / "meta.json", place / "meta" / "data.json"
        try:
            if in_bucket.exists():
                tree = json.loads(in_bucket.read_text())["meta"]["tree"]
            else:
                tree = json.loads(in_folder.read_text())["tree"]
            return count(tree, self.cfg.model)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def size(self) -> int | None:
        """Bytes of all its files; None in a bucket, which does not say."""
        if bucket.remote(self.path):
            return None
        return sum(file.stat().st_size for file in Path(self.path).rglob("*") if file.is_file())

    def samples(self) -> dict[int, str]:
        """The samples by step."""
        files = (
            {int(Path(f.name).stem): f for f in (self.folder / SAMPLES).glob("*.txt")}
            if (self.folder / SAMPLES).is_dir()
            else {}
        )
        return {step: files[step].read_text() for step in sorted(files)}


def read_metrics(run: str) -> list[dict[str, Any]]:
    """What a run's metrics.jsonl has of each step, of training and evaluation together, in order:
    pandas.DataFrame takes it as it is. Raises ConfigError where there is no run."""
    merged: dict[int, dict[str, Any]] = {}
    for row in RunFiles.open(run).rows:
        known = merged.setdefault(row["step"], {})
        known |= row | {"time": known.get("time", row.get("time"))}  # when it had been trained
    return list(merged.values())


def count(tree: Mapping[str, Any], model: ModelConfig) -> tuple[int, int]:
    """Parameters, and those that a token uses, of the shapes by path in a checkpoint's metadata.

    Padding of the vocabulary's tables does not count.
    """
    total = active = 0
    for path, (shape, _) in tree.items():
        if not path.startswith("params/"):
            continue
        size = math.prod(shape)
        if path in ("params/embed", "params/head"):
            size = size // model.table * model.vocab_size
        of_experts = "/mlp/" in path and len(shape) == 4
        total += size
        active += size * model.moe.top_k // model.moe.experts if of_experts else size
    return total, active
