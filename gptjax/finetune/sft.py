"""Supervised fine-tuning (SFT) on conversations: the task, its loss, and exact match and F1."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from gptjax.config import Config
from gptjax.evaluate import answers
from gptjax.finetune.base_model import BaseModel, tokenizer_of
from gptjax.finetune.conversations import UNANSWERABLE, Conversations
from gptjax.finetune.packing import PackedRows
from gptjax.finetune.task import FinetuneTask
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.runtime.progress import Progress
from gptjax.sample import Sampler, SamplingParams
from gptjax.sample.engine import shard_batch
from gptjax.tokenizer import Tokenizer
from gptjax.training import objective
from gptjax.training.callbacks import Evaluator
from gptjax.training.metrics import perplexity
from gptjax.training.objective import DeviceBatch, TokenBatch
from gptjax.training.step import Sums


def answer_loss(
    params: Params,
    cfg: Config,
    batch: DeviceBatch,
    keys_B2: jax.Array | None = None,
    *,
    training: bool = False,
) -> tuple[jax.Array, Sums]:
    """The loss to differentiate and the sums of `step.LossFn`; targets are the answers' tokens."""
    names = ("tokens", "targets", "counts", "segments", "positions")
    given = TokenBatch(*(batch[f"{name}_BT"] for name in names))
    return objective.token_loss(params, cfg, given, keys_B2, training=training)


class SFTTask(FinetuneTask[PackedRows]):
    """Supervised fine-tuning on conversations: the loss is on the answers' tokens alone."""

    def __init__(
        self,
        cfg: Config,
        base: BaseModel,
        rows: Mapping[str, PackedRows],
        valid: Conversations,
        say: Callable[[str], None],
    ) -> None:
        """`valid`: the conversations that greedy answers are generated for."""
        loss = lambda params, batch, keys_B2: answer_loss(
            params, cfg, batch, keys_B2, training=True
        )
        super().__init__(cfg, base, rows, loss, say)
        self._valid = valid

    def evaluators(self, progress: Progress) -> list[tuple[int, Evaluator]]:
        cfg = self.cfg
        loss = AnswerLoss(cfg, self.rows["valid"], progress)
        right = AnswersRight(cfg, self._valid, tokenizer_of(self.base))
        return [(cfg.eval.every, loss), (cfg.eval.tasks_every, right)]


class AnswerLoss:
    """An evaluator: valid_loss, in nats per token of the answers, and valid_perplexity."""

    def __init__(self, cfg: Config, rows: PackedRows, progress: Progress) -> None:
        self._size, self._rows, self._progress = cfg.eval.batch, rows, progress

        def sums(params: Params, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
            parts = answer_loss(params, cfg, batch)[1]
            return parts["loss"], parts["targets"]

        self._sums = jax.jit(sums)

    def run(self, params: Params) -> dict[str, float]:
        """valid_loss and valid_perplexity."""
        shards, count = sharding.axis_size("batch"), len(self._rows)
        size, done = -(-self._size // shards) * shards, []
        with self._progress.bar("evaluate", count, unit="row") as bar:
            for start in range(0, count, size):
                ids = np.arange(start, start + size)
                batch = self._rows.take(np.minimum(ids, count - 1))
                batch["counts_BT"] = batch["counts_BT"] * (ids < count)[:, None]
                done.append(jax.device_get(self._sums(params, shard_batch(batch))))
                bar.update(min(start + size, count))
        nats, targets = np.asarray(done, np.float64).sum(0)
        loss = float(nats / targets)
        return {"valid_loss": loss, "valid_perplexity": perplexity(loss)}


class AnswersRight:
    """An evaluator: exact match and F1 of greedy answers, as SQuAD defines them (see
    evaluate/answers.py). valid_cut counts prompts that were too long and lost their beginning.
    """

    def __init__(self, cfg: Config, given: Conversations, tokenizer: Tokenizer) -> None:
        self._cfg, self._given, self._tokenizer = cfg, given, tokenizer

    def run(self, params: Params) -> dict[str, float]:
        """valid_exact_match, valid_f1, valid_cut."""
        cfg, all_given = self._cfg, self._given.all
        rows = cfg.eval.batch
        sampler = Sampler(params, cfg.model, cfg.compute, self._tokenizer, slots=rows)
        longest = max(len(one.ids) - len(one.prompt) for one in all_given)
        longest = min(longest, cfg.model.context - 1)
        room = cfg.model.context - longest
        settings = SamplingParams(temperature=0.0, max_tokens=longest)
        given = sampler.generate([one.prompt[-room:] for one in all_given], settings)
        said = ["" if g.text.strip() == UNANSWERABLE else g.text for g in given]
        pairs = [(text, one.answers) for text, one in zip(said, all_given, strict=True)]
        return {
            "valid_exact_match": float(np.mean([answers.exact_match(*pair) for pair in pairs])),
            "valid_f1": float(np.mean([answers.f1(*pair) for pair in pairs])),
            "valid_cut": float(sum(len(one.prompt) > room for one in all_given)),
        }
