"""Evaluators: `run(params) -> {name: value}`.

`ValidationLoss` is of a run's own split, `TextLoss` of any text, `TaskEvaluator` of a file of questions.
Below the last two, `Scorer` gives the log-probability of continuations, and `bootstrap` says how
far an average over examples can be trusted. `LMEvalAdapter` is a model of lm_eval, which it needs.
"""

from typing import Any

from gptjax.evaluate.bootstrap import Statistic
from gptjax.evaluate.documents import TextLoss
from gptjax.evaluate.formats import TaskFile, read_tasks
from gptjax.evaluate.scoring import Score, Scorer
from gptjax.evaluate.tasks import TaskEvaluator, task_names
from gptjax.evaluate.validation import ValidationLoss

__all__ = [
    "LMEvalAdapter",
    "Score",
    "Scorer",
    "Statistic",
    "TaskEvaluator",
    "TaskFile",
    "TextLoss",
    "ValidationLoss",
    "read_tasks",
    "task_names",
]


def __getattr__(name: str) -> Any:
    if name == "LMEvalAdapter":  # imported when asked for: lm_eval is an extra
        from gptjax.evaluate.lm_eval import LMEvalAdapter

        return LMEvalAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
