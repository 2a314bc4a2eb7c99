"""The page of `gptjax plan --html` in a real browser."""

from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_page_opens_without_complaint_and_draws_memory(command_line, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    preset = f"{REPO}/configs/llama.py:llama3_8b"
    code, _, _ = command_line("plan", preset, "--machine", "v5e:16x16", "--search", "--html", page)
    assert code == 0
    browser = Browser(tmp_path / "profile", height=1000)
    try:
        browser.open(page.as_uri())
        assert browser.run("document.querySelectorAll('svg').length") > 0
        assert browser.problems == []
        browser.picture_for_docs("plan.png")
    finally:
        browser.close()
