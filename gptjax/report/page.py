"""The report of one run or of several, as one self-contained HTML page."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

from gptjax import config
from gptjax.config import Config, phases
from gptjax.errors import OutputError
from gptjax.report.run_files import RunFiles
from gptjax.runtime import goodput

CHARTS = (
    ("Loss (nats a token)", ("loss", "valid_loss")),
    ("Bits per byte of validation text", ("valid_bits_per_byte",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens a second", ("tokens_per_second",)),
    ("MFU", ("mfu",)),
    ("Parameter norm", ("param_norm",)),
    ("Share of the time waiting for data", ("data_wait",)),
    ("Goodput up to then", ("goodput",)),
    ("Seconds that saves took from training", ("save_seconds",)),
    ("Epochs", ("epochs",)),
)
_POINTS = 1500  # of a curve that are drawn
_SAMPLES = 12
_LEFT_OUT = {
    *("step", "time", "tokens", "nonfinite"),
    *("perplexity", "valid_perplexity", "valid_tokens"),
}

Predict = Callable[[Config], Mapping[str, float]]


def render(runs: Sequence[RunFiles], predict: Predict = lambda cfg: {}) -> str:
    """The page. `predict` gives what a plan expects of a configuration, by metrics' names."""
    names = _names(runs)
    shown = [_run(run, name, predict) for run, name in zip(runs, names, strict=True)]
    known = {name for _, group in CHARTS for name in group}
    others = dict.fromkeys(
        name for run in shown for name in run["curves"] if name not in known | _LEFT_OUT
    )
    data = {
        "runs": shown,
        "charts": [*CHARTS, *((name, (name,)) for name in others)],
        "differences": list(_differences([run.cfg for run in runs])),
    }
    page = resources.files("gptjax.report").joinpath("page.html").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    return page.replace("DATA</script>", f"{text}</script>", 1)


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """The runs' folders by the shortest endings that tell them apart."""
    parts = [run.path.rstrip("/").split("/") for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _run(run: RunFiles, name: str, predict: Predict) -> dict[str, Any]:
    """All that the page shows of a run."""
    trained, measured = run.newest(training=True), run.newest(training=False)
    return {
        "name": name,
        "path": run.path,
        "tiles": dict(_tiles(run, {**trained, **measured})),
        "curves": _curves(run),
        "predicted": predict(run.cfg),
        "goodput": run.goodput,
        "events": list(_events(run)),
        "evaluations": {
            k: v for k, v in measured.items() if _is_number(v[1]) and k != "valid_tokens"
        },
        "samples": dict(list(run.samples().items())[-_SAMPLES:]),
        "configuration": "\n".join(
            f"{field} = {value}" for field, value in sorted(_changed(run.cfg).items())
        ),
    }


def _tiles(run: RunFiles, newest: Mapping[str, tuple[int, float]]) -> Iterator[tuple[str, str]]:
    yield "step", f"{run.step:,} of {run.last_step:,}"
    yield "tokens", f"{run.tokens:,}"
    if parameters := run.parameters():
        yield "parameters", f"{parameters[0]:,}"
    for name in ("loss", "valid_loss", "valid_bits_per_byte"):
        if name in newest and _is_number(newest[name][1]):
            yield name.replace("_", " "), f"{newest[name][1]:.4f}"
    if spent := run.goodput:
        yield "wall time", str(timedelta(seconds=round(sum(spent.values()))))
        yield "goodput", f"{goodput.share(spent):.1%}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _curves(run: RunFiles) -> dict[str, dict[str, Any]]:
    """Of each metric its values, and the tokens, steps and hours that they are of."""
    found: dict[str, list[tuple[int, float | None, Any]]] = {}
    began = min((row["time"] for row in run.rows if "time" in row), default=0.0)
    if run.sessions:
        began = min(began or math.inf, run.sessions[0].began)
    for row in run.rows:
        hours = (row["time"] - began) / 3600 if "time" in row else None
        for name, value in row.items():
            if name not in _LEFT_OUT and isinstance(value, int | float):
                found.setdefault(name, []).append((row["step"], hours, value))
    stretches = phases.phases(run.cfg)
    curves = {}
    for name, points in found.items():
        kept = points[:: max(1, len(points) // _POINTS)]
        kept += points[-1:] if kept[-1] is not points[-1] else []
        curves[name] = {
            "step": [step for step, _, _ in kept],
            "tokens": [
                phases.phase_at(stretches, max(0, step - 1)).tokens_at(step) for step, _, _ in kept
            ],
            "hours": [hours for _, hours, _ in kept],
            "value": [value if math.isfinite(value) else None for _, _, value in kept],
            "training": any("loss" in row and name in row for row in run.rows),
        }
    return curves


def _events(run: RunFiles) -> Iterator[str]:
    """Restarts, steps that were done again, and steps whose loss was not finite, in their order."""
    previous = None
    for session in run.sessions:
        when = datetime.fromtimestamp(session.began, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        line = (
            f"{when}: began"
            if previous is None
            else f"{when}: resumed after step {session.first:,}"
        )
        if previous is not None and previous.step > session.first:
            line += f"; steps {session.first + 1:,} to {previous.step:,} were lost"
        yield f"{line}; trained to step {session.step:,}"
        previous = session
    for one in run.left_out:
        rewind = one["rewind"]
        why = (
            f"{rewind['why']} at step {rewind['step']:,}: back to step {rewind['to']:,}; "
            if rewind
            else ""
        )
        yield f"{why}steps {one['first']:,} to {one['last']:,} are left out"
    wrong = [row["step"] for row in run.rows if row.get("nonfinite", 0) > 0]
    if wrong:
        shown = ", ".join(f"{step:,}" for step in wrong[:10])
        yield f"loss or gradient not finite at step {shown}" + (" and others" * (len(wrong) > 10))


def _changed(cfg: Config) -> dict[str, str]:
    """The fields of a configuration that are not the default, but the run's own folder."""
    default = config.flatten(Config())
    return {
        name: str(value)
        for name, value in config.flatten(cfg).items()
        if name != "run" and default.get(name) != value
    }


def _differences(cfgs: Sequence[Config]) -> Iterator[list[str]]:
    """The fields in which configurations differ, each with their values."""
    flat = [config.flatten(cfg) for cfg in cfgs]
    for name in sorted({name for one in flat for name in one} - {"run"}):
        values = [str(one.get(name, "–")) for one in flat]
        if len(set(values)) > 1:
            yield [name, *values]


def write_html(path: str, text: str) -> None:
    """Writes the page of an option --html. Raises OutputError."""
    try:
        write(Path(path), text)
    except OSError as error:
        raise OutputError(f"--html={path}: cannot be written: {error.strerror}") from None


def write(file: Any, text: str) -> None:
    """Writes a page, to a local file at once and whole. Raises OSError and OutputError."""
    if isinstance(file, Path):
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    else:
        file.write_text(text)
