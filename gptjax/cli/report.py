"""`gptjax report`: what happened in runs, in lines or as a page."""

import argparse
from collections.abc import Mapping, Sequence

from gptjax.cli.inspect import state
from gptjax.config import Config
from gptjax.errors import ConfigError, GptjaxError
from gptjax.report import page
from gptjax.report.run_files import RunFiles


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command. Raises OutputError where the page cannot be written."""
    if len(set(args.runs)) < len(args.runs):
        raise ConfigError([f"RUN {' '.join(args.runs)}: one of them is given twice"])
    runs = [RunFiles.open(path) for path in args.runs]
    for one in runs:
        lines = list(state(one)) or ["nothing was recorded yet"]
        print("\n  ".join([one.path, *lines]))
    if args.html is None:
        return
    page.write_html(args.html, page.render(runs, predicted))
    print(f"{args.html}: written")


def predicted(cfg: Config) -> Mapping[str, float]:
    """What `gptjax plan` expects of a run on the machine that its configuration names."""
    if not cfg.mesh.machine:
        return {}
    from gptjax.plan import estimate, machines

    machines.set_environment()
    try:
        plan = estimate.plan(cfg, machines.parse(cfg.mesh.machine))
    except GptjaxError:
        return {}
    rate = cfg.train.batch_tokens / plan.times.expected
    return {"tokens_per_second": rate, "mfu": plan.mfu}
