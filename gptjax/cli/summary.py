"""The end of a training command: what came out, where the report is, and the next commands."""

import json
import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from gptjax import bucket
from gptjax.config import Config
from gptjax.report import page
from gptjax.report.run_files import RunFiles
from gptjax.runtime import goodput

REPORT = "report.html"
_BEGAN = time.monotonic()


def write(cfg: Config, results: Mapping[str, float]) -> None:
    """Writes the report of a finished run, and tells of both on standard error.

    The results are JSON on standard output, where that is no terminal.
    """
    if not sys.stdout.isatty():
        print(json.dumps({"run": cfg.run, **results}))
    for line in _lines(cfg, results):
        print(f"gptjax: {line}", file=sys.stderr)


def _lines(cfg: Config, results: Mapping[str, float]) -> list[str]:
    run, files = cfg.run, RunFiles(cfg.run, cfg)
    steps, took = max(files.checkpoints), timedelta(seconds=round(time.monotonic() - _BEGAN))
    told = [f"{run} is trained: {steps:,} steps, {files.tokens:,} tokens; this command took {took}"]
    trained = {name: value for name, (_, value) in files.newest(training=True).items()}
    shown = {name: trained[name] for name in ("loss",) if name in trained} | dict(results)
    told.append(", ".join(f"{name} {value:.6g}" for name, value in shown.items()))
    if spent := files.goodput:
        productive = spent[goodput.STAGES["step"]]
        told.append(f"goodput {goodput.share(spent):.1%}: {productive:,.0f} s of training steps")
    report = bucket.path_of(run) / REPORT
    try:
        page.write(report, page.render([files]))
        told.append(f"report: {report}")
    except Exception as error:  # whatever it is, the run is trained
        told.append(f"the report was not written: {error}")
    if cfg.finetune.task in ("classify", "choose"):
        use = [f"gptjax predict {run} --file JSONL --output JSONL"]
    else:
        use = [f"gptjax sample {run} --prompt TEXT", f"gptjax eval {run}", f"gptjax serve {run}"]
    use.append(f"gptjax convert {run} hf:FOLDER")
    return [*told, f"next: {'; '.join(use)}"]
