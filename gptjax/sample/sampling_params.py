"""Settings of sampling and of beam search, and their validation."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gptjax.config import ModelConfig
from gptjax.errors import ConfigError
from gptjax.tokenizer import Tokenizer

MOST_LOGPROBS = 20
"""Most alternatives that may be requested with each token."""
MOST_SLOTS = 1 << 16
"""Most sequences that decode at a time."""
MOST_SAMPLES = 1 << 20
"""Most samples of a prompt."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn, and when to stop. The defaults draw from the model's own
    distribution.

    They act on the logits in the order of the fields, see `logits_processors.process_logits`.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and the bias that is added to its logit."""
    banned: tuple[int, ...] = ()
    """Ids of tokens that are never drawn."""
    repetition_penalty: float = 1.0
    """Penalty for tokens in prompt or continuation (Keskar et al. 2019); 1: none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the continuation."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it is in the continuation."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Keep the nucleus of this probability (Holtzman et al. 2020); 1: all."""
    min_p: float = 0.0
    """Keep tokens whose probability is at least this fraction of the likeliest one's; 0: all."""
    max_tokens: int = 128
    """Most tokens of a continuation."""
    stop: tuple[str, ...] = ()
    """Stop texts: they end a continuation and are not part of it."""
    samples: int = 1
    """Continuations of each prompt."""
    seed: int = 0
    logprobs: int | None = None
    """Likeliest tokens to return beside each drawn one, with log-probabilities; None: neither."""

    def __post_init__(self) -> None:
        """Accepts a text as the only stop text, and lists as tuples."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "banned", tuple(self.banned))
        object.__setattr__(self, "logit_bias", tuple(map(tuple, self.logit_bias)))

    @property
    def has_penalties(self) -> bool:
        """Whether a draw depends on which tokens came before."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1.0, 0.0, 0.0)

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p excludes tokens from the draw."""
        truncates = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return self.temperature > 0 and truncates

    def check(self) -> None:
        """Raises ConfigError with every invalid value."""
        if problems := list(self._problems()):
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        finite = lambda x: abs(x) <= 1e4
        if not 0 <= self.temperature <= 1e4:
            yield f"temperature={self.temperature}: must not be negative"
        if not 0 <= self.top_k < 2**31:
            yield f"top_k={self.top_k}: must not be negative, or above 2**31; 0 keeps every token"
        if not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p}: must be above 0 and at most 1"
        if not 0 <= self.min_p < 1:
            yield f"min_p={self.min_p}: must be at least 0 and below 1; 0 keeps every token"
        if not 0 < self.repetition_penalty <= 1e4:
            yield f"repetition_penalty={self.repetition_penalty}: must be above 0; 1 is none"
        for name in ("presence_penalty", "frequency_penalty"):
            if not finite(getattr(self, name)):
                yield f"{name}={getattr(self, name)}: must be a number, such as 0.5; 0 is none"
        for token, bias in self.logit_bias:
            if not finite(bias):
                yield f"logit_bias of token {token}, {bias}: must be a number; -100 nearly bans it"
        if self.max_tokens < 1:
            yield f"max_tokens={self.max_tokens}: must be at least 1"
        if not 1 <= self.samples <= MOST_SAMPLES:
            yield f"samples={self.samples}: must be at least 1 and at most {MOST_SAMPLES}"
        if "" in self.stop:
            yield "stop='': must not be empty; give a text of at least one character"
        if not 0 <= self.seed < 2**32:
            yield f"seed={self.seed}: must be at least 0 and below 2**32"
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            yield f"logprobs={self.logprobs}: must be from 0 to {MOST_LOGPROBS}"


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search: the `width` likeliest continuations are extended at a time."""

    width: int = 4
    length_penalty: float = 1.0
    """Exponent of the length that divides a continuation's log-probability; 0: no penalty."""
    early_stopping: bool | Literal["never"] = False
    """When a prompt with `width` finished continuations ends: True: at once; False: when the best
    live one is worse than all of them; "never": when no live one could become better."""
    returned: int = 1
    """Continuations returned for each prompt, best first."""
    max_tokens: int = 128

    def check(self) -> None:
        """Raises ConfigError with every invalid value."""
        problems = []
        if self.width < 1:
            problems.append(f"width={self.width}: must be at least 1")
        if not abs(self.length_penalty) * math.log10(max(self.max_tokens, 10)) <= 30:
            problems.append(
                f"length_penalty={self.length_penalty}: must be a number, such as 1; "
                f"max_tokens={self.max_tokens} to this power must be below 1e30"
            )
        if self.early_stopping not in (True, False, "never"):
            problems.append(f"early_stopping={self.early_stopping}: must be True, False or 'never'")
        if not 1 <= self.returned <= max(self.width, 1):
            problems.append(f"returned={self.returned}: must be from 1 to width={self.width}")
        if self.max_tokens < 1:
            problems.append(f"max_tokens={self.max_tokens}: must be at least 1")
        if problems:
            raise ConfigError(problems)


def check(
    model: ModelConfig,
    prompts: Sequence[Sequence[int]],
    settings: SamplingParams | BeamSearchParams | Sequence[SamplingParams],
    vocab_size: int | None = None,
) -> None:
    """Raises ConfigError for invalid settings, an empty prompt, a token id outside the vocabulary,
    or a prompt that leaves no space in the model's context for the continuation.

    `settings` are one for all prompts, or one for each.
    """
    if isinstance(settings, (SamplingParams, BeamSearchParams)):
        distinct, each = [settings], [settings] * len(prompts)
    else:
        distinct, each = list(dict.fromkeys(settings)), list(settings)
    vocabulary = model.vocab_size if vocab_size is None else vocab_size
    problems: list[str] = []
    for one in distinct:
        one.check()
        if isinstance(one, SamplingParams):
            problems += _ids_outside(one, vocabulary)
        elif one.width > vocabulary:
            problems.append(f"width={one.width}: is above the vocabulary of {vocabulary} tokens")
    for number, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
        if not prompt:
            problems.append(f"prompt {number}: is empty; give at least one token, such as EOS")
        elif not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            problems.append(f"prompt {number}: has ids outside 0..{model.vocab_size - 1}")
        if len(prompt) >= model.context:
            problems.append(
                f"prompt {number}: has {len(prompt)} tokens, which leave no space in "
                f"model.context={model.context}; give at most {model.context - 1}"
            )
        elif len(prompt) + one.max_tokens > model.context:
            problems.append(
                f"max_tokens={one.max_tokens}: with the {len(prompt)} tokens of prompt {number}, "
                f"more than model.context={model.context}; at most "
                f"{model.context - len(prompt)} fit"
            )
    if problems:
        raise ConfigError(problems)


def trailing_space_note(prompts: Iterable[str], tokenizer: Tokenizer) -> str:
    """A note about prompts that end in a space where the tokens of words begin with theirs."""
    ending = [prompt for prompt in prompts if prompt.endswith(" ")]
    apart = tokenizer.encode("a ") + tokenizer.encode("b")
    if not ending or tokenizer.encode("a b") == apart:
        return ""
    return (
        f"prompt {ending[0][-40:]!r} ends in a space, and tokens of this model begin with the "
        "space before a word: leave it out, or expect odd words"
    )


def _ids_outside(settings: SamplingParams, vocabulary: int) -> Iterator[str]:
    named = {"logit_bias": [i for i, _ in settings.logit_bias], "banned": settings.banned}
    for name, ids in named.items():
        if bad := [i for i in ids if not 0 <= i < vocabulary]:
            yield f"{name}: has ids outside 0..{vocabulary - 1}: {bad[0]}"
    if len(set(settings.banned)) >= vocabulary:
        yield "banned: contains every token; leave at least one"
