"""Classification and multiple choice: the tasks, their loss, and their metrics.

The loss is the cross-entropy of the label, plus finetune.lm_weight times the language-model loss of
the examples' own tokens (Radford et al. 2018, section 3.2). The latter is a mean over each
example's tokens, so that a long text has the same weight as a short one.

Shapes: B examples, C sequences of each, S = B*C, T tokens, N = S*T, D embed, K scores.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.config import Config
from gptjax.finetune.base_model import BaseModel
from gptjax.finetune.task import FinetuneTask
from gptjax.finetune.tokenize import TokenizedExamples
from gptjax.model import decoder, heads, layers
from gptjax.model.decoder import Params
from gptjax.parallel import sequence, sharding
from gptjax.runtime.progress import Progress
from gptjax.sample.engine import shard_batch
from gptjax.training import loss, objective
from gptjax.training.callbacks import Evaluator
from gptjax.training.objective import DeviceBatch
from gptjax.training.step import LossFn, Sums


def task_loss(
    params: Params,
    cfg: Config,
    batch: DeviceBatch,
    keys_B2: jax.Array | None = None,
    *,
    training: bool = False,
) -> tuple[jax.Array, Sums, jax.Array]:
    """The loss to differentiate, the sums of `step.LossFn`, and the scores [B, K].

    Targets are the examples; those with label -1 do not count.
    """
    b, c, t = batch["tokens_BCT"].shape
    flat = lambda a_BC: lax.reshape(
        a_BC,
        (b * c, *a_BC.shape[2:]),
        out_sharding=sharding.spec("batch", *[None] * (a_BC.ndim - 2)),
    )
    tokens_ST, lengths_S = flat(batch["tokens_BCT"]), flat(batch["lengths_BC"])
    keys_S2 = None if keys_B2 is None else flat(layers.position_keys(keys_B2, c))
    out = decoder.apply(
        params, cfg.model, cfg.compute, tokens_ST, keys_B2=keys_S2, training=training
    )
    x_SD = heads.last(out.x_ND, lengths_S)
    site = 3 * cfg.model.layers + 1  # after those of the decoder
    x_SD = layers.dropout(x_SD, cfg.finetune.dropout, keys_S2, site)
    scores_BK = heads.scores(params, x_SD, b)
    if cfg.finetune.task == "choose":
        scores_BK = jnp.where(batch["lengths_BC"] > 0, scores_BK, heads.NEVER)
    nats_B, right_B = heads.losses(scores_BK, batch["labels_B"])
    counts_B = batch["labels_B"] >= 0
    task = jnp.where(counts_B, nats_B, 0).sum()
    targets = counts_B.sum().astype(jnp.float32)
    sums = {"loss": task, "targets": targets, "accuracy": (counts_B & right_B).sum() * 1.0}
    total = task
    if cfg.finetune.lm_weight and training:
        ce, z = _own_tokens(params, cfg, out.x_ND, tokens_ST, lengths_S, batch)
        total, sums["lm_loss"] = total + cfg.finetune.lm_weight * (ce + z), ce
    if out.routing is not None:
        extra, more = objective.routing_loss(cfg, out.routing, targets / (b * c * t))
        total, sums = total + extra, sums | more
    return total, sums, scores_BK


def _own_tokens(
    params: Params,
    cfg: Config,
    x_ND: jax.Array,
    tokens_ST: jax.Array,
    lengths_S: jax.Array,
    batch: DeviceBatch,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and z-loss of the next tokens, each a mean over an example's tokens."""
    t = tokens_ST.shape[1]
    next_ST = jnp.concatenate([tokens_ST[:, 1:], tokens_ST[:, :1]], 1)
    given_B1 = (batch["lengths_BC"] > 0).sum(1, keepdims=True)
    share_BC = 1 / jnp.maximum(given_B1 * (batch["lengths_BC"] - 1), 1)
    share_S = lax.reshape(share_BC, (len(tokens_ST),), out_sharding=sharding.spec("batch"))
    counts_ST = jnp.arange(t)[None] < lengths_S[:, None] - 1
    return loss.cross_entropy(
        x_ND,
        decoder.head(params),
        sequence.flatten(next_ST),
        sequence.flatten(jnp.where(counts_ST, share_S[:, None], 0).astype(jnp.float32)),
        cfg.train.z_loss,
        cfg.compute.loss_chunks,
        cfg.model.vocab_size,
        cfg.model.logit_soft_cap,
    )


def training_loss(cfg: Config) -> LossFn:
    """The loss of both tasks, as `step.train_step` calls it."""
    return lambda params, batch, keys_B2: task_loss(params, cfg, batch, keys_B2, training=True)[:2]


class _LabelledTask(FinetuneTask[TokenizedExamples]):
    """A task whose examples have one right label or choice."""

    def __init__(
        self,
        cfg: Config,
        base: BaseModel,
        rows: Mapping[str, TokenizedExamples],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(cfg, base, rows, training_loss(cfg), say)

    def evaluators(self, progress: Progress) -> list[tuple[int, Evaluator]]:
        self._quality = LabelQuality(self.cfg, self.rows["valid"], progress)
        return [(self.cfg.eval.every, self._quality)]

    def report(self, progress: Progress) -> Mapping[str, Any]:
        return self._quality.report


class ChooseTask(_LabelledTask):
    """Multiple choice: a score of each choice behind the text, and a softmax over them."""


class ClassifyTask(_LabelledTask):
    """Classification of a text, or of a pair of texts."""

    def report(self, progress: Progress) -> Mapping[str, Any]:
        report = super().report(progress)
        matrix = table(self.cfg.finetune.labels, report["confusion"])
        progress.say(f"confusion matrix, true labels down and predicted ones across\n{matrix}")
        return report


class Classifier:
    """Scores tokenized examples in batches of eval.batch, on the ambient mesh."""

    def __init__(self, cfg: Config, progress: Progress) -> None:
        self._cfg, self._progress = cfg, progress
        whole = lambda a_BK: jax.sharding.reshard(a_BK, jax.P(None, None))
        self._scores = jax.jit(lambda p, batch: whole(task_loss(p, cfg, batch)[2]))

    def scores(self, params: Params, rows: TokenizedExamples, name: str) -> np.ndarray:
        """Scores of each example's labels or choices, float32 [E, K]; NEVER for padded choices."""
        shards, count = sharding.axis_size("batch"), len(rows)
        size = -(-self._cfg.eval.batch // shards) * shards
        done = []
        with self._progress.bar(name, count, unit="example") as bar:
            for start in range(0, count, size):
                ids = np.minimum(np.arange(start, start + size), count - 1)
                done.append(jax.device_get(self._scores(params, shard_batch(rows.take(ids)))))
                bar.update(min(start + size, count))
        return np.concatenate(done)[:count]


def probabilities(scores_EK: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, float64."""
    e_EK = np.exp(np.float64(scores_EK) - scores_EK.max(-1, keepdims=True))
    return e_EK / e_EK.sum(-1, keepdims=True)


class LabelQuality:
    """An evaluator on labelled examples: valid_loss, valid_accuracy, and for labels valid_f1.

    `report` holds the last evaluation's metrics, also by label, and the confusion matrix.
    """

    def __init__(self, cfg: Config, rows: TokenizedExamples, progress: Progress) -> None:
        self._labels, self._rows = cfg.finetune.labels, rows
        self._classifier = Classifier(cfg, progress)
        self.report: dict[str, Any] = {}

    def run(self, params: Params) -> dict[str, float]:
        """Their values."""
        scores_EK = self._classifier.scores(params, self._rows, "evaluate")
        self.report = quality(scores_EK, self._rows.labels_E, self._labels)
        return {f"valid_{k}": v for k, v in self.report.items() if isinstance(v, float)}


def quality(scores_EK: np.ndarray, labels_E: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Metrics of scores: loss in nats, accuracy; with label names macro F1, and for each label
    precision, recall and F1; the confusion matrix, a row for each true label.

    A label that occurs neither as true nor as predicted has an F1 of 0, as in scikit-learn.
    """
    chances_EK = probabilities(scores_EK)
    given_E = scores_EK.argmax(-1)
    own_E = chances_EK[np.arange(len(labels_E)), labels_E]
    result: dict[str, Any] = {
        "loss": float(-np.log(np.maximum(own_E, 1e-300)).mean()),
        "accuracy": float((given_E == labels_E).mean()),
    }
    if not names:
        return result
    confusion_KK = np.zeros((len(names), len(names)), int)
    np.add.at(confusion_KK, (labels_E, given_E), 1)
    hits, there, told = confusion_KK.diagonal(), confusion_KK.sum(1), confusion_KK.sum(0)
    share = lambda a, b: [float(x) for x in a / np.maximum(b, 1)]
    f1 = share(2 * hits, there + told)
    columns = share(hits, told), share(hits, there), f1, there.tolist()
    each = [
        dict(zip(("precision", "recall", "f1", "examples"), row, strict=True))
        for row in zip(*columns, strict=True)
    ]
    return result | {
        "f1": float(np.mean(f1)),
        "labels": dict(zip(names, each, strict=True)),
        "confusion": confusion_KK.tolist(),
    }


def table(names: Sequence[str], confusion_KK: Sequence[Sequence[int]]) -> str:
    """A confusion matrix as text."""
    widths = [max(len(name), 5) for name in names]
    side = max(map(len, names))
    line = lambda cells: "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
    rows = [f"{name:>{side}}  {line(row)}" for name, row in zip(names, confusion_KK, strict=True)]
    return "\n".join([f"{'':>{side}}  {line(names)}", *rows])
