"""The picture of the levels, images/levels.svg, drawn from LEVELS in tests/test_levels.py.

    python docs/levels.py

tests/docs/test_generated.py checks that the committed picture is up to date.
"""

import ast
from pathlib import Path

DOCS = Path(__file__).parent
REPO = DOCS.parent
PICTURE = DOCS / "images" / "levels.svg"

WIDTH, ROW, BOX, GAP, LEFT = 860, 54, 34, 10, 76
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img"
  aria-label="The levels of gptjax, lowest at the bottom" font-family="sans-serif">
<style>
  .level { fill: #f3f5f8; stroke: #d5dae1; }
  .folder { fill: #dbe8f8; stroke: #5b85b8; }
  .file { fill: #ffffff; stroke: #8a94a3; }
  text { fill: #1f2933; font-size: 15px; text-anchor: middle; dominant-baseline: central; }
  .number { fill: #67717f; }
</style>"""


def levels() -> list[set[str]]:
    """The names at each level, lowest first, read from the test without importing it."""
    tree = ast.parse((REPO / "tests" / "test_levels.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEVELS"
    )
    return ast.literal_eval(value)


def shown(name: str) -> tuple[str, str]:
    """A name's text in the picture, and its kind."""
    if name.endswith("/*"):
        return name.removesuffix("*"), "folder"
    return f"{name or '__init__'}.py", "file"


def picture() -> str:
    """The SVG: a row for each level, highest first, and a box for each folder or file."""
    rows = levels()
    parts = [HEAD % (WIDTH, len(rows) * ROW + GAP)]
    for number in range(len(rows), 0, -1):
        top = (len(rows) - number) * ROW + GAP
        middle = top + (ROW - GAP) / 2
        parts.append(
            f'<rect class="level" x="{GAP}" y="{top}" width="{WIDTH - 2 * GAP}" '
            f'height="{ROW - GAP}" rx="6"/>'
            f'<text class="number" x="42" y="{middle:g}">{number}</text>'
        )
        names = sorted(rows[number - 1], key=lambda name: (not name.endswith("*"), name))
        width = (WIDTH - LEFT - 2 * GAP) / len(names) - GAP
        width = min(width, 220)
        for place, name in enumerate(names):
            text, kind = shown(name)
            x = LEFT + place * (width + GAP)
            parts.append(
                f'<rect class="{kind}" x="{x:g}" '
                f'y="{middle - BOX / 2:g}" width="{width:g}" height="{BOX}" rx="4"/>'
                f'<text x="{x + width / 2:g}" y="{middle:g}">{text}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture())
