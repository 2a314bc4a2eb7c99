"""The page in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

IDLE = "document.querySelector('#stop').disabled && document.querySelectorAll('.piece').length > 0"
TEXT = "document.querySelector('#text').textContent"
STATUS = "document.querySelector('#status').textContent"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


def test_text_streams_in_with_token_probabilities(browser, server) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.until("document.querySelector('#model').textContent.startsWith('tiny')")
    prompt = "<img src=x onerror=alert(1)> abc"
    browser.type("#prompt", prompt)
    browser.type("#max_tokens", "24")
    browser.type("#seed", "3")
    browser.click("#go")
    browser.until(IDLE)
    _, answer = server.complete(prompt=prompt, max_tokens=24, seed=3, temperature=0.8, top_p=0.95)
    (choice,) = answer["choices"]
    if choice["finish_reason"] == "length":
        assert browser.run(TEXT) == prompt + choice["text"]
    drawn = answer["usage"]["completion_tokens"]
    assert browser.run("document.querySelectorAll('.piece').length") == drawn
    assert browser.run(STATUS).endswith("; seed 3")
    assert not browser.run("document.querySelector('#text img') !== null")
    browser.hover(".piece")
    browser.until("document.querySelector('#tip').style.display === 'block'")
    assert browser.run("document.querySelectorAll('#tip tr').length") >= 5
    assert browser.run("document.querySelectorAll('#tip tr.own').length") == 1
    assert "%" in browser.run("document.querySelector('#tip').textContent")
    browser.picture_for_docs("serve.png")
    assert browser.problems == []


def test_stop_button_ends_the_stream_and_frees_the_slot(browser, server) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/")
    server.throttle.seconds = 0.05
    browser.type("#prompt", "abc")
    browser.type("#max_tokens", "1000")
    browser.click("#go")
    browser.until("document.querySelectorAll('.piece').length > 3")
    browser.click("#stop")
    browser.until(IDLE)
    assert "stopped after" in browser.run(STATUS)
    server.until(lambda: server.metric("gptjax_rows_busy") == 0)
    assert browser.run("document.querySelectorAll('.piece').length") < 1000


def test_error_message_is_shown(browser, server) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.type("#prompt", "abc")
    browser.type("#temperature", "-1")
    browser.click("#go")
    browser.until("document.querySelector('#status').classList.contains('wrong')")
    assert browser.run(STATUS) == "temperature=-1: must not be negative"


def test_page_asks_for_the_token(browser, start) -> None:
    with start(token=b"secret", hosts=None) as server:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.type("#prompt", "abc")
        browser.click("#go")
        browser.until("document.querySelector('#status').classList.contains('wrong')")
        assert "token" in browser.run(STATUS)
        browser.type("#token", "secret")
        browser.click("#go")
        browser.until(IDLE)


def test_nothing_is_loaded_from_other_origins(browser, server) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.run("document.body.append(Object.assign(new Image(), {src: '/health'}))")
    browser.until("document.images[0].complete")
    assert browser.run("document.images[0].naturalWidth") == 0
    browser.run("1")
    assert any("Content Security Policy" in problem for problem in browser.problems)
