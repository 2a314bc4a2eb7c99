"""Metric writers for Weights & Biases, MLflow and trackio (log.writers; extras of their names).

Where they write, and with what credentials, is as their own environment variables say
(WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...). A run that is resumed goes
on in the same run there. Steps that it does again are recorded twice, or as they were first, as the
tracker has it; metrics.jsonl has them once.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.config.registry import METRIC_WRITERS
from gptjax.runtime import goodput

PROJECT = "gptjax"
_ID = "gptjax.id"


@METRIC_WRITERS.register("wandb")
class WandbWriter:
    """A run of Weights & Biases, in the project WANDB_PROJECT, or gptjax."""

    package = "wandb"

    def __init__(self, folder: Path, first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_id(folder),
            name=_name(folder),
            config=_settings(folder),
            dir=str(folder),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


@METRIC_WRITERS.register("mlflow")
class MlflowWriter:
    """A run of MLflow, in the experiment MLFLOW_EXPERIMENT_NAME, or gptjax; without
    MLFLOW_TRACKING_URI in the run folder's mlruns/."""

    package = "mlflow"

    def __init__(self, folder: Path, first_step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._metric = Metric
        self._client = MlflowClient(place or (folder.absolute() / "mlruns").as_uri())
        name, own = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), _id(folder)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`{_ID}` = '{own}'")
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        run = self._client.create_run(experiment, run_name=_name(folder), tags={_ID: own})
        self._run = run.info.run_id
        for field, value in _settings(folder).items():
            self._client.log_param(self._run, field, str(value)[:500])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        batch = [self._metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=batch)

    def close(self) -> None:
        self._client.set_terminated(self._run)


@METRIC_WRITERS.register("trackio")
class TrackioWriter:
    """A run of trackio, in the project gptjax: on this machine, or as TRACKIO_SPACE_ID says."""

    package = "trackio"

    def __init__(self, folder: Path, first_step: int) -> None:
        import trackio

        name = f"{_name(folder)}-{_id(folder)[-6:]}"
        self._run = trackio.init(
            project=PROJECT, name=name, config=_settings(folder), resume="allow", embed=False
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _id(folder: Path) -> str:
    """What a run has in all its sessions, and no other run has: the time that it was begun at."""
    sessions = goodput.read(folder / goodput.SESSIONS)
    return f"{int(1e6 * (sessions[0].began if sessions else time.time())):x}"


def _settings(folder: Path) -> dict[str, Any]:
    """The fields of the run's configuration by dotted name, where they are there."""
    from gptjax import config

    file = folder / config.CONFIG_FILE
    return config.flatten(config.read_json(file)) if file.exists() else {}


def _name(folder: Path) -> str:
    file = folder / "config.json"
    run = json.loads(file.read_text())["run"] if file.exists() else str(folder)
    return str(run).rstrip("/").rpartition("/")[2]
