"""`python -m gptjax` and the `gptjax` command."""

import os
import sys
import threading

from gptjax.cli.main import main


def run() -> None:
    """Runs the command line, and ends the process with its exit code."""
    code = main()
    # A compilation that nobody waits for any more must not end the process in its own way.
    if any(thread.name == "compile ahead" for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
