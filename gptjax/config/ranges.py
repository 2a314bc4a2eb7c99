"""Ranges of steps as they are written: "57" or "41-44", both ends included."""

import re
from collections.abc import Iterable

Range = tuple[int, int]


def parse(texts: Iterable[str]) -> list[Range]:
    """The ranges in texts, in their order. Raises ValueError, which names the text."""
    found = []
    for text in texts:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if match is None or not 0 < int(match[1]) <= int(match[2] or match[1]):
            raise ValueError(text)
        found.append((int(match[1]), int(match[2] or match[1])))
    return found
