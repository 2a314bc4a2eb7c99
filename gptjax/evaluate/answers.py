"""Answers in words compared as SQuAD's official script does (Rajpurkar et al. 2016, 2018)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> list[str]:
    """Its words in lower case, without punctuation and articles."""
    plain = answer.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 where the answer is one of the right ones, otherwise 0; where none is right, an empty one
    is."""
    return float(normalized(answer) in _wanted(right))


def f1(answer: str, right: Sequence[str]) -> float:
    """The largest harmonic mean of precision and recall, in words, with one of the right ones."""
    return max(_f1(normalized(answer), wanted) for wanted in _wanted(right))


def _wanted(right: Sequence[str]) -> list[list[str]]:
    """The right answers; those that normalisation leaves nothing of do not count."""
    return [words for words in map(normalized, right) if words] or [[]]


def _f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))
