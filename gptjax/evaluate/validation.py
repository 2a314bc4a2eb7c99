"""Loss on a run's own validation split, cut into sequences as in training."""

import math
from typing import Any

import jax
import numpy as np

from gptjax.config import Config
from gptjax.data import loader
from gptjax.data.store import Manifest, Reader
from gptjax.evaluate.bootstrap import Statistic
from gptjax.model.decoder import Params
from gptjax.parallel import arrays
from gptjax.runtime.progress import Progress
from gptjax.training.metrics import perplexity
from gptjax.training.objective import next_token_loss


class ValidationLoss:
    """An evaluator: loss, perplexity and bits per byte over the whole split, each token once.

    loss is nats per token, the EOS of each document included; bits_per_byte divides by the UTF-8
    bytes of the text, so it compares across tokenizers, and with a compressor. It includes the bits
    of text that the tokens do not give back.
    """

    def __init__(self, cfg: Config, manifest: Manifest, progress: Progress) -> None:
        self._cfg, self._progress = cfg, progress
        self._split = manifest.splits["valid"]
        self._reader = Reader(cfg.data.store, "valid", manifest)
        eos_id, start_id = manifest.eos_id, manifest.start_id

        def sums(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
            _, parts = next_token_loss(params, cfg, batch, eos_id, start_id=start_id)
            return parts["loss"], parts["targets"]

        self._sums = jax.jit(sums)

    def run(self, params: Params) -> dict[str, float]:
        """valid_loss, valid_perplexity, valid_bits_per_byte, valid_tokens; where the tokens do not
        give back all of the text, valid_lost_bits_per_byte too."""
        statistics, tokens = self.measure(params)
        values = {statistic.name: statistic.value for statistic in statistics}
        return values | self.lost_bits_per_byte() | {"valid_tokens": tokens}

    def lost_bits_per_byte(self) -> dict[str, float]:
        """Bits per byte that the tokens do not give back, by name; empty without a loss."""
        bits = self._split.lost_bits
        return {"valid_lost_bits_per_byte": bits / self._split.bytes} if bits else {}

    def measure(self, params: Params) -> tuple[list[Statistic], float]:
        """Loss, perplexity and bits per byte, an entry for each batch; and the number of tokens."""
        cfg = self._cfg
        rows = arrays.host_rows(cfg.eval.batch)
        batches = loader.eval_batches(
            self._reader, cfg.train.seq_len, cfg.eval.batch, rows, cfg.data.prefetch
        )
        count = -(-(len(self._reader) - 1) // (cfg.train.seq_len * cfg.eval.batch))
        done: list[tuple[jax.Array, jax.Array]] = []
        with self._progress.bar("evaluate", count, unit="batch") as bar:
            for batch in batches:
                on_devices = arrays.global_batch(vars(batch), cfg.eval.batch)
                done.append(self._sums(params, on_devices))
                if len(done) > 1:
                    jax.block_until_ready(done[-2])  # at most two batches are queued on the device
                bar.update(len(done))
        nats, tokens = np.asarray(jax.device_get(done), np.float64).T
        total = float(tokens.sum())
        return [
            Statistic("valid_loss", nats, tokens),
            Statistic("valid_perplexity", nats, tokens, perplexity),
            Statistic(
                "valid_bits_per_byte",
                nats / math.log(2) + tokens * (self._split.lost_bits / total),
                tokens * (self._split.bytes / total),
            ),
        ], total
