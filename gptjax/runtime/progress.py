"""Progress on the terminal: a bar for each long phase, and log lines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Bar:
    """The progress bar of one phase."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def update(self, done: int, total: int | None = None, **values: float) -> None:
        """Moves the bar to `done` units and shows values such as loss beside it."""
        shown = {
            name.replace("tokens_per_second", "tok/s"): _short(v) for name, v in values.items()
        }
        self._bar.set_postfix(shown, refresh=False)
        if total is not None:
            self._bar.total = total
        self._bar.update(done - self._bar.n)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Progress:
    """Writes bars and lines to standard error; with shown=False (other processes) to nowhere."""

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._began = time.monotonic()

    @contextmanager
    def bar(self, name: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Bar]:
        """A bar for a phase, with rate and remaining time; its line ends at exit."""
        with tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=unit,
            unit_scale=unit == "B",
            disable=not self._shown,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        ) as bar:
            yield Bar(bar)

    def say(self, line: str) -> None:
        """Prints a line, after the seconds since the start."""
        if self._shown:
            tqdm.write(f"[{time.monotonic() - self._began:6.1f} s] {line}", file=sys.stderr)
