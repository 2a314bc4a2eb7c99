"""Evaluators, each with `run(params) -> {name: value}`, and the parts they are made of.

`ValidationLoss` measures the loss on a run's own validation split, `TextLoss` on any text, and
`TaskEvaluator` accuracy on a file of examples. The last two score continuations by log-likelihood
with a `Scorer`. A `Statistic` is a mean with its bootstrap confidence interval. `LMEvalAdapter`
makes a model available to EleutherAI's lm_eval, and needs the extra `lm-eval`.
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
    if name == "LMEvalAdapter":  # imported on first use: lm_eval is an extra
        from gptjax.evaluate.lm_eval import LMEvalAdapter

        return LMEvalAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
