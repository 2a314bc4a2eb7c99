"""The summary at the end of a training command: what was trained, and the next commands."""

import sys
import time
from datetime import timedelta

from gptjax.config import Config, phases

_BEGAN = time.monotonic()


def write(cfg: Config) -> None:
    """Writes the summary of a finished run to standard error."""
    from gptjax import bucket
    from gptjax.checkpoint.checkpointer import Checkpointer
    from gptjax.checkpoint.run_dir import CHECKPOINTS

    run = cfg.run
    # A mixture may have ended earlier.
    steps = Checkpointer(bucket.path_of(run) / CHECKPOINTS).steps()[-1]
    tokens = phases.tokens_at(cfg, steps)
    took = timedelta(seconds=round(time.monotonic() - _BEGAN))
    if cfg.finetune.task in ("classify", "choose"):
        use = [f"gptjax predict {run} --file JSONL --output JSONL"]
    else:
        use = [f"gptjax sample {run} --prompt TEXT", f"gptjax eval {run}", f"gptjax serve {run}"]
    use.append(f"gptjax convert {run} hf:FOLDER")
    print(
        f"gptjax: {run} is trained: {steps:,} steps, {tokens:,} tokens; this "
        f"command took {took}\ngptjax: next: {'; '.join(use)}",
        file=sys.stderr,
    )
