"""Tasks: the examples of a file, and what a model makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.evaluate import answers
from gptjax.evaluate.bootstrap import Statistic
from gptjax.evaluate.formats import Choice, Cloze, Question, TaskFile
from gptjax.evaluate.scoring import Scorer, encode_pair
from gptjax.model.decoder import Params
from gptjax.sample import Sampler, SamplingParams
from gptjax.tokenizer import Tokenizer
from gptjax.training.metrics import perplexity

ANSWER_TOKENS = 64
"""Longest answer that is generated, in tokens; it ends with its line."""


class Task:
    """Measures a model on a file of examples, by what they are:

    choices    acc: how often the likeliest choice is the right one; acc_norm: likeliest by
               log-probability divided by its length in characters
    cloze      acc: how often each token of the continuation is the likeliest; perplexity: exp of
               minus its log-probability, of the mean over examples
    questions  exact_match and f1 of the greedy continuation, see answers.py

    An example that is too long for the model loses the beginning of its context; `cut` says how
    many of those measured last did.
    """

    def __init__(self, file: TaskFile, tokenizer: Tokenizer, scorer: Scorer, name: str) -> None:
        self.file, self.name = file, name
        self._tokenizer, self._scorer = tokenizer, scorer
        self.cut = 0

    def measure(self, params: Params) -> list[Statistic]:
        """Its statistics, over examples."""
        kinds: dict[type, Any] = {Choice: self._choose, Cloze: self._fill, Question: self._answer}
        return kinds[type(self.file.examples[0])](params, self.file.examples)

    def run(self, params: Params) -> dict[str, float]:
        """Their values, and the number of examples that were too long for the model."""
        values = {one.name: one.value for one in self.measure(params)}
        return values | {f"{self.name}_cut": self.cut}

    def _mean(self, name: str, values: Any, **more: Any) -> Statistic:
        return Statistic.mean(f"{self.name}_{name}", np.float64(values), **more)

    def _choose(self, params: Params, examples: Sequence[Choice]) -> list[Statistic]:
        encode = lambda one, text: encode_pair(self._tokenizer, one.context, f" {text}")
        pairs = [[encode(one, text) for text in one.choices] for one in examples]
        flat = [pair for choices in pairs for pair in choices]
        self.cut = sum(self._scorer.cut(choices) > 0 for choices in pairs)
        scores = iter(self._scorer.score(params, flat, self.name))
        right: list[tuple[bool, bool]] = []
        for one in examples:
            logprobs = np.array([next(scores).logprob for _ in one.choices])
            lengths = [max(1, len(text)) for text in one.choices]
            right.append((logprobs.argmax() == one.gold, (logprobs / lengths).argmax() == one.gold))
        plain, normed = zip(*right, strict=True)
        return [self._mean("acc", plain), self._mean("acc_norm", normed)]

    def _fill(self, params: Params, examples: Sequence[Cloze]) -> list[Statistic]:
        pairs = [encode_pair(self._tokenizer, one.context, one.continuation) for one in examples]
        self.cut = self._scorer.cut(pairs)
        scores = self._scorer.score(params, pairs, self.name)
        return [
            self._mean("acc", [score.greedy for score in scores]),
            self._mean("perplexity", [-score.logprob for score in scores], show=perplexity),
        ]

    def _answer(self, params: Params, examples: Sequence[Question]) -> list[Statistic]:
        sampler = Sampler(
            params,
            self._scorer.model,
            self._scorer.compute,
            self._tokenizer,
            slots=self._scorer.rows,
        )
        most = min(ANSWER_TOKENS, self._scorer.limit // 2)
        prompts = [self._tokenizer.prompt(one.prompt) for one in examples]
        room = self._scorer.limit - most
        self.cut = sum(len(prompt) > room for prompt in prompts)
        settings = SamplingParams(temperature=0.0, top_p=1.0, max_tokens=most, stop=("\n",))
        given = sampler.generate([prompt[-room:] for prompt in prompts], settings)
        pairs = list(zip(given, examples, strict=True))
        return [
            self._mean("exact_match", [answers.exact_match(g.text, q.answers) for g, q in pairs]),
            self._mean("f1", [answers.f1(g.text, q.answers) for g, q in pairs]),
        ]


def named(files: Sequence[TaskFile]) -> list[str]:
    """What tasks are called in results: by their kind, and by their file too where several of a
    kind are."""
    kinds = [file.kind for file in files]
    stem = lambda file: Path(file.path).stem
    return [
        file.kind if kinds.count(file.kind) == 1 else f"{file.kind}_{stem(file)}" for file in files
    ]
