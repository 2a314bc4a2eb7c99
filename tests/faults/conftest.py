"""The fixtures of bad_input.py."""

from bad_input import copied, judge, made

__all__ = ["copied", "judge", "made"]
