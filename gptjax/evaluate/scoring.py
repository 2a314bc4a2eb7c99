"""Log-likelihoods of continuations after a context.

Whole forward passes, as in training, without a cache. Sequences are padded on the right, which
causal attention does not see, to one of a few lengths, so few programs are compiled. Logits exist
for a slice of positions at a time.

Shapes: B sequences of a batch, T tokens, W = T + 1, D embed, V vocabulary, N = B*T; within a slice
c positions, n = B*c.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.errors import DataError
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.parallel import arrays, sequence, sharding
from gptjax.runtime.progress import Progress
from gptjax.sample.engine import bucket, shard_batch
from gptjax.tokenizer import Tokenizer

MIN_LENGTH = 16
"""The shortest length to which sequences are padded, in tokens."""
SLICE_TOKENS = 1024
"""Tokens of a slice on one device, or one of each sequence if that is more."""

Ids = Sequence[int] | np.ndarray
Pair = tuple[Ids, Ids]
"""Token ids of a context and of its continuation."""


@dataclass(frozen=True)
class Score:
    """A continuation's log-likelihood in nats, its number of tokens, and whether greedy decoding
    gives it: each token is the likeliest in its place (among equals, the one with the lowest id).
    """

    logprob: float
    tokens: int
    greedy: bool


class Scorer:
    """Scores continuations on the ambient mesh.

    `batch_size` sequences are scored at a time, rounded up to a multiple of the mesh's batch axes.
    The model reads at most `max_length` tokens, by default its context; a longer context is
    truncated at its beginning.
    """

    def __init__(
        self,
        model: ModelConfig,
        compute: ComputeConfig,
        batch_size: int,
        progress: Progress,
        max_length: int | None = None,
    ) -> None:
        self.model, self.compute = model, compute
        self.max_length = model.context if max_length is None else max_length
        self.batch_size, self._progress = batch_size, progress

    def count_truncated(self, pairs: Sequence[Pair]) -> int:
        """The number of pairs whose context is truncated."""
        return sum(_length(pair) > self.max_length for pair in pairs)

    def score(self, params: Params, pairs: Sequence[Pair], name: str = "score") -> list[Score]:
        """The score of each pair, in their order; `name` labels the progress bar and errors.

        A context has at least one token. Raises DataError for a continuation that is empty or
        longer than `max_length`.
        """
        for number, (_, continuation) in enumerate(pairs):
            if not 1 <= len(continuation) <= self.max_length:
                raise DataError(
                    f"{name}: continuation {number} has {len(continuation)} tokens; the model "
                    f"takes from 1 to {self.max_length}"
                )
        lengths = [_length(pair) for pair in pairs]
        # The longest first, so that running out of memory happens at once.
        order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
        shards = sharding.axis_size("batch")
        batch_size = -(-self.batch_size // shards) * shards
        scores: list[Score] = [Score(0.0, 0, True)] * len(pairs)
        queue: list[tuple[list[int], tuple[jax.Array, ...]]] = []

        def collect(keep: int) -> None:
            """Fetches results, oldest first, until `keep` batches are queued on the device."""
            while len(queue) > keep:
                batch, results = queue.pop(0)
                columns = map(np.ndarray.tolist, arrays.to_host(results))
                for i, *values in zip(batch, *columns, strict=False):
                    scores[i] = Score(*values)

        with self._progress.bar(name, len(pairs), unit="row") as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                rows = self._pad([pairs[i] for i in batch], lengths[batch[0]], batch_size)
                queue.append((batch, _score(params, *shard_batch(rows), self.model, self.compute)))
                collect(1)
                bar.update(start + len(batch))
            collect(0)
        return scores

    def _pad(
        self, pairs: Sequence[Pair], longest: int, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids [B, W], and the range [first, last) of each sequence's targets that count."""
        length = min(bucket(min(longest, self.max_length), MIN_LENGTH), self.model.context)
        # With context parallelism each device has two chunks of every sequence.
        chunks = 2 * sharding.axis_size("seq") if sharding.axis_size("seq") > 1 else 1
        length = -(-length // chunks) * chunks
        ids = np.zeros((batch_size, length + 1), np.int32)
        first, last = np.zeros((2, batch_size), np.int32)
        for row, (context, continuation) in enumerate(pairs):
            kept = context[max(0, len(context) + len(continuation) - self.max_length - 1) :]
            ids[row, : len(kept)] = kept
            first[row], last[row] = len(kept) - 1, len(kept) - 1 + len(continuation)
            ids[row, len(kept) : last[row] + 1] = continuation
        return ids, first, last


def _length(pair: Pair) -> int:
    """The number of tokens that the model reads: all but the last."""
    return len(pair[0]) + len(pair[1]) - 1


@functools.partial(jax.jit, static_argnums=(4, 5))
def _score(
    params: Params,
    ids_BW: jax.Array,
    first_B: jax.Array,
    last_B: jax.Array,
    model: ModelConfig,
    compute: ComputeConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Over each sequence's targets in [first, last): the sum of their log-probabilities, their
    number, and whether all are the likeliest. The results are replicated on all devices.
    """
    tokens_BT, targets_BT = ids_BW[:, :-1], ids_BW[:, 1:]
    b, t = tokens_BT.shape
    position_T = jnp.arange(t)
    counts_BT = (position_T >= first_B[:, None]) & (position_T < last_B[:, None])
    x_ND = decoder.apply(params, model, compute, tokens_BT).x_ND
    x_ND = jax.sharding.reshard(x_ND, sharding.spec("tokens", "embed"))
    x_BTD = sequence.gather_natural(sequence.unflatten(x_ND, b, (x_ND.shape[-1],), ("embed",)))
    per_device = b // sharding.axis_size("batch")
    fits = lambda c: c == 1 or c * per_device <= SLICE_TOKENS
    width = next(c for c in range(t, 0, -1) if t % c == 0 and fits(c))

    def slices(a_BT: jax.Array) -> jax.Array:
        """[B, T, ...] as slices [T/c, B, c, ...]."""
        shape = (b, t // width, width, *a_BT.shape[2:])
        axes = sharding.spec("batch", *[None] * (len(shape) - 1))
        return lax.reshape(a_BT, shape, out_sharding=axes).swapaxes(0, 1)

    def add(
        total: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        logprob_Bc, likeliest_Bc = _slice_scores(params, model, *part[:2])
        counts_Bc = part[2]
        nats_B = jnp.where(counts_Bc, logprob_Bc, 0).sum(1)
        beaten_B = (counts_Bc & ~likeliest_Bc).any(1)
        return (total[0] + nats_B, total[1] | beaten_B), None

    zeros = lambda dtype: jnp.zeros(b, dtype, out_sharding=sharding.spec("batch"))
    start = (zeros(jnp.float32), zeros(jnp.bool_))
    parts = tuple(map(slices, (x_BTD, targets_BT, counts_BT)))
    (nats_B, beaten_B), _ = lax.scan(add, start, parts)
    replicate = lambda a_B: jax.sharding.reshard(a_B, jax.P(None))
    return replicate(nats_B), replicate(counts_BT.sum(1)), replicate(~beaten_B)


def _slice_scores(
    params: Params, model: ModelConfig, x_BcD: jax.Array, targets_Bc: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each target [B, c], and whether it is the likeliest token."""
    b, width = targets_Bc.shape
    flat = lambda a_Bc: sequence.flatten(a_Bc, "batch")
    logits_nV = decoder.logits(params, model, flat(x_BcD))
    ids_V = jnp.arange(logits_nV.shape[-1], out_sharding=sharding.spec("vocab"))
    target_n1 = flat(targets_Bc)[:, None]
    own_n1 = jnp.where(ids_V == target_n1, logits_nV, 0).sum(-1, keepdims=True)
    ahead_nV = (logits_nV > own_n1) | ((logits_nV == own_n1) & (ids_V < target_n1))
    top_n1 = logits_nV.max(-1, keepdims=True)
    log_total_n = jnp.log(jnp.exp(logits_nV - top_n1).sum(-1))
    logprob_n = (own_n1 - top_n1)[:, 0] - log_total_n
    rows = lambda a_n: lax.reshape(a_n, (b, width), out_sharding=sharding.spec("batch", None))
    return rows(logprob_n), ~rows(ahead_nV.any(-1))


# --- text to pairs -----------------------------------------------------------------------------


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and its continuation, encoded together as one prompt.

    Spaces at the end of the context are encoded with the continuation, since tokens begin with
    spaces. lm_eval does the same.
    """
    bare = context.rstrip()
    if not bare:
        ids = tokenizer.encode(context + continuation)
        return [tokenizer.prefix_id], ids
    whole = tokenizer.prompt(context + continuation)
    context_ids = tokenizer.prompt(bare)
    return context_ids, whole[len(context_ids) :]
