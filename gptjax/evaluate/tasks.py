"""Accuracy on the examples of a task: multiple choice, cloze and questions with free answers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.evaluate import answers
from gptjax.evaluate.bootstrap import Statistic
from gptjax.evaluate.formats import Cloze, MultipleChoice, Question, TaskFile
from gptjax.evaluate.scoring import Scorer, encode_pair
from gptjax.model.decoder import Params
from gptjax.sample import Sampler, SamplingParams
from gptjax.tokenizer import Tokenizer
from gptjax.training.metrics import perplexity

ANSWER_TOKENS = 64
"""The longest generated answer, in tokens; it ends with its line."""


class TaskEvaluator:
    """An evaluator: measures a model on a task file's examples. The metrics depend on their kind:

    MultipleChoice  acc: how often the choice with the highest log-likelihood is the right one;
                    acc_norm: the same with log-likelihoods divided by the choices' characters
    Cloze           acc: how often greedy decoding gives the continuation; perplexity of the whole
                    continuation: exp of minus the mean of its log-likelihoods over examples
    Question        exact_match and f1 of the greedy answer, see answers.py

    A context that is too long for the model is truncated at its beginning; `cut` counts the
    examples of the last measurement to which that happened.
    """

    def __init__(self, file: TaskFile, tokenizer: Tokenizer, scorer: Scorer, name: str) -> None:
        self.file, self.name = file, name
        self._tokenizer, self._scorer = tokenizer, scorer
        self.cut = 0

    def measure(self, params: Params) -> list[Statistic]:
        """The statistics, with an entry for each example."""
        measures: dict[type, Callable[[Params, Any], list[Statistic]]] = {
            MultipleChoice: self._multiple_choice,
            Cloze: self._cloze,
            Question: self._questions,
        }
        examples = self.file.examples  # all of one kind
        return measures[type(examples[0])](params, examples)

    def run(self, params: Params) -> dict[str, float]:
        """The statistics' values, and NAME_cut, the number of truncated examples."""
        values = {statistic.name: statistic.value for statistic in self.measure(params)}
        return values | {f"{self.name}_cut": self.cut}

    def _mean(
        self, name: str, values: Sequence[float], transform: Callable[[float], float] = float
    ) -> Statistic:
        return Statistic.mean(f"{self.name}_{name}", values, transform)

    def _multiple_choice(
        self, params: Params, examples: Sequence[MultipleChoice]
    ) -> list[Statistic]:
        encode = lambda one, text: encode_pair(self._tokenizer, one.context, f" {text}")
        pairs = [[encode(one, text) for text in one.choices] for one in examples]
        flat = [pair for choices in pairs for pair in choices]
        self.cut = sum(self._scorer.count_truncated(choices) > 0 for choices in pairs)
        scores = iter(self._scorer.score(params, flat, self.name))
        correct, correct_norm = [], []
        for one in examples:
            logprobs = np.array([next(scores).logprob for _ in one.choices])
            lengths = np.array([max(1, len(text)) for text in one.choices])
            correct.append(bool(logprobs.argmax() == one.gold))
            correct_norm.append(bool((logprobs / lengths).argmax() == one.gold))
        return [self._mean("acc", correct), self._mean("acc_norm", correct_norm)]

    def _cloze(self, params: Params, examples: Sequence[Cloze]) -> list[Statistic]:
        pairs = [encode_pair(self._tokenizer, one.context, one.continuation) for one in examples]
        self.cut = self._scorer.count_truncated(pairs)
        scores = self._scorer.score(params, pairs, self.name)
        return [
            self._mean("acc", [score.greedy for score in scores]),
            self._mean("perplexity", [-score.logprob for score in scores], perplexity),
        ]

    def _questions(self, params: Params, examples: Sequence[Question]) -> list[Statistic]:
        scorer = self._scorer
        sampler = Sampler(
            params, scorer.model, scorer.compute, self._tokenizer, slots=scorer.batch_size
        )
        max_tokens = min(ANSWER_TOKENS, scorer.max_length // 2)
        max_prompt = scorer.max_length - max_tokens
        prompts = [self._tokenizer.prompt(one.prompt) for one in examples]
        self.cut = sum(len(prompt) > max_prompt for prompt in prompts)
        settings = SamplingParams(temperature=0.0, top_p=1.0, max_tokens=max_tokens, stop=("\n",))
        completions = sampler.generate([prompt[-max_prompt:] for prompt in prompts], settings)
        pairs = [(c.text, one.answers) for c, one in zip(completions, examples, strict=True)]
        return [
            self._mean("exact_match", [answers.exact_match(*pair) for pair in pairs]),
            self._mean("f1", [answers.f1(*pair) for pair in pairs]),
        ]


def task_names(files: Sequence[TaskFile]) -> list[str]:
    """The names of tasks in results: the kind, with the file's stem if several have that kind."""
    kinds = [file.kind for file in files]
    return [
        file.kind if kinds.count(file.kind) == 1 else f"{file.kind}_{Path(file.path).stem}"
        for file in files
    ]
