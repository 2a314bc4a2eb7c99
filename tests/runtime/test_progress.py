"""Progress: bars and lines on standard error, in the process that shows them only."""

import re

from gptjax.runtime.progress import Progress


def final(err: str) -> str:
    """The last state of a bar."""
    assert err.endswith("\n")
    return err.rstrip("\n").rpartition("\r")[2]


def test_bar_shows_progress_and_values(capsys) -> None:
    with Progress().bar("train", 200, done=50) as bar:
        bar.update(60)
        bar.update(150, loss=2.34567, tokens_per_second=123456.7)
    out, err = capsys.readouterr()
    assert out == ""
    line = final(err)
    assert line.startswith("train:  75%")
    assert "150/200" in line
    assert "loss=2.346" in line
    assert "tok/s=123,457" in line


def test_total_may_be_set_later(capsys) -> None:
    with Progress().bar("read", None) as bar:
        bar.update(10)
        bar.update(20, total=40)
    assert "20/40" in final(capsys.readouterr().err)


def test_bytes_are_shown_with_unit_prefixes(capsys) -> None:
    with Progress().bar("tokenize", 4_000_000, unit="B") as bar:
        bar.update(1_000_000)
    assert "1.00M/4.00M" in final(capsys.readouterr().err)


def test_line_begins_with_the_seconds_since_the_start(capsys) -> None:
    Progress().say("resumed after step 5")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\[ +\d+\.\d s\] resumed after step 5\n", err)


def test_line_printed_during_a_bar_is_not_broken(capsys) -> None:
    progress = Progress()
    with progress.bar("train", 10) as bar:
        bar.update(3)
        progress.say("step 3: a line")
        bar.update(10)
    lines = re.split(r"[\r\n]", capsys.readouterr().err)
    assert len([line for line in lines if line.endswith("s] step 3: a line")]) == 1


def test_hidden_progress_prints_nothing(capsys) -> None:
    progress = Progress(shown=False)
    with progress.bar("train", 10) as bar:
        bar.update(5, loss=1.0)
        progress.say("a line")
    assert capsys.readouterr() == ("", "")
