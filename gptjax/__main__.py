"""`python -m gptjax` and the `gptjax` command."""

import atexit
import os
import sys

from gptjax.cli.main import main


def run() -> None:
    """Runs the command line, and ends the process with its exit code."""
    codes: list[int] = []
    atexit.register(_end, codes)  # the first, so the last to be called
    codes.append(main())
    sys.exit(codes[0])


def _end(codes: list[int]) -> None:
    """Ends the process before the interpreter ends its daemon threads.

    It does so wherever they are: in C++ code, as of a compilation that nobody waits for any more,
    that ends the process by SIGABRT.
    """
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


if __name__ == "__main__":
    run()
