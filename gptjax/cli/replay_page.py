"""A replayed step as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from html import escape

from gptjax.pretrain.replay import Piece, Step
from gptjax.pretrain.rerun import RunAgain

_NAMED = 3  # documents of a layer
_STYLE = """
:root{color-scheme:light dark;--line:light-dark(#dededa,#36393f);
--faint:light-dark(#5f626a,#9b9ea6);--bar:light-dark(#2f7fd0,#7fb0ff);--against:light-dark(#c2453f,#ff9c95)}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1.5rem 1rem 4rem;
background:light-dark(#fafaf8,#17181b);color:light-dark(#1c1d20,#e6e6e3)}
h1{font-size:1.3rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}.faint{color:var(--faint)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;
font-variant-numeric:tabular-nums}td,th{padding:.25rem .8rem .25rem 0;text-align:right;
border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(8),.layers td:nth-child(4),
.layers th:nth-child(4){text-align:left}.bar{display:inline-block;height:.7em;
background:var(--bar);border-radius:2px}.bar.against{background:var(--against)}
td.text{white-space:normal;text-align:left;min-width:18rem}summary{cursor:pointer;
overflow-wrap:anywhere}pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,
monospace;margin:.4rem 0}
"""


def render(
    again: RunAgain,
    step: Step,
    metrics: Sequence[str],
    places: Mapping[tuple[str, int], str],
) -> str:
    """The page; `metrics` are the lines that are told of the step."""
    title = f"step {step.number} of {again.path}"
    most = max([*step.layers.values(), 1e-30])
    named = lambda piece, layer: f"{piece.shares[layer]:.1%} {_name(piece, places)}"
    layers = [
        (
            escape(name),
            _bar(norm / most),
            f"{norm:.4g}",
            escape(", ".join(named(piece, name) for piece in step.largest(name)[:_NAMED])),
        )
        for name, norm in step.layers.items()
    ]
    ordered = sorted(step.pieces, key=lambda piece: -abs(piece.share))
    largest = max([abs(piece.share) for piece in ordered] + [1e-30])
    rows = [
        (
            f"{piece.share:.1%}",
            _bar(piece.share / largest),
            f"{piece.norm:.3g}",
            f"{piece.loss:.3f}",
            f"{len(piece.tokens):,}",
            str(piece.row),
            escape(_name(piece, places)),
            _text(again, piece),
        )
        for piece in ordered
    ]
    head = ("share of the gradient", "", "norm", "loss", "tokens", "row", "document", "text")
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="faint">{escape(line)}</p>' for line in metrics),
        "<h2>Gradient norm by layer</h2>",
        _table(("", "", "norm", "largest shares, by document"), layers, "layers"),
        "<h2>Documents, by what they did to the gradient</h2>",
        _table(head, rows),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _name(piece: Piece, places: Mapping[tuple[str, int], str]) -> str:
    place = places.get((piece.part, piece.document), "")
    return " ".join(filter(None, (piece.part, str(piece.document), place)))


def _text(again: RunAgain, piece: Piece) -> str:
    text = again.tokenizer.decode(piece.tokens)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in piece.shares.items())
    return (
        f"<details><summary>{escape(text[:80])}</summary><pre>{escape(text)}</pre>"
        f'<p class="faint">Of the gradient of {escape(shares)}</p></details>'
    )


def _bar(share: float) -> str:
    kind = "bar against" if share < 0 else "bar"
    return f'<span class="{kind}" style="width:{abs(share) * 8:.2f}rem"></span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML; those of the last column of eight are texts."""
    cell = lambda place, value: f'<td class="{"text" if place == 7 else ""}">{value}</td>'
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(cell(place, value) for place, value in enumerate(row)) for row in rows]
    return (
        f'<div class="scroll"><table class="{kind}">'
        f"{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"
    )
