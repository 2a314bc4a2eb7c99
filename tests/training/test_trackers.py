"""Metric writers for trackers, with the real packages, offline."""

import sqlite3
from pathlib import Path

import pytest

from gptjax.config import Config, LogConfig
from gptjax.errors import ConfigError
from gptjax.runtime import goodput
from gptjax.training import metrics

pytestmark = pytest.mark.slow

SESSION = '{"began": 1700000000.5, "now": 1700000001, "first": 0, "step": 0, "seconds": {}}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A run folder, for trackers that talk to nobody."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / goodput.SESSIONS).write_text(SESSION)
    return run


def write(folder: Path, name: str, first: int) -> None:
    """Two steps of a run that goes on after a step."""
    cfg = Config(run=str(folder), log=LogConfig(writers=(name,), tensorboard=False))
    writers = metrics.metric_writers(cfg)
    writers.open(first)
    for step in (first + 1, first + 2):
        writers.write(step, {"loss": 5.0 - step, "valid_loss/web": 3.0})
    writers.close()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_resumed_run_is_one_run_of_the_tracker(folder: Path, name: str, capfd) -> None:
    pytest.importorskip(name)
    write(folder, name, 0)
    write(folder, name, 2)
    assert "is left out" not in capfd.readouterr().err
    expected = [(step, 5.0 - step) for step in (1, 2, 3, 4)]
    if name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient((folder / "mlruns").as_uri())
        experiment = client.get_experiment_by_name("gptjax")
        (run,) = client.search_runs([experiment.experiment_id])
        found = client.get_metric_history(run.info.run_id, "loss")
        assert [(one.step, one.value) for one in found] == expected
        assert run.info.status == "FINISHED"
        assert run.info.run_name == "mine"
    elif name == "trackio":
        with sqlite3.connect(folder.parents[1] / "trackio" / "gptjax.db") as database:
            rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        logged = [row for row in rows if '"loss"' in str(row[2])]
        assert len({row[0] for row in logged}) == 1
        assert sorted(row[1] for row in logged) == [1, 2, 3, 4]
    else:
        files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
        assert len(files) == 2
        assert len({file.name for file in files}) == 1  # one run, which the server joins
        assert all(b"valid_loss/web" in file.read_bytes() for file in files)


def test_a_package_that_is_missing_is_named_before_anything_is_done(folder, monkeypatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log.writers=wandb: needs .*pip install 'gptjax\[wandb"):
        metrics.check_writers(Config(log=LogConfig(writers=("wandb",))))
    with pytest.raises(ConfigError, match=r"metrics_port=9: needs .*pip install 'gptjax\[serve\]'"):
        metrics.check_writers(Config(log=LogConfig(metrics_port=9)))
    with pytest.raises(ConfigError, match=r"log.metrics_port=70000: must be at most 65535"):
        Config(log=LogConfig(metrics_port=70000)).check()
