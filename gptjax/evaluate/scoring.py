"""Log-probabilities of continuations: what every other measure here is made of.

Whole forward passes, as in training, without a cache. Rows are filled up on the right, where causal
attention does not look, to one of a few lengths, so few programs are compiled; logits exist for a
slice of positions at a time.

Shapes: B rows, T tokens, W = T+1, D embed, V vocabulary; c positions of a slice, n = B*c.
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
from gptjax.sample.engine import bucket, place_rows
from gptjax.tokenizer import Tokenizer

SHORTEST = 16
"""The least length that rows are filled up to, in tokens."""
SLICE = 1024
"""Tokens whose scores of the whole vocabulary a device holds at a time, or one of each row."""

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Score:
    """Of a continuation: its log-probability in nats, how many tokens it has, and whether each of
    them is the likeliest in its place (of equals, the first)."""

    logprob: float
    tokens: int
    greedy: bool


class Scorer:
    """Scores continuations after contexts, both token ids, on the ambient mesh.

    `rows` go through the model at a time, rounded up to what the mesh splits evenly; `limit` is the
    most tokens that it reads of one, `model.context` unless given; a longer context loses its
    beginning.
    """

    def __init__(
        self,
        model: ModelConfig,
        compute: ComputeConfig,
        rows: int,
        progress: Progress,
        limit: int | None = None,
    ) -> None:
        self.model, self.compute = model, compute
        self.limit = model.context if limit is None else limit
        self.rows, self._progress = rows, progress

    def cut(self, pairs: Sequence[tuple[Ids, Ids]]) -> int:
        """How many of these lose the beginning of their context."""
        return sum(_length(pair) > self.limit for pair in pairs)

    def score(
        self, params: Params, pairs: Sequence[tuple[Ids, Ids]], name: str = "score"
    ) -> list[Score]:
        """The score of each pair (context, continuation), in their order; `name` is the bar's.

        A context has at least one token. Raises DataError for a continuation that is empty or
        longer than the limit.
        """
        for number, (_, continuation) in enumerate(pairs):
            if not 1 <= len(continuation) <= self.limit:
                raise DataError(
                    f"{name}: continuation {number} has {len(continuation)} tokens; the model "
                    f"takes from 1 to {self.limit}"
                )
        lengths = [_length(pair) for pair in pairs]
        # The longest first: what does not fit in memory fails at once.
        order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
        rows = -(-self.rows // sharding.axis_size("batch")) * sharding.axis_size("batch")
        scores: list[Score] = [Score(0.0, 0, True)] * len(pairs)
        waiting: list[tuple[list[int], tuple[jax.Array, ...]]] = []

        def take(most: int) -> None:
            """Results of batches, until only so many wait: it keeps their queue short."""
            while len(waiting) > most:
                batch, sums = waiting.pop(0)
                for i, *one in zip(
                    batch, *map(np.ndarray.tolist, arrays.to_host(sums)), strict=False
                ):
                    scores[i] = Score(*one)

        with self._progress.bar(name, len(pairs), unit="row") as bar:
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                windows = self._windows([pairs[i] for i in batch], lengths[batch[0]], rows)
                sums = _sums(params, *place_rows(windows), self.model, self.compute)
                waiting.append((batch, sums))
                take(1)
                bar.update(start + len(batch))
            take(0)
        return scores

    def _windows(
        self, pairs: Sequence[tuple[Ids, Ids]], longest: int, rows: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [B, W], and the first and the last (excluded) of each row's targets that count."""
        length = min(bucket(min(longest, self.limit), SHORTEST), self.model.context)
        stretches = 2 * sharding.axis_size("seq") if sharding.axis_size("seq") > 1 else 1
        length = -(-length // stretches) * stretches
        windows = np.zeros((rows, length + 1), np.int32)
        first, last = np.zeros((2, rows), np.int32)
        for row, (context, continuation) in enumerate(pairs):
            kept = context[max(0, len(context) + len(continuation) - self.limit - 1) :]
            windows[row, : len(kept)] = kept
            first[row], last[row] = len(kept) - 1, len(kept) - 1 + len(continuation)
            windows[row, len(kept) : last[row] + 1] = continuation
        return windows, first, last


def _length(pair: tuple[Ids, Ids]) -> int:
    """Tokens that the model reads: all but the last."""
    return len(pair[0]) + len(pair[1]) - 1


@functools.partial(jax.jit, static_argnums=(4, 5))
def _sums(
    params: Params,
    windows_BW: jax.Array,
    first_B: jax.Array,
    last_B: jax.Array,
    model: ModelConfig,
    compute: ComputeConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each row, over its targets from first to last: the sum of their log-probabilities, their
    number, and whether all are the likeliest. Whole on every device.
    """
    tokens_BT, targets_BT = windows_BW[:, :-1], windows_BW[:, 1:]
    b, t = tokens_BT.shape
    place_T = jnp.arange(t)
    counts_BT = (place_T >= first_B[:, None]) & (place_T < last_B[:, None])
    x_ND = decoder.apply(params, model, compute, tokens_BT).x_ND
    held_ND = jax.sharding.reshard(x_ND, sharding.spec("tokens", "embed"))
    x_BTD = sequence.gather_natural(sequence.unflatten(held_ND, b, (x_ND.shape[-1],), ("embed",)))
    local = b // sharding.axis_size("batch")
    width = next(c for c in range(t, 0, -1) if t % c == 0 and (c == 1 or c * local <= SLICE))
    flat = lambda a_Bc: sequence.flatten(a_Bc, "batch")

    def cut(a_BT: jax.Array) -> jax.Array:
        """[B, T, ...] in slices [T/c, B, c, ...]."""
        shape = (b, t // width, width, *a_BT.shape[2:])
        axes = sharding.spec("batch", *[None] * (len(shape) - 1))
        return lax.reshape(a_BT, shape, out_sharding=axes).swapaxes(0, 1)

    def add(total: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]):
        x_BcD, targets_Bc, counts_Bc = part
        logits_nV = decoder.logits(params, model, flat(x_BcD))
        ids_V = jnp.arange(logits_nV.shape[-1], out_sharding=sharding.spec("vocab"))
        target_n1 = flat(targets_Bc)[:, None]
        own_n1 = jnp.where(ids_V == target_n1, logits_nV, 0).sum(-1, keepdims=True)
        ahead_nV = (logits_nV > own_n1) | ((logits_nV == own_n1) & (ids_V < target_n1))
        top_n1 = logits_nV.max(-1, keepdims=True)
        log_total_n = jnp.log(jnp.exp(logits_nV - top_n1).sum(-1))
        logprob_n = (own_n1 - top_n1)[:, 0] - log_total_n
        rows = lambda a_n: lax.reshape(a_n, (b, width), out_sharding=sharding.spec("batch", None))
        nats_B = jnp.where(counts_Bc, rows(logprob_n), 0).sum(1)
        beaten_B = (counts_Bc & rows(ahead_nV.any(-1))).any(1)
        return (total[0] + nats_B, total[1] | beaten_B), None

    zeros = lambda dtype: jnp.zeros(b, dtype, out_sharding=sharding.spec("batch"))
    start = (zeros(jnp.float32), zeros(jnp.bool_))
    (nats_B, beaten_B), _ = lax.scan(add, start, tuple(map(cut, (x_BTD, targets_BT, counts_BT))))
    whole = lambda a_B: jax.sharding.reshard(a_B, jax.P(None))
    return whole(nats_B), whole(counts_BT.sum(1)), whole(~beaten_B)


# --- text to pairs -----------------------------------------------------------------------------


def prefix_id(tokenizer: Tokenizer) -> int:
    """The token that stands before a text that nothing is before: BOS, or EOS where there is none.

    As lm_eval has it.
    """
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what continues it, the two encoded as one prompt.

    Spaces at the context's end belong to the continuation, with whose first word they make a token.
    As lm_eval has it.
    """
    bare = context.rstrip()
    if not bare:
        ids = tokenizer.encode(context + continuation)
        return [prefix_id(tokenizer)], ids
    whole = tokenizer.prompt(context + continuation)
    known = tokenizer.prompt(bare)
    return known, whole[len(known) :]
