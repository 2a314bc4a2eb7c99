"""The callbacks that every kind of training has."""

from collections.abc import Callable, Mapping

from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import Config, phases
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training.callbacks import (
    Callback,
    CheckReplicas,
    Evaluate,
    LogMetrics,
    NonfiniteGuard,
    Profile,
    RecordSessions,
    Save,
    ShowProgress,
)
from gptjax.training.on_demand import OnDemand
from gptjax.training.stragglers import NameSlowDevices, NameStragglers


def standard_callbacks(
    cfg: Config,
    checkpointer: Checkpointer,
    evaluate: Evaluate,
    watchdog: Watchdog,
    progress: Progress,
    facts: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> list[Callback]:
    """The callbacks of every kind of training, in their order: a step is saved, then evaluated.

    `facts` of a step are written with its metrics.
    """
    borders, folder = phases.borders(cfg), run_dir.log_folder(cfg.run)
    save = Save(cfg.checkpoint.every, checkpointer, watchdog, progress, borders)
    sessions = RecordSessions(folder, watchdog, progress)
    told = lambda step: {"save_seconds": save.seconds(), "goodput": sessions.share()}
    with_times = lambda step: {**facts(step), **told(step)}
    return [
        sessions,
        Profile(cfg.log, folder / "profile"),
        ShowProgress(progress),
        NonfiniteGuard(cfg.train.nonfinite_limit, progress),
        LogMetrics(cfg, evaluate.writers, progress, with_times),
        CheckReplicas(cfg.train.check_replicas, cfg.checkpoint.every, watchdog, borders),
        NameSlowDevices(cfg.watch.straggler, cfg.checkpoint.every, watchdog, progress),
        save,
        evaluate,
        NameStragglers(cfg.watch.straggler, watchdog, progress),
        OnDemand(cfg.log, folder, save, watchdog, progress),
    ]
