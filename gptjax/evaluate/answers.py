"""Exact match and F1 of answers, as SQuAD's official script has them (Rajpurkar et al. 2016, 2018).

An empty list of references means that the question has no answer; the empty answer is then correct.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> list[str]:
    """The words of an answer in lower case, without punctuation and articles."""
    plain = answer.lower().translate(_NO_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalized answer equals one of the references, otherwise 0."""
    return float(normalize(answer) in _normalized(references))


def f1(answer: str, references: Sequence[str]) -> float:
    """The largest F1 (harmonic mean of precision and recall) in words with any reference."""
    return max(_f1(normalize(answer), reference) for reference in _normalized(references))


def _normalized(references: Sequence[str]) -> list[list[str]]:
    """The normalized references but for empty ones, or the empty answer if none is left."""
    return [words for words in map(normalize, references) if words] or [[]]


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))
