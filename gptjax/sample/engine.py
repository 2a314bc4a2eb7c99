"""Continuous batching: requests wait in a queue for a slot; a slot that ends takes the next one.

This is the host's side of `decoding`. Every decision follows from the requests and the tokens
drawn, so all processes of a distributed run make the same ones.

Shapes: as in `decoding`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.model.layers import NEVER
from gptjax.parallel import arrays, sharding
from gptjax.sample import decoding
from gptjax.sample.decoding import BURST, INLINE_PROMPT, DecodeConfig, DecodeOutput, Slots
from gptjax.sample.logits_processors import ProcessorParams
from gptjax.sample.sampling_params import MOST_LOGPROBS, SamplingParams

CHUNK = 256
"""Most tokens of a prompt in one prefill; longer prompts are prefilled in chunks."""
PREFILL_TOKENS = 8192
"""Most tokens of prompts, with padding, that are prefilled together."""


Item = TypeVar("Item")


def padded_groups(
    items: Iterable[Item], length: Callable[[Item], int], max_tokens: int
) -> Iterator[list[Item]]:
    """Groups of items of at most `max_tokens` tokens, with padding; `items` ascend by length."""
    group: list[Item] = []
    for item in items:
        if group and bucket(len(group) + 1) * bucket(length(item), 16) > max_tokens:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def bucket(n: int, least: int = 1) -> int:
    """The size that shapes are rounded up to, so that few programs are compiled: the next power of
    two, and at least `least`.
    """
    return max(least, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Token:
    """A token of a continuation, with its log-probability and the likeliest tokens and theirs, if
    requested. The log-probabilities are the model's, before any logits processor.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    """A prompt to continue `settings.samples` times.

    `index` numbers the prompts that share a seed: it selects the random streams of this one.
    """

    prompt: Sequence[int]
    settings: SamplingParams
    stop_ids: tuple[int, ...] = ()
    index: int = 0
    cancelled: set[int] = field(default_factory=set)

    def cancel(self, sample: int | None = None) -> None:
        """Ends one sample, or all; its slot is free before the next burst."""
        self.cancelled |= set(range(self.settings.samples)) if sample is None else {sample}


@dataclass(frozen=True)
class Event:
    """New tokens of a sample; none while decode steps read its prompt.

    `finish` is None until the sample ends, then "stop" after a stop token, which is its last token,
    or "length" after `max_tokens`.
    """

    request: Request
    sample: int
    tokens: list[Token]
    finish: str | None


@dataclass
class _Assignment:
    """The sample that a slot decodes."""

    request: Request
    sample: int
    left: int


@dataclass
class _KeptPrefill:
    """A prefilled prompt, row `row` of `caches`, of which more samples wait for a slot."""

    request: Request
    caches: decoder.Caches
    row: int


class EngineLimits(NamedTuple):
    """The most that a request may use: stop tokens, biased and banned tokens, and penalties."""

    stops: int = 1
    biases: int = 0
    penalties: bool = False

    @classmethod
    def needed(cls, settings: SamplingParams, stop_ids: Sequence[int]) -> "EngineLimits":
        """The limits that one request needs."""
        biases = len(settings.logit_bias) + len(settings.banned)
        return cls(len(stop_ids), biases, settings.has_penalties)

    @classmethod
    def of(cls, settings: SamplingParams, stop_ids: Sequence[int]) -> "EngineLimits":
        """The limits that one request needs, rounded up."""
        stops, biases, penalties = cls.needed(settings, stop_ids)
        return cls(bucket(stops or 1), bucket(biases, 4) if biases else 0, penalties)


class Engine:
    """Continuous batching over `slots` decode slots, on the ambient mesh.

    `params` and `model` come from `decoding.decoding_params`. `capacity` is the most tokens of
    prompt and continuation together. Only ids below `vocab_size` are drawn. The number of slots is
    rounded up to a multiple of the batch axes' size.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        compute: ComputeConfig,
        *,
        slots: int,
        capacity: int,
        limits: EngineLimits,
        vocab_size: int,
    ) -> None:
        shards = sharding.axis_size("batch")
        self._params, self._config = params, DecodeConfig(model, compute)
        self._vocab_size = np.int32(vocab_size)
        self._capacity = capacity
        self._count = -(-slots // shards) * shards
        self._caches = empty_caches(model, self._count, capacity, compute.dtype)
        self._assigned: list[_Assignment | None] = [None] * self._count
        self._waiting: deque[tuple[Request, int]] = deque()
        self._limits = limits
        self._kept: _KeptPrefill | None = None
        self._slots = shard_batch(self._empty_slots())

    # --- public ---

    @property
    def slots(self) -> int:
        """Samples that decode at a time."""
        return self._count

    @property
    def busy(self) -> int:
        """Slots that decode a sample."""
        return sum(one is not None for one in self._assigned)

    @property
    def waiting(self) -> int:
        """Samples in the queue."""
        return sum(sample not in request.cancelled for request, sample in self._waiting)

    def submit(self, *requests: Request) -> None:
        """Puts requests into the queue; `sampling_params.check` must have passed them.

        Raises ConfigError for a request that exceeds the engine's capacity or limits.
        """
        for request in requests:
            length = len(request.prompt) + request.settings.max_tokens
            if length > self._capacity:
                raise ConfigError(
                    [
                        f"max_tokens={request.settings.max_tokens}: with a prompt of "
                        f"{len(request.prompt)} tokens, more than the engine's capacity of "
                        f"{self._capacity} tokens"
                    ]
                )
            self._check_limits(EngineLimits.needed(request.settings, request.stop_ids))
            self._enable(request.settings)
            self._waiting += [(request, sample) for sample in range(request.settings.samples)]

    def step(self, limit: int = BURST) -> list[Event]:
        """Assigns free slots from the queue, then runs up to `limit` decode steps."""
        self._drop_cancelled()
        self._fill()
        if not self.busy:
            return []
        self._slots, self._caches, output = decoding.burst(
            self._params,
            self._slots,
            self._caches,
            np.int32(min(limit, BURST)),
            np.bool_(bool(self._waiting)),
            self._vocab_size,
            self._config,
        )
        return list(self._events(arrays.to_host(output)))

    def run(self, limit: int = BURST) -> Iterator[Event]:
        """Steps until the queue is empty and every slot has ended."""
        while self.busy or self.waiting:
            yield from self.step(limit)

    # --- queue and slots ---

    def _check_limits(self, needed: EngineLimits) -> None:
        for name, used, limit in zip(EngineLimits._fields, needed, self._limits, strict=True):
            if used > limit:
                raise ConfigError(
                    [
                        f"{name}={used}: this request exceeds the engine's limit for {name}, "
                        f"{limit}; use less, or raise EngineLimits.{name}"
                    ]
                )

    def _enable(self, settings: SamplingParams) -> None:
        """Adds the features that a request uses to the compiled ones; none is ever removed."""
        config, logprobs = self._config, self._config.logprobs
        if settings.logprobs is not None:
            asked = next(n for n in (0, 1, 5, MOST_LOGPROBS) if n >= settings.logprobs)
            logprobs = asked if logprobs is None else max(logprobs, asked)
        self._config = replace(
            config,
            sampling=config.sampling or settings.temperature > 0,
            truncation=config.truncation or settings.truncates,
            logprobs=logprobs,
        )

    def _drop_cancelled(self) -> None:
        cancelled = np.zeros(self._count, bool)
        for slot, one in enumerate(self._assigned):
            if one is not None and one.sample in one.request.cancelled:
                self._assigned[slot], cancelled[slot] = None, True
        if cancelled.any():
            self._replace_slots(cancelled, self._empty_slots())

    def _fill(self) -> None:
        """Assigns free slots to waiting samples; those of one prompt share its prefill."""
        free = [slot for slot, one in enumerate(self._assigned) if one is None]
        taken: dict[Request, list[int]] = {}
        new, chosen = self._empty_slots(), np.zeros(self._count, bool)
        while free and self._waiting:
            request, sample = self._waiting.popleft()
            if sample in request.cancelled:
                continue
            slot = free.pop(0)
            self._assigned[slot] = _Assignment(request, sample, request.settings.max_tokens)
            taken.setdefault(request, []).append(slot)
            _write_slot(new, slot, request, sample, self._config.model.table)
            chosen[slot] = True
        if not taken:
            return
        self._prefill(taken)
        self._replace_slots(chosen, new)

    def _prefill(self, taken: dict[Request, list[int]]) -> None:
        """Prefills prompts, without their last tokens, and inserts them into their slots.

        Prompts of similar length are prefilled together; decode steps read the shortest instead.
        A prefill is kept while samples of its prompt wait.
        """
        kept, self._kept = self._kept, None
        taken = {r: slots for r, slots in taken.items() if not _is_inline(r.prompt)}
        if kept is not None and kept.request in taken:
            self._insert([kept.request], kept.caches, kept.row, taken)
        else:
            kept = None
        length = lambda request: len(request.prompt)
        new = sorted((r for r in taken if kept is None or r is not kept.request), key=length)
        for group in padded_groups(new, length, PREFILL_TOKENS):
            prompts = [request.prompt for request in group]
            caches = prompt_caches(
                self._params, self._config.model, self._config.compute, prompts, self._capacity
            )
            if caches is not None:
                self._insert(group, caches, 0, taken)

    def _insert(
        self,
        requests: list[Request],
        caches: decoder.Caches,
        first: int,
        taken: dict[Request, list[int]],
    ) -> None:
        """Copies rows `first`, … of the prefilled caches into the slots of their requests."""
        width = bucket(max(len(taken[request]) for request in requests))
        slots = np.full((caches[0].keys_PBKSC.shape[1], width), self._count, np.int32)
        for row, request in enumerate(requests, first):
            slots[row, : len(taken[request])] = taken[request]
            if self._waiting and self._waiting[0][0] is request:
                self._kept = _KeptPrefill(request, caches, row)
        self._caches = decoding.insert_prompts(self._caches, caches, slots)

    def _events(self, output: DecodeOutput) -> Iterator[Event]:
        for slot, one in enumerate(self._assigned):
            if one is None:
                continue
            steps = np.flatnonzero(output.tokens_BU[slot] >= 0)
            tokens = list(_tokens(one.request, output, slot, steps))
            one.left -= len(tokens)
            finish = "length" if one.left == 0 else None
            if tokens and tokens[-1].id in one.request.stop_ids:
                finish = "stop"
            if finish:
                self._assigned[slot] = None
            yield Event(one.request, one.sample, tokens, finish)

    def _empty_slots(self) -> Slots[np.ndarray]:
        return empty_slots(self._count, self._config.model.table, self._limits)

    def _replace_slots(self, chosen: np.ndarray, new: Slots[np.ndarray]) -> None:
        self._slots = decoding.replace_slots(self._slots, *shard_batch((chosen, new)))


def _is_inline(prompt: Sequence[int]) -> bool:
    """Whether decode steps read a prompt: only on CPUs, where a step takes as long for many slots
    as for few.
    """
    return len(prompt) <= 1 + INLINE_PROMPT and sharding.platform() == "cpu"


def _tokens(
    request: Request, output: DecodeOutput, slot: int, steps: np.ndarray
) -> Iterator[Token]:
    """The tokens that a slot drew at these steps, with the log-probabilities requested."""
    asked = request.settings.logprobs
    for i in steps:
        token = int(output.tokens_BU[slot, i])
        if asked is None:
            yield Token(token)
            continue
        assert output.logprobs_BU is not None
        top: tuple[tuple[int, float], ...] = ()
        if asked:
            assert output.top_ids_BUa is not None
            assert output.top_logprobs_BUa is not None
            top_ids, values = output.top_ids_BUa[slot, i], output.top_logprobs_BUa[slot, i]
            top = tuple(zip(top_ids[:asked].tolist(), values[:asked].tolist(), strict=True))
        yield Token(token, float(output.logprobs_BU[slot, i]), top)


def prompt_caches(
    params: Params,
    model: ModelConfig,
    compute: ComputeConfig,
    prompts: Sequence[Sequence[int]],
    capacity: int,
) -> decoder.Caches | None:
    """Prefilled KV caches of the prompts without their last tokens, one row for each and padding.

    None if no prompt has a second token. `capacity` is that of the caches that they are inserted
    into.
    """
    known = [prompt[:-1] for prompt in prompts]
    longest = max(map(len, known))
    if not longest:
        return None
    shards = sharding.axis_size("batch")
    rows = -(-bucket(len(known)) // shards) * shards
    chunk = min(bucket(longest, 16), _chunk(capacity))
    tokens = np.zeros((rows, -(-longest // chunk) * chunk), np.int32)
    positions = np.full_like(tokens, -1)
    for i, prompt in enumerate(known):
        tokens[i, : len(prompt)] = prompt
        positions[i, : len(prompt)] = np.arange(len(prompt))
    size = min(bucket(longest, 16), capacity)
    caches = empty_caches(model, rows, size, compute.dtype, capacity)
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        sharded = shard_batch((tokens[:, part], positions[:, part]))
        caches = decoding.prefill(params, sharded, caches, model, compute)
    return caches


def _chunk(capacity: int) -> int:
    return min(CHUNK, bucket(capacity, 16))


_empty_caches = jax.jit(decoder.empty_caches, static_argnums=(0, 1, 2, 3, 4))


def empty_caches(
    model: ModelConfig, slots: int, size: int, dtype: str, capacity: int | None = None
) -> decoder.Caches:
    """Empty KV caches of `size` tokens a slot.

    Their ring buffers are as large as those of caches of `capacity` tokens, by default `size`.
    """
    return _empty_caches(model, slots, size, dtype, _chunk(capacity or size))


# --- slots as arrays ---------------------------------------------------------------------------


def empty_slots(b: int, table: int, limits: EngineLimits) -> Slots[np.ndarray]:
    """`b` slots with nothing to do, as host arrays; `table` rows in the embedding."""
    number = lambda value: np.full(b, value, np.float32)
    return Slots(
        token_B=np.zeros(b, np.int32),
        prompt_Br=np.full((b, INLINE_PROMPT), -1, np.int32),
        position_B=np.full(b, -1, np.int32),
        left_B=np.zeros(b, np.int32),
        stop_Bm=np.full((b, limits.stops), -1, np.int32),
        stream_B3=np.zeros((b, 3), np.uint32),
        params=ProcessorParams(
            bias_ids_Bn=np.full((b, limits.biases), 2**31 - 1, np.int32),
            bias_Bn=np.zeros((b, limits.biases), np.float32),
            repetition_B=number(1),
            presence_B=number(0),
            frequency_B=number(0),
            temperature_B=number(0),
            top_k_B=np.zeros(b, np.int32),
            top_p_B=number(1),
            min_p_B=number(0),
        ),
        seen_BV=np.zeros((b, table), bool) if limits.penalties else None,
        counts_BV=np.zeros((b, table), np.int32) if limits.penalties else None,
    )


def _write_slot(
    slots: Slots[np.ndarray], slot: int, request: Request, sample: int, table: int
) -> None:
    """Writes a sample of a request into a slot of host arrays."""
    s, params = request.settings, slots.params
    first = 0 if _is_inline(request.prompt) else len(request.prompt) - 1
    slots.token_B[slot], *rest = request.prompt[first:]
    slots.prompt_Br[slot, : len(rest)] = rest
    slots.position_B[slot] = first
    slots.left_B[slot] = s.max_tokens
    slots.stop_Bm[slot, : len(request.stop_ids)] = request.stop_ids
    slots.stream_B3[slot] = s.seed, request.index, sample
    biases = [*s.logit_bias, *((token, NEVER) for token in s.banned)]
    for i, (token, bias) in enumerate(biases):
        params.bias_ids_Bn[slot, i], params.bias_Bn[slot, i] = token, bias
    params.repetition_B[slot] = s.repetition_penalty
    params.presence_B[slot] = s.presence_penalty
    params.frequency_B[slot] = s.frequency_penalty
    params.temperature_B[slot] = s.temperature
    params.top_k_B[slot] = min(s.top_k, table)
    params.top_p_B[slot] = s.top_p
    params.min_p_B[slot] = s.min_p
    if slots.seen_BV is not None:
        slots.seen_BV[slot, list(request.prompt)] = True


def shard_batch(tree: Any) -> Any:
    """Host arrays, the same on every process, sharded over the batch axes by their first dim."""
    mesh = jax.sharding.get_mesh()

    def place(array: np.ndarray) -> jax.Array:
        axes = sharding.spec("batch", *[None] * (array.ndim - 1))
        layout = jax.NamedSharding(mesh, axes)
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    return jax.tree.map(place, tree)
