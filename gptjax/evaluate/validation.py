"""Loss on a run's own validation split, cut into sequences as in training."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gptjax.config import Config
from gptjax.data import loader, mixture
from gptjax.data.mixture import Manifests
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

    Of a mixture, each part's split is measured (valid_loss/PART), and from these the loss on text
    that is mixed as the training text is.
    """

    def __init__(self, cfg: Config, manifests: Manifests, progress: Progress) -> None:
        self._splits = {
            name: _SplitLoss(part, manifests.parts[name], progress, f"/{name}" if name else "")
            for name, part in mixture.part_configs(cfg).items()
        }
        self._weights = {name: part.weight for name, part in cfg.data.mixture.items()}

    def run(self, params: Params) -> dict[str, float]:
        """valid_loss, valid_perplexity, valid_bits_per_byte, valid_tokens; where the tokens do not
        give back all of the text, valid_lost_bits_per_byte too."""
        statistics, tokens = self.measure(params)
        values = {one.name: one.value for one in statistics} | self.lost_bits_per_byte()
        return self.mixed(values) | values | {"valid_tokens": tokens}

    def mixed(self, values: Mapping[str, float]) -> dict[str, float]:
        """The loss, perplexity and bits per byte of text that has the weights of the mixture, from
        those of its parts; empty without a mixture."""
        if not self._weights:
            return {}
        total = sum(self._weights.values())
        shares = {name: weight / total for name, weight in self._weights.items()}
        loss = sum(shares[name] * values[f"valid_loss/{name}"] for name in shares)
        size = {name: shares[name] * self._splits[name].bytes_per_token for name in shares}
        bits = sum(size[name] * values[f"valid_bits_per_byte/{name}"] for name in shares)
        return {
            "valid_loss": loss,
            "valid_perplexity": perplexity(loss),
            "valid_bits_per_byte": bits / sum(size.values()),
        }

    def lost_bits_per_byte(self) -> dict[str, float]:
        """Bits per byte that the tokens do not give back, by name; empty without a loss."""
        lost = [split.lost_bits_per_byte() for split in self._splits.values()]
        return {name: value for one in lost for name, value in one.items()}

    def measure(self, params: Params) -> tuple[list[Statistic], float]:
        """Loss, perplexity and bits per byte of each part, an entry for each batch; and the number
        of all tokens."""
        measured = [split.measure(params) for split in self._splits.values()]
        return [s for statistics, _ in measured for s in statistics], sum(n for _, n in measured)


class _SplitLoss:
    """Loss on the validation split of one store; `suffix` is that of the names."""

    def __init__(self, cfg: Config, manifest: Manifest, progress: Progress, suffix: str) -> None:
        self._cfg, self._progress, self._suffix = cfg, progress, suffix
        self._split = manifest.splits["valid"]
        data = cfg.data
        self._reader = Reader(data.store, "valid", manifest, data.cache, data.cache_gb)
        eos_id, start_id = manifest.eos_id, manifest.start_id

        def sums(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
            _, parts = next_token_loss(params, cfg, batch, eos_id, start_id=start_id)
            return parts["loss"], parts["targets"]

        self._sums = jax.jit(sums)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token of the split stands for, in the mean."""
        return self._split.bytes / max(1, self._split.tokens)

    def lost_bits_per_byte(self) -> dict[str, float]:
        """As `ValidationLoss.lost_bits_per_byte`."""
        bits, name = self._split.lost_bits, f"valid_lost_bits_per_byte{self._suffix}"
        return {name: bits / self._split.bytes} if bits else {}

    def measure(self, params: Params) -> tuple[list[Statistic], float]:
        """As `ValidationLoss.measure`."""
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
            Statistic(f"valid_loss{self._suffix}", nats, tokens),
            Statistic(f"valid_perplexity{self._suffix}", nats, tokens, perplexity),
            Statistic(
                f"valid_bits_per_byte{self._suffix}",
                nats / math.log(2) + tokens * (self._split.lost_bits / total),
                tokens * (self._split.bytes / total),
            ),
        ], total
