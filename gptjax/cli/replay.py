"""`gptjax replay`: a step of a run again, with what each document of its batch did to it."""

import argparse
from collections.abc import Sequence

from gptjax.cli import replay_page
from gptjax.config.schema import Config
from gptjax.data import documents, mixture
from gptjax.errors import ConfigError
from gptjax.pretrain import replay, rerun
from gptjax.pretrain.replay import Piece, Step
from gptjax.pretrain.rerun import RunAgain
from gptjax.report import page
from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress

_SHOWN = 60  # characters of a text
_LISTED = 20  # documents


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    with rerun.opened(args.run, Progress()) as again:
        done = max([0, *again.checkpoints.steps(), *again.recorded])
        if not 1 <= args.step <= done:
            raise ConfigError([f"--step={args.step}: the run has trained steps 1 to {done}"])
        if args.step in again.left_out:
            raise ConfigError([f"--step={args.step}: the run has left this step out"])
        for cfg in mixture.part_configs(again.cfg).values() if args.files else ():
            documents.check_text(cfg)
        step = replay.replay(again, args.step)
        places = _places(again, step) if args.files else {}
        if distributed.first():
            for line in lines(again, step, places):
                print(line)
            if args.html:
                page.write_html(args.html, replay_page.render(again, step, _metrics(step), places))
                print(f"{args.html}: written")


def _places(again: RunAgain, step: Step) -> dict[tuple[str, int], str]:
    """The files of the documents of a batch, by part and number."""
    found: dict[tuple[str, int], str] = {}
    parts: dict[str, Config] = mixture.part_configs(again.cfg)
    for part, cfg in parts.items():
        numbers = {piece.document for piece in step.pieces if piece.part == part}
        with again.progress.bar(f"text {part}".rstrip(), None, unit="B") as bar:
            places = documents.places_of(cfg, numbers, bar.update)
        found |= {(part, number): place for number, place in places.items()}
    return found


def lines(again: RunAgain, step: Step, places: dict[tuple[str, int], str]) -> list[str]:
    """What is told of a step: its metrics, the gradient by layer, and its documents by what they
    are of the gradient."""
    stage = f", stage {step.stage}" if step.stage else ""
    told = [f"step {step.number}{stage}", *_metrics(step), ""]
    told.append(f"{'gradient norm':38} the largest share: row, document")
    most = max([*step.layers.values(), 1e-30])
    for name, norm in step.layers.items():
        top = step.largest(name)[0]
        of = f"{top.shares[name]:7.1%}: {top.row}, {_name(top)}"
        told.append(f"  {name:24} {norm:10.4g} {'#' * round(20 * norm / most):20} {of}")
    ordered = sorted(step.pieces, key=lambda piece: -abs(piece.share))
    told += ["", f"{'share of':>8} {'norm of':>8} {'loss':>7} {'tokens':>7}  row, document"]
    told += [f"{'gradient':>8} {'its part':>8}"]
    told += [_piece(again, piece, places) for piece in ordered[:_LISTED]]
    if len(ordered) > _LISTED:
        rest = sum(piece.share for piece in ordered[_LISTED:])
        told.append(f"{rest:8.1%}  {len(ordered) - _LISTED} others")
    return told


def _metrics(step: Step) -> list[str]:
    """The metrics, and whether they are those that were recorded."""
    now = ", ".join(f"{name} {step.metrics[name]:.6g}" for name in (*rerun.COMPARED, "lr"))
    told = [now]
    if step.recorded is None:
        told.append("nothing was recorded of this step (log.every)")
    elif found := rerun.difference(step.number, step.metrics, step.recorded, 0.0):
        told.append(f"recorded otherwise: {found}")
    else:
        told.append("as recorded, bit for bit")
    if step.may_differ:
        told.append(f"bits may differ here: {step.may_differ}")
    if step.metrics["nonfinite"]:
        told.append("loss or gradient not finite: parameters unchanged")
    elif step.clipped < 1:
        told.append(f"clipped: the gradient was multiplied by {step.clipped:.4g}")
    return told


def _name(piece: Piece) -> str:
    return f"{piece.part} {piece.document}".lstrip()


def _piece(again: RunAgain, piece: Piece, places: dict[tuple[str, int], str]) -> str:
    text = again.tokenizer.decode(piece.tokens)
    shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
    where = places.get((piece.part, piece.document), "")
    begins = "" if not piece.begins else f" from its token {piece.begins}"
    begins = " (a later part)" if piece.begins < 0 else begins
    return (
        f"{piece.share:8.1%} {piece.norm:8.3g} {piece.loss:7.3f} {len(piece.tokens):7}  "
        f"{piece.row}, {_name(piece)}{begins}{f' ({where})' if where else ''}: {shown}"
    )
