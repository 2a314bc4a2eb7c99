"""Continuous batching: requests wait for a row, a row that ends takes the next one.

The host's side of `decoding`. Everything is decided from the requests and from the tokens drawn, so
on several processes each comes to the same decisions.

Shapes: as in `decoding`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.model.layers import NEVER
from gptjax.parallel import arrays, sharding
from gptjax.sample import decoding
from gptjax.sample.decoding import BURST, READ, Drawn, Plan, Rows
from gptjax.sample.logits_processors import Knobs
from gptjax.sample.sampling_params import MOST_LOGPROBS, SamplingParams

CHUNK = 256
"""Most tokens of a prompt that are prefilled at a time."""


PREFILL_TOKENS = 8192
"""Most tokens of prompts, filled up to one length, that are prefilled side by side."""


def in_groups(
    items: Iterable[Any], length: Callable[[Any], int], tokens: int
) -> Iterator[list[Any]]:
    """Items, ascending by length, in groups of at most so many tokens when filled up."""
    group: list[Any] = []
    for item in items:
        if group and bucket(len(group) + 1) * bucket(length(item), 16) > tokens:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def bucket(n: int, least: int = 1) -> int:
    """The next power of two: what shapes are rounded up to, so that few programs are compiled."""
    return max(least, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Token:
    """A token of a continuation; its log-probability under the model as it is, before any setting,
    and those of the likeliest tokens, where the settings ask for them.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    """A prompt to continue `settings.samples` times.

    `index` is its place among the prompts of one seed: it chooses the streams of its draws.
    """

    prompt: Sequence[int]
    settings: SamplingParams
    stop_ids: tuple[int, ...] = ()
    index: int = 0
    cancelled: set[int] = field(default_factory=set)

    def cancel(self, sample: int | None = None) -> None:
        """Wants no more of one sample, or of all; its row is free before the next burst."""
        self.cancelled |= set(range(self.settings.samples)) if sample is None else {sample}


@dataclass(frozen=True)
class Event:
    """New tokens of a sample; none while its prompt is read.

    `finish` is None while it goes on, "stop" after a stop token, which is the last of its tokens,
    "length" at its bound.
    """

    request: Request
    sample: int
    tokens: list[Token]
    finish: str | None


@dataclass
class _Seat:
    """Who sits in a row."""

    request: Request
    sample: int
    left: int


@dataclass
class _Kept:
    """A prompt whose prefill is not yet in all its rows, and its place in the caches."""

    request: Request
    caches: decoder.Caches
    place: int


class Room(NamedTuple):
    """What rows have room for: stop tokens, biased and banned tokens, and whether penalties."""

    stops: int = 1
    biases: int = 0
    penalties: bool = False

    @classmethod
    def needed(cls, settings: SamplingParams, stop_ids: Sequence[int]) -> "Room":
        """What one request needs."""
        biases = len(settings.logit_bias) + len(settings.banned)
        return cls(len(stop_ids), biases, settings.penalised)

    @classmethod
    def of(cls, settings: SamplingParams, stop_ids: Sequence[int]) -> "Room":
        """Room for one request, rounded up."""
        stops, biases, penalties = cls.needed(settings, stop_ids)
        return cls(bucket(stops or 1), bucket(biases, 4) if biases else 0, penalties)


class Engine:
    """Rows that decode side by side, on the ambient mesh.

    `params` and `model` are those of `decoding.decoding_params`; `capacity` bounds prompt and
    continuation together, `room` what requests may ask for. Ids below `vocab_size` are drawn.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        compute: ComputeConfig,
        *,
        rows: int,
        capacity: int,
        room: Room,
        vocab_size: int,
    ) -> None:
        shards = sharding.axis_size("batch")
        self._params, self._model, self._compute = params, model, compute
        self._vocab = np.int32(vocab_size)
        self._capacity = capacity
        self._count = -(-rows // shards) * shards
        self._caches = empty_caches(model, self._count, capacity, compute.dtype)
        self._seats: list[_Seat | None] = [None] * self._count
        self._waiting: deque[tuple[Request, int]] = deque()
        self._plan = Plan(drawn=False, filtered=False, logprobs=None)
        self._room = room
        self._kept: _Kept | None = None
        self._rows = place_rows(self._blank())

    # --- what a caller sees ---

    @property
    def rows(self) -> int:
        """Samples that decode at a time."""
        return self._count

    @property
    def busy(self) -> int:
        """Rows that are taken."""
        return sum(seat is not None for seat in self._seats)

    @property
    def waiting(self) -> int:
        """Samples without a row yet."""
        return sum(sample not in request.cancelled for request, sample in self._waiting)

    def submit(self, *requests: Request) -> None:
        """Puts requests into the queue. They are taken as checked, see `settings.check`.

        Raises ConfigError for one that needs more than the engine's capacity or room.
        """
        for request in requests:
            length = len(request.prompt) + request.settings.max_tokens
            if length > self._capacity:
                raise ConfigError(
                    [
                        f"max_tokens={request.settings.max_tokens}: with a prompt of "
                        f"{len(request.prompt)} tokens more than the {self._capacity} of a row"
                    ]
                )
            needed = Room.needed(request.settings, request.stop_ids)
            if short := [n for n in Room._fields if getattr(needed, n) > getattr(self._room, n)]:
                raise ConfigError([f"{short[0]}: the engine has no room for those of this request"])
            self._provide(request.settings)
            self._waiting += [(request, sample) for sample in range(request.settings.samples)]

    def step(self, limit: int = BURST) -> list[Event]:
        """Fills free rows from the queue and reads or draws up to `limit` tokens for each."""
        self._drop_cancelled()
        self._fill()
        if not self.busy:
            return []
        self._rows, self._caches, drawn = decoding.burst(
            self._params,
            self._rows,
            self._caches,
            np.int32(min(limit, BURST)),
            np.bool_(bool(self._waiting)),
            self._vocab,
            self._model,
            self._compute,
            self._plan,
        )
        return list(self._events(arrays.to_host(drawn)))

    def run(self, limit: int = BURST) -> Iterator[Event]:
        """Steps until nothing waits and every row has ended."""
        while self.busy or self.waiting:
            yield from self.step(limit)

    # --- queue and rows ---

    def _provide(self, settings: SamplingParams) -> None:
        """Widens what is compiled to what a request needs; it never narrows again."""
        plan, asked = self._plan, None
        if settings.logprobs is not None:
            asked = next(n for n in (0, 1, 5, MOST_LOGPROBS) if n >= settings.logprobs)
        self._plan = Plan(
            drawn=plan.drawn or settings.temperature > 0,
            filtered=plan.filtered or settings.filtered,
            logprobs=max((n for n in (plan.logprobs, asked) if n is not None), default=None),
        )

    def _drop_cancelled(self) -> None:
        gone = np.zeros(self._count, bool)
        for row, seat in enumerate(self._seats):
            if seat is not None and seat.sample in seat.request.cancelled:
                self._seats[row], gone[row] = None, True
        if gone.any():
            self._rows = self._seat(gone, self._blank())

    def _fill(self) -> None:
        """Gives free rows to waiting samples; those of one prompt share its prefill."""
        free = [row for row, seat in enumerate(self._seats) if seat is None]
        taken: dict[Request, list[int]] = {}
        new, chosen = self._blank(), np.zeros(self._count, bool)
        while free and self._waiting:
            request, sample = self._waiting.popleft()
            if sample in request.cancelled:
                continue
            row = free.pop(0)
            self._seats[row] = _Seat(request, sample, request.settings.max_tokens)
            taken.setdefault(request, []).append(row)
            self._describe(new, row, request, sample)
            chosen[row] = True
        if not taken:
            return
        self._prefill(taken)
        self._rows = self._seat(chosen, new)

    def _prefill(self, taken: dict[Request, list[int]]) -> None:
        """Computes the prompts that decoding does not read itself, all but their last tokens, and
        puts them into their rows.

        Short ones together; the last one is kept while samples of it wait.
        """
        kept, self._kept = self._kept, None
        taken = {r: rows for r, rows in taken.items() if not _is_read(r.prompt)}
        groups = [] if kept is None or kept.request not in taken else [[kept.request]]
        new = sorted(
            (r for r in taken if [r] not in groups), key=lambda request: len(request.prompt)
        )
        groups += in_groups(new, lambda request: len(request.prompt), PREFILL_TOKENS)
        for group in groups:
            if kept is not None and group == [kept.request]:
                caches, first = kept.caches, kept.place
            else:
                prompts = [request.prompt for request in group]
                first, caches = (
                    0,
                    prompt_caches(
                        self._params, self._model, self._compute, prompts, self._capacity
                    ),
                )
            if caches is None:
                continue
            width = bucket(max(len(taken[request]) for request in group))
            rows = np.full((caches[0].keys_PBKSC.shape[1], width), self._count, np.int32)
            for place, request in enumerate(group, first):
                rows[place, : len(taken[request])] = taken[request]
                if self._waiting and self._waiting[0][0] is request:
                    self._kept = _Kept(request, caches, place)
            self._caches = decoding.take_over(self._caches, caches, rows)

    def _events(self, drawn: Drawn) -> Iterator[Event]:
        for row, seat in enumerate(self._seats):
            if seat is None:
                continue
            request, places = seat.request, np.flatnonzero(drawn.tokens_BU[row] >= 0)
            ids = drawn.tokens_BU[row, places].tolist()
            seat.left -= len(ids)
            finish = "length" if seat.left == 0 else None
            if ids and ids[-1] in request.stop_ids:
                finish = "stop"
            if finish:
                self._seats[row] = None
            tokens = list(self._tokens(request, drawn, row, places))
            yield Event(request, seat.sample, tokens, finish)

    @staticmethod
    def _tokens(request: Request, drawn: Drawn, row: int, places: np.ndarray) -> Iterator[Token]:
        asked = request.settings.logprobs
        for i in places:
            token = int(drawn.tokens_BU[row, i])
            if asked is None:
                yield Token(token)
                continue
            top: tuple[tuple[int, float], ...] = ()
            if asked:
                top_ids, values = drawn.top_ids_BUa[row, i], drawn.top_logprobs_BUa[row, i]
                top = tuple(zip(top_ids[:asked].tolist(), values[:asked].tolist(), strict=True))
            yield Token(token, float(drawn.logprobs_BU[row, i]), top)

    # --- rows as data ---

    def _blank(self) -> Rows:
        return blank_rows(self._count, self._model.table, self._room)

    def _describe(self, rows: Rows, row: int, request: Request, sample: int) -> None:
        """Writes a sample of a request into its row."""
        s, knobs = request.settings, rows.knobs
        first = 0 if _is_read(request.prompt) else len(request.prompt) - 1
        rows.token_B[row], *rest = request.prompt[first:]
        rows.prompt_Br[row, : len(rest)] = rest
        rows.position_B[row] = first
        rows.left_B[row] = s.max_tokens
        rows.stop_Bm[row, : len(request.stop_ids)] = request.stop_ids
        rows.stream_B3[row] = s.seed, request.index, sample
        biases = [*s.logit_bias, *((token, NEVER) for token in s.banned)]
        for i, (token, bias) in enumerate(biases):
            knobs.bias_ids_Bn[row, i], knobs.bias_Bn[row, i] = token, bias
        knobs.repetition_B[row] = s.repetition_penalty
        knobs.presence_B[row] = s.presence_penalty
        knobs.frequency_B[row] = s.frequency_penalty
        knobs.temperature_B[row] = s.temperature
        knobs.top_k_B[row] = min(s.top_k, self._model.table)
        knobs.top_p_B[row] = s.top_p
        knobs.min_p_B[row] = s.min_p
        if rows.seen_BV is not None:
            rows.seen_BV[row, list(request.prompt)] = True

    def _seat(self, chosen: np.ndarray, new: Rows) -> Rows:
        return decoding.seat(self._rows, *place_rows((chosen, new)))


def _is_read(prompt: Sequence[int]) -> bool:
    """Whether decoding reads a prompt itself: on a CPU, whose step takes as long for many rows."""
    return len(prompt) <= 1 + READ and sharding.platform() == "cpu"


def prompt_caches(
    params: Params,
    model: ModelConfig,
    compute: ComputeConfig,
    prompts: Sequence[Sequence[int]],
    capacity: int,
) -> decoder.Caches | None:
    """Caches with all tokens of the prompts but their last in them, for a row each and some more.

    None where no prompt has a second token. `capacity` is that of the caches they are taken to.
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
        placed = place_rows((tokens[:, part], positions[:, part]))
        caches = decoding.prefill(params, placed, caches, model, compute)
    return caches


def _chunk(capacity: int) -> int:
    return min(CHUNK, bucket(capacity, 16))


_empty_caches = jax.jit(decoder.empty_caches, static_argnums=(0, 1, 2, 3, 4))


def empty_caches(
    model: ModelConfig, rows: int, size: int, dtype: str, capacity: int | None = None
) -> decoder.Caches:
    """Caches of so many tokens, whose rings are those of caches of `capacity` tokens."""
    return _empty_caches(model, rows, size, dtype, _chunk(capacity or size))


def blank_rows(b: int, table: int, room: Room) -> Rows:
    """`b` rows with nothing to do, on the host; `table` rows in the vocabulary's."""
    number = lambda value: np.full(b, value, np.float32)
    penalties = (b, table)
    return Rows(
        token_B=np.zeros(b, np.int32),
        prompt_Br=np.full((b, READ), -1, np.int32),
        position_B=np.full(b, -1, np.int32),
        left_B=np.zeros(b, np.int32),
        stop_Bm=np.full((b, room.stops), -1, np.int32),
        stream_B3=np.zeros((b, 3), np.uint32),
        knobs=Knobs(
            bias_ids_Bn=np.full((b, room.biases), 2**31 - 1, np.int32),
            bias_Bn=np.zeros((b, room.biases), np.float32),
            repetition_B=number(1),
            presence_B=number(0),
            frequency_B=number(0),
            temperature_B=number(0),
            top_k_B=np.zeros(b, np.int32),
            top_p_B=number(1),
            min_p_B=number(0),
        ),
        seen_BV=np.zeros(penalties, bool) if room.penalties else None,
        counts_BV=np.zeros(penalties, np.int32) if room.penalties else None,
    )


def place_rows(tree: Any) -> Any:
    """Host arrays, the same on every process, with their rows laid out over the batch axis."""
    mesh = jax.sharding.get_mesh()

    def place(rows: np.ndarray) -> jax.Array:
        axes = sharding.spec("batch", *[None] * (rows.ndim - 1))
        layout = jax.NamedSharding(mesh, axes)
        return jax.make_array_from_callback(rows.shape, layout, lambda index: rows[index])

    return jax.tree.map(place, tree)
