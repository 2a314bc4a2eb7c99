"""Links between pages and to files of the repository lead somewhere."""

import pages
import pytest
from pages import PAGES, REPO


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_their_anchors_exist(page: str) -> None:
    for link in pages.links(page):
        if "://" in link:
            continue  # the documentation workflow's link check
        path, _, anchor = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        name = target.resolve().relative_to(REPO).as_posix()
        if name.startswith("docs/reference/"):
            continue  # made by the build, which checks it
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in pages.anchors(name), f"{page}: {link}"


def test_every_page_of_the_documentation_is_in_its_table_of_contents() -> None:
    documents = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    listed = {f"{name}.md" for name in pages.text("docs/index.md").split()}
    assert documents - {"index.md"} <= listed
