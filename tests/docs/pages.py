"""The pages of README and docs, with their code blocks, code spans, links and headings."""

import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
GENERATED = ("reference", "_build")
HISTORY = {"docs/lab_log.md", "CHANGELOG.md"}  # commands and names as they were at the time

PAGES = sorted(
    page.relative_to(REPO).as_posix()
    for folder in (REPO, DOCS, REPO / "launch")
    for page in (folder.rglob("*.md") if folder == DOCS else folder.glob("*.md"))
    if page.relative_to(folder).parts[0] not in GENERATED
)

_FENCE = re.compile(r"^(?:<!-- (.*?) -->\n)?```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; `comment` is that of the HTML comment on the line before it."""

    page: str
    line: int
    language: str
    text: str
    comment: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text(page: str) -> str:
    return (REPO / page).read_text()


def blocks(language: str) -> list[Block]:
    """All blocks of a language, in the pages that are no history."""
    found = []
    for page in PAGES:
        if page in HISTORY:
            continue
        source = text(page)
        for match in _FENCE.finditer(source):
            if match[2] == language:
                line = source.count("\n", 0, match.start(3)) + 1
                found.append(Block(page, line, language, match[3], match[1] or ""))
    return found


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text(page))


def spans(page: str) -> list[str]:
    """The code spans of a page, without those of headings."""
    body = re.sub(r"^#.*$", "", prose(page), flags=re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", body)


def links(page: str) -> list[str]:
    """The targets of a page's links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(slug.replace(" ", "-"))
    return found
