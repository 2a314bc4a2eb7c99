"""`python -m gptjax` and the `gptjax` command."""

import sys

from gptjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
