"""What the tokens of a text do not give back, in bits: the information that a tokenizer loses.

A tokenizer that maps characters to <unk>, lower-cases, normalises or drops spaces makes text easier
to predict than it is. A figure in bits per byte is fair only with the bits that would restore the
text from what its tokens decode to.
"""

import math

_WINDOW = 32  # characters within which the two texts are brought together again
_AGREE = 4  # characters that must be equal there


def correction_bits(text: str, decoded: str) -> float:
    """Bits of a code of the edits that turn `decoded` into `text`; 0 where they are equal.

    Each edit costs the number of equal characters before it and of decoded ones that it replaces,
    in Elias' gamma code, and 8 bits for each byte of the text in it, and for one more to end it.
    The alignment is greedy: another may take fewer bits.
    """
    if text == decoded:
        return 0.0
    bits, i, j = 0.0, 0, 0
    while i < len(text) or j < len(decoded):
        equal = _common(text, i, decoded, j)
        i, j = i + equal, j + equal
        if i == len(text) and j == len(decoded):
            break
        own, other = _next_agreement(text[i : i + 2 * _WINDOW], decoded[j : j + 2 * _WINDOW])
        restored = len(text[i : i + own].encode("utf-8", "replace"))
        bits += _gamma(equal) + _gamma(other) + 8 * (1 + restored)
        i, j = i + own, j + other
    return bits


def _gamma(number: int) -> int:
    """Bits of a number from 0 on in Elias' gamma code."""
    return 2 * int(math.log2(number + 1)) + 1


def _common(a: str, i: int, b: str, j: int) -> int:
    """The number of equal characters from a[i] and b[j] on."""
    size, begun = 1024, i
    while size:
        while i + size <= len(a) and a[i : i + size] == b[j : j + size]:
            i, j = i + size, j + size
        size //= 2
    return i - begun


def _next_agreement(a: str, b: str) -> tuple[int, int]:
    """The fewest characters to pass over in each before they agree; they differ at once."""
    for both in range(1, 2 * _WINDOW):
        for own in range(max(0, both - _WINDOW), min(both, _WINDOW) + 1):
            rest, other = a[own : own + _AGREE], b[both - own :][:_AGREE]
            if rest == other and (own <= len(a) and both - own <= len(b)):
                return own, both - own
    return min(_WINDOW, len(a)), min(_WINDOW, len(b))
