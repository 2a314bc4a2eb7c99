"""A model of EleutherAI's lm_eval, whose tasks then run on what gptjax trains or imports.

    import lm_eval
    from gptjax import opening
    from gptjax.evaluate import LMEvalAdapter

    with opening.opened("runs/mine") as model:
        adapter = LMEvalAdapter(model.params, model.cfg, model.tokenizer)
        results = lm_eval.simple_evaluate(adapter, tasks=["hellaswag"])

Needs the extra `lm-eval`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config import Config
from gptjax.errors import ConfigError
from gptjax.evaluate.documents import windows
from gptjax.evaluate.scoring import Scorer, encode_pair, prefix_id
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

MOST_NEW = 256
"""Tokens that a generation has at most where its task does not say."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class LMEvalAdapter(TemplateLM):
    """The parameters, on the ambient mesh, as lm_eval asks them.

    Prompts begin as the tokenizer has it, which of a Hugging Face tokenizer is what `transformers`
    does. `batch_size` rows go through the model at a time (eval.batch), and it reads `max_length`
    tokens of one (model.context).
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
        self._params, self._text = params, tokenizer
        self.batch_size = batch_size or cfg.eval.batch
        self.max_length = max_length or cfg.model.context
        self._scorer = Scorer(
            cfg.model, cfg.compute, self.batch_size, progress or Progress(), self.max_length
        )

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return prefix_id(self._text)

    @property
    def tokenizer_name(self) -> str:
        return self._text.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a prompt; of plain text with add_special_tokens=False."""
        return (
            self._text.encode(string) if add_special_tokens is False else self._text.prompt(string)
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self._text, context, continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        answers = [
            (score.logprob, score.greedy)
            for score in self._scorer.score(self._params, pairs, "loglikelihood")
        ]
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows without overlap. The first token is predicted
        from the prefix alone; a BOS that the tokenizer adds to prompts is not predicted as well.
        """
        pairs, owner = [], []
        for number, request in enumerate(requests):
            ids = np.array([self.prefix_token_id, *self._text.encode(request.args[0])])
            cut = list(windows(ids, self.max_length, self.max_length))
            pairs += cut
            owner += [number] * len(cut)
        scores = self._scorer.score(self._params, pairs, "loglikelihood_rolling")
        totals = np.zeros(len(requests))
        np.add.at(totals, owner, [score.logprob for score in scores])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to one of the texts "until", which they do not have; greedy unless
        "do_sample". A prompt that leaves no room for them loses its beginning.
        """
        sampler = Sampler(
            self._params,
            self._scorer.model,
            self._scorer.compute,
            self._text,
            slots=self.batch_size,
        )
        prompts, settings = [], []
        for request in requests:
            context, asked = request.args
            one = self._settings(dict(asked))
            room = self.max_length - one.max_tokens
            if room < 1:
                raise ConfigError(
                    [f"max_gen_toks={one.max_tokens}: must be below max_length={self.max_length}"]
                )
            prompts.append(self._text.prompt(context)[-room:])
            settings.append(one)
        texts = [done.text for done in sampler.generate(prompts, settings)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _settings(self, asked: dict[str, Any]) -> SamplingParams:
        """The sampler's settings for a task's. Raises ConfigError for one that it does not have."""
        until = asked.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        lengths = [asked.pop(name) for name in _LENGTHS if name in asked]
        settings = {name: asked.pop(name) for name in _SETTINGS if name in asked}
        drawn = asked.pop("do_sample", float(settings.get("temperature", 0.0)) > 0)
        if asked:
            what = ", ".join(f"{name}={value!r}" for name, value in asked.items())
            raise ConfigError([f"generation settings that are not known here: {what}"])
        return SamplingParams(
            **(settings if drawn else settings | {"temperature": 0.0}),
            max_tokens=(lengths or [MOST_NEW])[0],
            stop=tuple(filter(None, until)),
        )
