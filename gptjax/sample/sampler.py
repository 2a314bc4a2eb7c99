"""Texts in, texts out: what other modules and a user's own code call.

with opening.opened("runs/quickstart") as sampler:
    for completion in sampler.generate(["def ", "class "], Settings(temperature=0.8)):
        print(completion.text)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.errors import ConfigError
from gptjax.model.decoder import Params
from gptjax.model.layers import NEVER
from gptjax.parallel import arrays, sharding
from gptjax.sample import beam_search, decoding, logprobs
from gptjax.sample.detokenizer import Continuation
from gptjax.sample.engine import (
    BURST,
    Engine,
    Request,
    Room,
    Token,
    bucket,
    empty_caches,
    in_groups,
    place_rows,
    prompt_caches,
)
from gptjax.sample.sampling_params import MOST_LOGPROBS, BeamSearchParams, SamplingParams, check
from gptjax.tokenizer import Tokenizer

ROWS = 32
"""Samples that decode at a time, unless told otherwise."""
SCORED_TOKENS = 8192
"""Most tokens of texts, filled up to one length, that are scored side by side."""
_WATCHED_BURST = 8  # tokens between two looks for stop texts


@dataclass
class Completion:
    """A continuation: of which prompt, which of its samples (or beams, best first), its text
    without stop token or stop text, and its tokens with them.

    `finish` is "stop" or "length"; `score` a beam's, its log-probability by the length's power.
    """

    prompt: int
    sample: int
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str = "length"
    score: float | None = None

    @property
    def ids(self) -> list[int]:
        """Its token ids."""
        return [token.id for token in self.tokens]


class Sampler:
    """A model ready to continue, stream and score texts, on the ambient mesh.

    Makes a copy of the parameters in compute.dtype; on a CPU it shares those that are in it
    already. `tokenizer` may be None for a model without one: then prompts are token ids, and texts
    are empty. `stop_ids` end a continuation and ids from `vocab_size` on are never drawn; both are
    the tokenizer's unless given.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        compute: ComputeConfig,
        tokenizer: Tokenizer | None = None,
        *,
        stop_ids: Sequence[int] | None = None,
        vocab_size: int | None = None,
        rows: int = ROWS,
    ) -> None:
        self.model, self.compute, self.tokenizer = model, compute, tokenizer
        self._params, self._unrolled = decoding.decoding_params(params, model, compute.dtype)
        self._most = rows
        own = (
            (model.vocab_size, ())
            if tokenizer is None
            else (
                min(tokenizer.vocab_size, model.vocab_size),
                tokenizer.stop_ids,
            )
        )
        self.vocab_size = own[0] if vocab_size is None else vocab_size
        self.stop_ids = own[1] if stop_ids is None else tuple(stop_ids)

    @property
    def params(self) -> Params:
        """The parameters as decoding has them."""
        return self._params

    # --- requests ---

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, by the tokenizer's convention; ids stay as they are."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ConfigError(["this model has no tokenizer: give token ids instead of text"])
        return self.tokenizer.prompt(prompt)

    def piece(self, token: int) -> str:
        """How the vocabulary spells a token; its number where there is no tokenizer."""
        return str(token) if self.tokenizer is None else self.tokenizer.piece(token)

    def request(
        self, prompt: str | Sequence[int], settings: SamplingParams, index: int = 0
    ) -> Request:
        """A checked request. Raises ConfigError as `settings.check` does."""
        (request,) = self.requests([self.ids(prompt)], [settings])
        return replace(request, index=index)

    def requests(
        self, ids: Sequence[list[int]], settings: Sequence[SamplingParams]
    ) -> list[Request]:
        """Checked requests, in their order. Raises ConfigError as `settings.check` does."""
        check(self.model, ids, settings, self.vocab_size)
        if self.tokenizer is None and (with_stop := [s.stop for s in settings if s.stop]):
            what = f"stop={with_stop[0]}: this model has no tokenizer, so no text is ever met"
            raise ConfigError([what])
        pairs = enumerate(zip(ids, settings, strict=True))
        return [Request(prompt, s, self.stop_ids, i) for i, (prompt, s) in pairs]

    def engine(self, *, rows: int, capacity: int, room: Room) -> Engine:
        """An engine on these parameters, see there."""
        return Engine(
            self._params,
            self._unrolled,
            self.compute,
            rows=rows,
            capacity=min(capacity, self.model.context),
            room=room,
            vocab_size=self.vocab_size,
        )

    def engine_for(self, requests: Sequence[Request]) -> Engine:
        """An engine that can serve these requests; sizes are rounded up, to compile seldom."""
        samples = sum(r.settings.samples for r in requests)
        longest = max(len(r.prompt) + r.settings.max_tokens for r in requests)
        rooms = [Room.of(r.settings, r.stop_ids) for r in requests]
        return self.engine(
            rows=min(bucket(samples), self._most),
            capacity=bucket(longest, 16),
            room=Room(*map(max, zip(*rooms, strict=True))),
        )

    def continuation(self, request: Request) -> Continuation | None:
        """What collects a sample's text."""
        if self.tokenizer is None:
            return None
        return Continuation(self.tokenizer, request.prompt, request.settings.stop)

    # --- what users call ---

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Continuations of texts or token ids, in their order, the samples of each together.

        One settings for all, or one for each. Raises ConfigError for what makes no sense.
        """
        done = list(self.complete(self._requests(prompts, settings)))
        return sorted(done, key=lambda completion: (completion.prompt, completion.sample))

    def rehearse(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: SamplingParams | Sequence[SamplingParams],
    ) -> None:
        """Compiles what `generate` will run for these, and draws nothing. Raises as it does."""
        requests = self._requests(prompts, settings)
        engine = self.engine_for(requests)
        engine.submit(*requests)
        engine.step(0)

    def _requests(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: SamplingParams | Sequence[SamplingParams],
    ) -> list[Request]:
        each = [settings] * len(prompts) if isinstance(settings, SamplingParams) else list(settings)
        if len(each) != len(prompts):
            raise ConfigError([f"{len(each)} settings for {len(prompts)} prompts: give as many"])
        return self.requests([self.ids(prompt) for prompt in prompts], each)

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Serves requests side by side, and gives each continuation when it has ended."""
        if not requests:
            return
        engine = self.engine_for(requests)
        engine.submit(*requests)
        watched = any(r.settings.stop for r in requests)
        texts: dict[tuple[int, int], Continuation | None] = {}
        tokens: dict[tuple[int, int], list[Token]] = {}
        for event in engine.run(_WATCHED_BURST if watched else BURST):
            request, key = event.request, (id(event.request), event.sample)
            if key not in tokens:
                tokens[key], texts[key] = [], self.continuation(request)
            text = texts[key]
            new, _ = accept(event.tokens, text, event.finish, self.stop_ids)
            tokens[key] += new
            stopped = text is not None and text.stopped
            if stopped and not event.finish:
                request.cancel(event.sample)
            if stopped or event.finish:
                yield Completion(
                    request.index,
                    event.sample,
                    "" if text is None else text.text,
                    tokens.pop(key),
                    "stop" if stopped else event.finish or "",
                )
                texts.pop(key)

    def stream(
        self,
        prompt: str | Sequence[int],
        settings: SamplingParams,
        burst: int = 1,
    ) -> Iterator[tuple[str, list[Token]]]:
        """One continuation as it comes: text that is certain, and the tokens drawn, `burst` at most
        at a time. Raises ConfigError for what makes no sense.
        """
        if settings.samples != 1:
            raise ConfigError([f"samples={settings.samples}: one continuation streams at a time"])
        request = self.request(prompt, settings)
        engine, text = self.engine_for([request]), self.continuation(request)
        engine.submit(request)
        for event in engine.run(burst):
            if not event.tokens:
                continue
            new, certain = accept(event.tokens, text, event.finish, self.stop_ids)
            yield certain, new
            if text is not None and text.stopped:
                return

    def beam(
        self, prompts: Sequence[str | Sequence[int]], settings: BeamSearchParams
    ) -> list[Completion]:
        """The likeliest continuations that beam search finds, of each prompt, best first."""
        ids = [self.ids(prompt) for prompt in prompts]
        check(self.model, ids, settings, self.vocab_size)
        if not ids:
            return []
        each = max(1, self._most // settings.width)
        done = []
        for start in range(0, len(ids), each):
            for one in self._search(ids[start : start + each], settings):
                done.append(replace(one, prompt=one.prompt + start))
        return done

    def _search(self, ids: list[list[int]], settings: BeamSearchParams) -> Iterator[Completion]:
        """Beam search of a few prompts at a time."""
        shards, width = sharding.axis_size("batch"), settings.width
        b = bucket(len(ids))
        while b * width % shards:
            b += 1
        capacity = min(bucket(max(map(len, ids)) + settings.max_tokens, 16), self.model.context)
        caches = empty_caches(self._unrolled, b * width, capacity, self.compute.dtype)
        prompt = prompt_caches(self._params, self._unrolled, self.compute, ids, capacity)
        if prompt is not None:
            rows = np.full((prompt[0].keys_PBKSC.shape[1], width), b * width, np.int32)
            rows[: len(ids)] = np.arange(len(ids) * width).reshape(-1, width)
            caches = decoding.take_over(caches, prompt, rows)
        last, position = np.zeros(b, np.int32), np.full(b, -1, np.int32)
        last[: len(ids)] = [prompt[-1] for prompt in ids]
        position[: len(ids)] = [len(prompt) - 1 for prompt in ids]
        found = beam_search.search(
            self._params,
            last,
            position,
            caches,
            np.float32(settings.length_penalty),
            np.int32(settings.max_tokens),
            np.int32(self.vocab_size),
            np.bool_(settings.early_stopping is True),
            np.bool_(settings.early_stopping == "never"),
            self._unrolled,
            self.compute,
            self.stop_ids,
            width,
            bucket(settings.max_tokens),
        )
        return self._beams(ids, arrays.to_host(found), settings.returned)

    def _beams(
        self, prompts: list[list[int]], found: beam_search.Beams, returned: int
    ) -> Iterator[Completion]:
        for i, prompt in enumerate(prompts):
            for rank in range(returned):
                score = float(found.scores_bW[i, rank])
                if score <= NEVER:
                    continue
                own = found.tokens_bWU[i, rank, : found.lengths_bW[i, rank]].tolist()
                text = Continuation(self.tokenizer, prompt, ()) if self.tokenizer else None
                finish = "stop" if own[-1] in self.stop_ids else "length"
                tokens, _ = accept([Token(t) for t in own], text, finish, self.stop_ids)
                yield Completion(i, rank, "" if text is None else text.text, tokens, finish, score)

    def score(
        self, texts: Sequence[str | Sequence[int]], alternatives: int = 0
    ) -> list[list[Token]]:
        """Each token of each text with its log-probability after those before it; the first token
        has none. With `alternatives`, also the likeliest tokens in its place.

        Raises ConfigError for a text longer than the context, or with ids that there are not.
        """
        ids = [self.ids(text) for text in texts]
        problems = []
        if not 0 <= alternatives <= MOST_LOGPROBS:
            problems.append(f"alternatives={alternatives}: must be from 0 to {MOST_LOGPROBS}")
        for number, tokens in enumerate(ids):
            if not tokens:
                problems.append(f"text {number}: is empty; give at least one token")
            elif not 0 <= min(tokens) <= max(tokens) < self.model.vocab_size:
                problems.append(f"text {number}: has ids outside 0..{self.model.vocab_size - 1}")
            if len(tokens) > self.model.context:
                problems.append(
                    f"text {number}: has {len(tokens)} tokens, more than "
                    f"model.context={self.model.context}"
                )
        if problems:
            raise ConfigError(problems)
        results: list[list[Token]] = [[]] * len(ids)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for group in in_groups(by_length, lambda i: len(ids[i]), SCORED_TOKENS):
            shards = sharding.axis_size("batch")
            rows = -(-bucket(len(group)) // shards) * shards
            length = min(bucket(max(len(ids[i]) for i in group), 16), self.model.context)
            stretches = 2 * sharding.axis_size("seq")  # that a context axis cuts sequences into
            length = -(-length // stretches) * stretches
            padded = np.zeros((rows, length), np.int32)
            for row, i in enumerate(group):
                padded[row, : len(ids[i])] = ids[i]
            scored = logprobs.score(
                self._params,
                place_rows(padded),
                np.int32(self.vocab_size),
                self._unrolled,
                self.compute,
                alternatives,
            )
            own, top_ids, top = arrays.to_host(scored)
            for row, i in enumerate(group):
                results[i] = [Token(ids[i][0])]
                for at, token in enumerate(ids[i][1:]):
                    pairs = zip(top_ids[row, at].tolist(), top[row, at].tolist(), strict=True)
                    results[i].append(Token(token, float(own[row, at]), tuple(pairs)))
        return results


def accept(
    tokens: list[Token],
    text: Continuation | None,
    finish: str | None,
    stop_ids: Sequence[int],
) -> tuple[list[Token], str]:
    """Adds a sample's new tokens to its text: those up to a stop text, and what is certain now."""
    if text is None:
        return tokens, ""
    certain, taken = "", []
    for i, token in enumerate(tokens):
        last = finish is not None and i == len(tokens) - 1
        taken.append(token)
        certain += text.add([] if token.id in stop_ids else [token.id], last=last)
        if text.stopped:
            break
    return taken, certain
