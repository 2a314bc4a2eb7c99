"""Progress: bars and lines on standard error of the process that shows them, nowhere else."""

import re

from gptjax.runtime.progress import Progress


def final(err: str) -> str:
    """The line that a bar leaves."""
    assert err.endswith("\n")
    return err.rstrip("\n").rpartition("\r")[2]


def test_a_bar_shows_where_a_phase_is_and_the_values_beside_it(capsys) -> None:
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


def test_the_total_may_become_known_later(capsys) -> None:
    with Progress().bar("read", None) as bar:
        bar.update(10)
        bar.update(20, total=40)
    assert "20/40" in final(capsys.readouterr().err)


def test_bytes_are_shown_in_units(capsys) -> None:
    with Progress().bar("tokenize", 4_000_000, unit="B") as bar:
        bar.update(1_000_000)
    assert "1.00M/4.00M" in final(capsys.readouterr().err)


def test_a_line_carries_the_seconds_since_the_start(capsys) -> None:
    Progress().say("resumed after step 5")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\[ +\d+\.\d s\] resumed after step 5\n", err)


def test_a_line_said_within_a_bar_stays_whole(capsys) -> None:
    progress = Progress()
    with progress.bar("train", 10) as bar:
        bar.update(3)
        progress.say("step 3: a line")
        bar.update(10)
    lines = re.split(r"[\r\n]", capsys.readouterr().err)
    assert len([line for line in lines if line.endswith("s] step 3: a line")]) == 1


def test_a_process_that_does_not_show_it_prints_nothing(capsys) -> None:
    progress = Progress(shown=False)
    with progress.bar("train", 10) as bar:
        bar.update(5, loss=1.0)
        progress.say("a line")
    assert capsys.readouterr() == ("", "")
