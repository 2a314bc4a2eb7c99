"""Sampling from texts to texts: the class that other modules and a user's own code call.

with gptjax.load("runs/quickstart") as model:
    sampler = model.sampler()
    for completion in sampler.generate(["def", "class"], SamplingParams(temperature=0.8)):
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
    EngineLimits,
    Request,
    Token,
    bucket,
    empty_caches,
    padded_groups,
    prompt_caches,
    shard_batch,
)
from gptjax.sample.sampling_params import MOST_LOGPROBS, BeamSearchParams, SamplingParams, check
from gptjax.tokenizer import Tokenizer

SLOTS = 32
"""Samples that decode at a time, by default."""
SCORED_TOKENS = 8192
"""Most tokens of texts, with padding, that are scored together."""
_STOP_TEXT_BURST = 8  # decode steps between two checks for stop texts


@dataclass
class Completion:
    """A continuation: the indices of its prompt and of its sample (or beam, best first), its text
    without stop token or stop text, and its tokens with them.

    `finish` is "stop" or "length". `score` is a beam's log-probability with the length penalty.
    """

    prompt: int
    sample: int
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str = "length"
    score: float | None = None

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return [token.id for token in self.tokens]


class Sampler:
    """Continues, streams and scores texts with a model, on the ambient mesh.

    Copies the parameters in compute.dtype; on a CPU, those that have this dtype are shared. With
    `consume` they are freed on a GPU as they are copied, and cannot be used afterwards. Without a
    `tokenizer`, prompts are token ids and texts are empty. `stop_ids` end a continuation, and ids
    from `vocab_size` on are never drawn; both are the tokenizer's by default. At most `slots`
    samples decode at a time.
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
        slots: int = SLOTS,
        consume: bool = False,
    ) -> None:
        self.model, self.compute, self.tokenizer = model, compute, tokenizer
        self._params, self._decoding_model = decoding.decoding_params(
            params, model, compute.dtype, consume=consume
        )
        self._slots = slots
        if vocab_size is None:
            vocab_size = model.vocab_size
            if tokenizer is not None:
                vocab_size = min(tokenizer.vocab_size, vocab_size)
        if stop_ids is None:
            stop_ids = () if tokenizer is None else tokenizer.stop_ids
        self.vocab_size, self.stop_ids = vocab_size, tuple(stop_ids)

    @property
    def params(self) -> Params:
        """The parameters in the form that decoding uses, see `decoding.decoding_params`."""
        return self._params

    # --- requests ---

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's token ids, by the tokenizer's convention; ids are returned as they are."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ConfigError(["this model has no tokenizer: give token ids instead of text"])
        return self.tokenizer.prompt(prompt)

    def piece(self, token: int) -> str:
        """A token as the vocabulary has it; its id without a tokenizer."""
        return str(token) if self.tokenizer is None else self.tokenizer.piece(token)

    def request(
        self, prompt: str | Sequence[int], settings: SamplingParams, index: int = 0
    ) -> Request:
        """A validated request. Raises ConfigError as `sampling_params.check` does."""
        (request,) = self.requests([self.ids(prompt)], [settings])
        return replace(request, index=index)

    def requests(
        self, ids: Sequence[list[int]], settings: Sequence[SamplingParams]
    ) -> list[Request]:
        """Validated requests, in order. Raises ConfigError as `sampling_params.check` does."""
        check(self.model, ids, settings, self.vocab_size)
        if self.tokenizer is None and (with_stop := [s.stop for s in settings if s.stop]):
            problem = f"stop={with_stop[0]}: this model has no tokenizer; leave stop texts out"
            raise ConfigError([problem])
        pairs = enumerate(zip(ids, settings, strict=True))
        return [Request(prompt, s, self.stop_ids, i) for i, (prompt, s) in pairs]

    def engine(self, *, slots: int, capacity: int, limits: EngineLimits) -> Engine:
        """An engine with these parameters, see `Engine`."""
        return Engine(
            self._params,
            self._decoding_model,
            self.compute,
            slots=slots,
            capacity=min(capacity, self.model.context),
            limits=limits,
            vocab_size=self.vocab_size,
        )

    def engine_for(self, requests: Sequence[Request]) -> Engine:
        """An engine for these requests; sizes are rounded up, so that few programs are compiled."""
        samples = sum(r.settings.samples for r in requests)
        longest = max(len(r.prompt) + r.settings.max_tokens for r in requests)
        limits = [EngineLimits.of(r.settings, r.stop_ids) for r in requests]
        return self.engine(
            slots=min(bucket(samples), self._slots),
            capacity=bucket(longest, 16),
            limits=EngineLimits(*map(max, zip(*limits, strict=True))),
        )

    def continuation(self, request: Request) -> Continuation | None:
        """The detokenizer of a sample of this request; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return Continuation(self.tokenizer, request.prompt, request.settings.stop)

    # --- sampling ---

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Continuations of texts or token ids, in order, the samples of each together.

        `settings` are one for all prompts, or one for each. Raises ConfigError for invalid prompts
        or settings.
        """
        done = list(self.complete(self._requests(prompts, settings)))
        return sorted(done, key=lambda completion: (completion.prompt, completion.sample))

    def precompile(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: SamplingParams | Sequence[SamplingParams],
    ) -> None:
        """Compiles the programs that `generate` needs for these, and draws nothing.

        Raises ConfigError as `generate` does.
        """
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
            problem = f"settings: {len(each)} for {len(prompts)} prompts; give one for each, or one"
            raise ConfigError([problem])
        return self.requests([self.ids(prompt) for prompt in prompts], each)

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Runs requests together, and yields each continuation when it has ended."""
        if not requests:
            return
        engine = self.engine_for(requests)
        engine.submit(*requests)
        stop_texts = any(r.settings.stop for r in requests)
        texts: dict[tuple[int, int], Continuation | None] = {}
        tokens: dict[tuple[int, int], list[Token]] = {}
        for event in engine.run(_STOP_TEXT_BURST if stop_texts else BURST):
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
        """One continuation, streamed: pairs of final text and at most `burst` drawn tokens.

        Raises ConfigError for an invalid prompt or settings.
        """
        if settings.samples != 1:
            raise ConfigError([f"samples={settings.samples}: must be 1 to stream"])
        request = self.request(prompt, settings)
        engine, text = self.engine_for([request]), self.continuation(request)
        engine.submit(request)
        for event in engine.run(burst):
            if not event.tokens:
                continue
            new, final = accept(event.tokens, text, event.finish, self.stop_ids)
            yield final, new
            if text is not None and text.stopped:
                return

    # --- beam search ---

    def beam(
        self, prompts: Sequence[str | Sequence[int]], settings: BeamSearchParams
    ) -> list[Completion]:
        """The continuations of each prompt that beam search finds, best first.

        Raises ConfigError for invalid prompts or settings.
        """
        ids = [self.ids(prompt) for prompt in prompts]
        check(self.model, ids, settings, self.vocab_size)
        if not ids:
            return []
        each = max(1, self._slots // settings.width)
        done = []
        for start in range(0, len(ids), each):
            for one in self._search(ids[start : start + each], settings):
                done.append(replace(one, prompt=one.prompt + start))
        return done

    def _search(self, ids: list[list[int]], settings: BeamSearchParams) -> Iterator[Completion]:
        """Beam search of one group of prompts."""
        shards, width = sharding.axis_size("batch"), settings.width
        r = bucket(len(ids))
        while r * width % shards:
            r += 1
        capacity = min(bucket(max(map(len, ids)) + settings.max_tokens, 16), self.model.context)
        model = self._decoding_model
        caches = empty_caches(model, r * width, capacity, self.compute.dtype)
        prompt = prompt_caches(self._params, model, self.compute, ids, capacity)
        if prompt is not None:
            slots = np.full((prompt[0].keys_PBKSC.shape[1], width), r * width, np.int32)
            slots[: len(ids)] = np.arange(len(ids) * width).reshape(-1, width)
            caches = decoding.insert_prompts(caches, prompt, slots)
        last_R, position_R = np.zeros(r, np.int32), np.full(r, -1, np.int32)
        last_R[: len(ids)] = [prompt[-1] for prompt in ids]
        position_R[: len(ids)] = [len(prompt) - 1 for prompt in ids]
        options = beam_search.BeamOptions(
            length_penalty=np.float32(settings.length_penalty),
            max_tokens=np.int32(settings.max_tokens),
            vocab_size=np.int32(self.vocab_size),
            stop_early=np.bool_(settings.early_stopping is True),
            exhaustive=np.bool_(settings.early_stopping == "never"),
        )
        config = beam_search.BeamConfig(
            model, self.compute, self.stop_ids, width, bucket(settings.max_tokens)
        )
        found = beam_search.search(self._params, last_R, position_R, caches, options, config)
        return self._beams(ids, arrays.to_host(found), settings.returned)

    def _beams(
        self, prompts: list[list[int]], found: beam_search.Beams, returned: int
    ) -> Iterator[Completion]:
        for i, prompt in enumerate(prompts):
            for rank in range(returned):
                score = float(found.scores_RW[i, rank])
                if score <= NEVER:
                    continue
                ids = found.tokens_RWU[i, rank, : found.lengths_RW[i, rank]].tolist()
                text = Continuation(self.tokenizer, prompt, ()) if self.tokenizer else None
                finish = "stop" if ids[-1] in self.stop_ids else "length"
                tokens, _ = accept([Token(t) for t in ids], text, finish, self.stop_ids)
                yield Completion(i, rank, "" if text is None else text.text, tokens, finish, score)

    # --- scores ---

    def score(
        self, texts: Sequence[str | Sequence[int]], alternatives: int = 0
    ) -> list[list[Token]]:
        """The tokens of each text with their log-probabilities, given those before; the first has
        none. With `alternatives`, also the likeliest tokens in each place.

        Raises ConfigError for an empty text, one longer than the context, or invalid ids.
        """
        ids = [self.ids(text) for text in texts]
        if problems := list(self._score_problems(ids, alternatives)):
            raise ConfigError(problems)
        results: list[list[Token]] = [[]] * len(ids)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for group in padded_groups(by_length, lambda i: len(ids[i]), SCORED_TOKENS):
            for i, tokens in zip(
                group, self._score([ids[i] for i in group], alternatives), strict=True
            ):
                results[i] = tokens
        return results

    def _score_problems(self, ids: list[list[int]], alternatives: int) -> Iterator[str]:
        if not 0 <= alternatives <= MOST_LOGPROBS:
            yield f"alternatives={alternatives}: must be from 0 to {MOST_LOGPROBS}"
        for number, tokens in enumerate(ids):
            if not tokens:
                yield f"text {number}: is empty; give at least one token"
            elif not 0 <= min(tokens) <= max(tokens) < self.model.vocab_size:
                yield f"text {number}: has ids outside 0..{self.model.vocab_size - 1}"
            if len(tokens) > self.model.context:
                yield (
                    f"text {number}: has {len(tokens)} tokens, more than "
                    f"model.context={self.model.context}"
                )

    def _score(self, ids: list[list[int]], alternatives: int) -> Iterator[list[Token]]:
        """`score` for one group of texts, padded to one length."""
        shards = sharding.axis_size("batch")
        b = -(-bucket(len(ids)) // shards) * shards
        length = min(bucket(max(map(len, ids)), 16), self.model.context)
        chunks = 2 * sharding.axis_size("seq")  # of a sequence, over the context axis
        length = -(-length // chunks) * chunks
        padded_BT = np.zeros((b, length), np.int32)
        for row, text in zip(padded_BT, ids, strict=False):
            row[: len(text)] = text
        scored = logprobs.score(
            self._params,
            shard_batch(padded_BT),
            np.int32(self.vocab_size),
            self._decoding_model,
            self.compute,
            alternatives,
        )
        own_BT, top_ids_BTa, top_BTa = arrays.to_host(scored)
        for i, text in enumerate(ids):
            tokens = [Token(text[0])]
            for at, token in enumerate(text[1:]):
                pairs = zip(top_ids_BTa[i, at].tolist(), top_BTa[i, at].tolist(), strict=True)
                tokens.append(Token(token, float(own_BT[i, at]), tuple(pairs)))
            yield tokens


def accept(
    tokens: list[Token],
    text: Continuation | None,
    finish: str | None,
    stop_ids: Sequence[int],
) -> tuple[list[Token], str]:
    """Adds a sample's new tokens to its text, which may be None without a tokenizer.

    Returns the tokens up to a stop text, and the text that is now final.
    """
    if text is None:
        return tokens, ""
    final, taken = "", []
    for i, token in enumerate(tokens):
        last = finish is not None and i == len(tokens) - 1
        taken.append(token)
        final += text.add([] if token.id in stop_ids else [token.id], last=last)
        if text.stopped:
            break
    return taken, final
