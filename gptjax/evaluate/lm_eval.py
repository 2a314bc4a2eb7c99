"""An adapter to EleutherAI's lm_eval, which runs its tasks on a model of gptjax.

    import gptjax
    import lm_eval

    with gptjax.load("runs/mine") as model:
        adapter = gptjax.LMEvalAdapter(model.params, model.cfg, model.tokenizer)
        results = lm_eval.simple_evaluate(adapter, tasks=["hellaswag"])

Needs the extra `lm-eval`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config import Config
from gptjax.errors import ConfigError
from gptjax.evaluate.documents import sliding_windows
from gptjax.evaluate.scoring import Pair, Scorer, encode_pair
from gptjax.model.decoder import Params
from gptjax.runtime.progress import Progress
from gptjax.sample import Sampler, SamplingParams
from gptjax.tokenizer import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError(
        f"{error}; LMEvalAdapter needs the extra: pip install 'gptjax[lm-eval]'"
    ) from None

MAX_TOKENS = 256
"""Tokens of a generation at most, unless its task gives a limit."""
# The keys of a task's generation settings.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class LMEvalAdapter(TemplateLM):
    """A model of lm_eval: parameters on the ambient mesh.

    Prompts begin with the tokenizer's own prefix; that of a Hugging Face tokenizer is as in
    `transformers`. `batch_size` sequences, by default eval.batch, go through the model at a time,
    and it reads at most `max_length` tokens of each, by default model.context.
    """

    def __init__(
        self,
        params: Params,
        cfg: Config,
        tokenizer: Tokenizer,
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._params, self._tokenizer = params, tokenizer
        self.batch_size = batch_size or cfg.eval.batch
        self.max_length = max_length or cfg.model.context
        self._scorer = Scorer(
            cfg.model, cfg.compute, self.batch_size, progress or Progress(), self.max_length
        )

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a prompt, or of plain text with add_special_tokens=False."""
        if add_special_tokens is False:
            return self._tokenizer.encode(string)
        return self._tokenizer.prompt(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self._tokenizer, context, continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = [(context, continuation) for _, context, continuation in requests]
        scores = self._scorer.score(self._params, pairs, "loglikelihood")
        results = [(score.logprob, score.greedy) for score in scores]
        for (key, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows without overlap.

        The first token is predicted from the prefix token alone.
        """
        pairs: list[Pair] = []
        owner: list[int] = []  # the request of each pair
        for number, request in enumerate(requests):
            ids = np.array([self.prefix_token_id, *self._tokenizer.encode(request.args[0])])
            new = list(sliding_windows(ids, self.max_length, self.max_length))
            pairs += new
            owner += [number] * len(new)
        scores = self._scorer.score(self._params, pairs, "loglikelihood_rolling")
        totals = np.zeros(len(requests))
        np.add.at(totals, owner, [score.logprob for score in scores])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to, and without, one of the strings "until"; greedy unless "do_sample".

        A prompt that leaves too little room is truncated at its beginning. Raises ConfigError for
        generation settings that are not supported.
        """
        sampler = Sampler(
            self._params,
            self._scorer.model,
            self._scorer.compute,
            self._tokenizer,
            slots=self.batch_size,
        )
        prompts, settings = [], []
        for request in requests:
            context, generation = request.args
            one = self._settings(dict(generation))
            room = self.max_length - one.max_tokens
            if room < 1:
                raise ConfigError(
                    [f"max_gen_toks={one.max_tokens}: must be below max_length={self.max_length}"]
                )
            prompts.append(self._tokenizer.prompt(context)[-room:])
            settings.append(one)
        texts = [completion.text for completion in sampler.generate(prompts, settings)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _settings(self, given: dict[str, Any]) -> SamplingParams:
        """The sampler's settings for a task's generation settings, which are consumed."""
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        lengths = [given.pop(name) for name in _LENGTHS if name in given]
        settings = {name: given.pop(name) for name in _SETTINGS if name in given}
        sampled = given.pop("do_sample", float(settings.get("temperature", 0.0)) > 0)
        if given:
            unknown = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ConfigError([f"generation settings that are not supported: {unknown}"])
        return SamplingParams(
            **(settings if sampled else settings | {"temperature": 0.0}),
            max_tokens=(lengths or [MAX_TOKENS])[0],
            stop=tuple(filter(None, until)),
        )
