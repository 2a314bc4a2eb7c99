"""A plan as a self-contained HTML page: memory, time, roofline, and each tensor's sharding."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from gptjax.model.flops import ModelCost
from gptjax.plan import report, roofline
from gptjax.plan.collectives import by_axes
from gptjax.plan.estimate import Plan
from gptjax.plan.memory import Tensor
from gptjax.plan.search import Choice
from gptjax.runtime.hardware import GIB

_COLOURS = ("#2f6f9f", "#5fa8d3", "#e09f3e", "#9e2a2b", "#7b9e57", "#8d6a9f", "#777777")
_AXES = {
    "data": "#777777",
    "fsdp": "#2f6f9f",
    "stage": "#8d6a9f",
    "expert": "#9e2a2b",
    "context": "#7b9e57",
    "tensor": "#e09f3e",
}

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;
color:#222;background:#fff}
h1{font-size:1.4rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.note{color:#666}.facts{display:flex;flex-wrap:wrap;gap:.7rem;margin:1rem 0}
.fact{border:1px solid #ddd;border-radius:.4rem;padding:.5rem .9rem}.fact b{display:block;
font-size:1.25rem}.bad{color:#9e2a2b}table{border-collapse:collapse;width:100%;font-size:13px}
td,th{padding:.2rem .6rem .2rem 0;text-align:right;border-bottom:1px solid #eee;
font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}
code{font-size:12px}.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;
margin-right:.4em}svg{max-width:100%}svg text{font:12px system-ui,sans-serif;fill:#333}
@media(prefers-color-scheme:dark){body{background:#181a1b;color:#ddd}.fact{border-color:#444}
td,th{border-color:#333}svg text{fill:#ccc}.note{color:#999}.bad{color:#e5707a}}
"""


def render(plan: Plan, choices: Sequence[Choice], price: float) -> str:
    """The page. `price` is that of a chip-hour; 0: none."""
    parameters = ModelCost(plan.cfg.model).parameters.total
    title = f"{plan.cfg.run} on {plan.machine.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{parameters:,} parameters; {escape(report.mesh(plan))}. Every figure on '
        "this page is a prediction; nothing was measured.</p>",
        _facts(plan, price),
        "<h2>Memory of a device</h2>",
        _memory(plan),
        "<h2>Time of a step</h2>",
        _times(plan),
        "<h2>Roofline</h2>",
        _roofline(plan),
        "<h2>Communication of a step</h2>",
        _communication(plan),
        "<h2>Sharding of each tensor</h2>",
        _tensors(plan),
    ]
    if choices:
        body += ["<h2>Pareto front of the search</h2>", _pareto_front(choices)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _facts(plan: Plan, price: float) -> str:
    times = plan.times
    facts = {
        "memory": f"{plan.total / GIB:.1f} of {plan.machine.device.memory / GIB:.1f} GiB",
        "step": f"{times.expected:.3g} s",
        "MFU": f"{plan.mfu:.1%}",
        "tokens/s": f"{plan.tokens_per_second:,.0f}",
        "budget": report.duration(plan.days),
        "chip-hours": f"{plan.chip_hours:,.0f}",
        "bound by": times.bottleneck,
    }
    if price:
        facts["cost"] = f"{plan.chip_hours * price:,.0f}"
    cards = (f'<div class="fact">{name}<b>{value}</b></div>' for name, value in facts.items())
    excess = (plan.total - plan.machine.device.memory) / GIB
    verdict = "" if plan.fits else f'<p class="bad">Does not fit: {excess:.1f} GiB too much.</p>'
    return f'<div class="facts">{"".join(cards)}</div>{verdict}'


def _memory(plan: Plan) -> str:
    widest = max(plan.machine.device.memory, plan.total)
    x, parts, keys = 0.0, [], []
    for (name, size), colour in zip(plan.memory_use.items(), _COLOURS * 2, strict=False):
        if not size:
            continue
        width = 900 * size / widest
        tip = f"{name}: {size / GIB:.2f} GiB"
        parts.append(
            f'<rect x="{x:.1f}" width="{width:.1f}" height="34" y="2" fill="{colour}">'
            f"<title>{escape(tip)}</title></rect>"
        )
        keys.append(f'<span class="key" style="background:{colour}"></span>{escape(tip)}')
        x += width
    limit = 900 * plan.machine.device.memory / widest
    parts.append(
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="38" stroke="#9e2a2b" '
        'stroke-width="3"/>'
    )
    svg = f'<svg viewBox="0 0 903 40" width="900">{"".join(parts)}</svg>'
    return f"{svg}<p>{' &nbsp; '.join(keys)}</p>"


def _times(plan: Plan) -> str:
    times = plan.times
    bars = {
        "arithmetic at the peak": times.arithmetic,
        f"at {roofline.reached(plan.machine):.0%} of it": times.arithmetic
        / roofline.reached(plan.machine),
        "memory traffic": times.memory,
        **{f"{axis} ({plan.links[axis].kind})": s for axis, s in times.links.items()},
        "optimizer's update": times.update,
        "not overlapped": times.exposed,
        "step, expected": times.expected,
    }
    return _bars(bars, "s")


def _bars(values: Mapping[str, float], unit: str) -> str:
    most, rows = max(values.values()), []
    for i, (name, value) in enumerate(values.items()):
        y, width = 24 * i, 560 * value / most
        rows.append(
            f'<text x="0" y="{y + 15}">{escape(name)}</text>'
            f'<rect x="200" y="{y + 3}" width="{max(width, 1):.1f}" height="16" fill="#2f6f9f"/>'
            f'<text x="{206 + width:.0f}" y="{y + 15}">{value:.3g} {unit}</text>'
        )
    return f'<svg viewBox="0 0 900 {24 * len(values)}" width="900">{"".join(rows)}</svg>'


def _roofline(plan: Plan) -> str:
    """Log-log: operations per byte of memory traffic against operations per second of a device."""
    device, times = plan.machine.device, plan.times
    operations = sum(plan.flops.values()) / plan.machine.devices
    peak = device.peak(plan.cfg.compute.dtype)
    intensity = operations / (times.memory * device.hbm_bandwidth)
    ridge = peak / device.hbm_bandwidth
    low, high = math.log10(min(ridge, intensity) / 10), math.log10(max(ridge, intensity) * 10)
    bottom, top = math.log10(peak) - 2, math.log10(peak) + 0.3
    x = lambda value: 60 + 800 * (math.log10(value) - low) / (high - low)
    y = lambda value: 210 - 190 * (math.log10(value) - bottom) / (top - bottom)
    start = max(10**low, 10**bottom / device.hbm_bandwidth)
    roof = (start, start * device.hbm_bandwidth), (ridge, peak), (10**high, peak)
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in roof)
    marks = {"bound": times.bound, "expected": times.expected}
    dots = ""
    for (name, seconds), colour, drop in zip(
        marks.items(), ("#e09f3e", "#9e2a2b"), (-7, 18), strict=True
    ):
        at, rate = x(intensity), operations / seconds
        dots += (
            f'<circle cx="{at:.1f}" cy="{y(rate):.1f}" r="5" fill="{colour}"/>'
            f'<text x="{at + 9:.1f}" y="{y(rate) + drop:.1f}">{name}: {rate / 1e12:.0f} '
            "TFLOP/s</text>"
        )
    return (
        '<svg viewBox="0 0 900 240" width="900">'
        f'<polyline points="{points}" fill="none" stroke="#2f6f9f" stroke-width="2"/>{dots}'
        f'<text x="60" y="{y(peak) - 8:.0f}">{peak / 1e12:g} TFLOP/s</text>'
        f'<text x="{x(ridge) - 60:.0f}" y="205">{device.hbm_bandwidth / 1e9:.0f} GB/s up to '
        f'{ridge:.0f} FLOPs a byte</text><text x="300" y="235">this step: '
        f"{intensity:,.0f} FLOPs a byte of memory traffic, recomputation counted</text></svg>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _communication(plan: Plan) -> str:
    rows = [
        (kind, escape(", ".join(axes)), f"{count:,.0f}", f"{wire_bytes / 1e9:,.3f}")
        for (kind, axes), (count, wire_bytes) in sorted(by_axes(plan.collectives).items())
    ]
    return _table(("collective", "over", "count", "GB a device"), rows)


def _tensors(plan: Plan) -> str:
    keys = " &nbsp; ".join(
        f'<span class="key" style="background:{colour}"></span>{axis}'
        for axis, colour in _AXES.items()
    )
    rows = []
    for tensor in plan.state:
        if tensor.group != "parameters" or not tensor.shape:
            continue
        shape = " x ".join(map(str, tensor.shape))
        shard = " x ".join(map(str, tensor.shard_shape(plan.sizes)))
        size = f"{tensor.bytes(plan.sizes) / 2**20:,.2f}"
        name = escape(tensor.path.removeprefix("params/"))
        rows.append((name, _sharding(tensor, plan.sizes), shape, shard, size))
    return f"<p>{keys}</p>" + _table(("tensor", "", "shape", "on one device", "MiB"), rows)


def _sharding(tensor: Tensor, sizes: Mapping[str, int]) -> str:
    """A box for each dimension, divided into its shards on the mesh (up to 32 are drawn)."""
    boxes, x = [], 0
    for dimension, axes in zip(tensor.shape, tensor.axes, strict=True):
        parts = math.prod(sizes[axis] for axis in axes)
        axis = next((a.partition("_")[0] for a in axes if sizes[a] > 1), None)
        colour, drawn = _AXES.get(axis or "", "#bbbbbb"), min(parts, 32)
        tip = f"{dimension} over {' x '.join(a for a in axes if sizes[a] > 1) or 'nothing'}"
        boxes.append(
            f'<g><title>{tip}: {parts} parts</title><rect x="{x}" y="1" width="64" height="12" '
            f'fill="{colour}"/>'
            + "".join(
                f'<line x1="{x + 64 * i / drawn:.1f}" x2="{x + 64 * i / drawn:.1f}" y1="1" y2="13" '
                'stroke="#fff" stroke-width=".7"/>'
                for i in range(1, drawn)
            )
            + "</g>"
        )
        x += 70
    return f'<svg viewBox="0 0 {x} 14" width="{x}" height="14">{"".join(boxes)}</svg>'


def _pareto_front(choices: Sequence[Choice]) -> str:
    rows = [
        (
            f"<code>{escape(' '.join(one.overrides))}</code>",
            f"{one.plan.times.expected:.3g} s",
            f"{one.plan.total / GIB:.2f}",
            f"{one.plan.mfu:.1%}",
        )
        for one in choices
    ]
    return _table(("overrides", "step", "GiB", "MFU"), rows)
