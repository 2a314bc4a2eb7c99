"""`python -m gptjax` and the `gptjax` command."""

import atexit
import os
import sys

from gptjax.cli.main import main


def run() -> None:
    """Runs the command line, and ends the process with its exit code."""
    codes: list[int] = []
    atexit.register(_end, codes)  # before all that a command registers, so called after them
    codes.append(main())
    sys.exit(codes[0])


def _end(codes: list[int]) -> None:
    """Ends the process before the interpreter ends its daemon threads.

    A thread that is then in C++ code, such as a compilation that nobody waits for any more, would
    end the process by SIGABRT.
    """
    if not codes:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads it, or the disk is full
        os._exit(codes[0] or 1)
    os._exit(codes[0])


if __name__ == "__main__":
    run()
