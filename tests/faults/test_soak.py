"""Four trials of soak.py, about a minute; CONTRIBUTING.md has the command for an hour."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_faults_at_random_lose_nothing() -> None:
    """Trials 3 to 6 are of four kinds: a kill, a connection, a full disk and a damaged file."""
    soak = [sys.executable, Path(__file__).with_name("soak.py"), "--first", "3", "--trials", "4"]
    soak += ["--minutes", "15"]
    done = subprocess.run(soak, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"^(\d+) faults \(.*\); trials: (.*), 0 failed$", done.stdout, re.MULTILINE)
    assert counts, done.stdout + done.stderr
    assert int(counts[1]) >= 2  # a slow machine may miss some
    assert sum(map(int, re.findall(r"\d+", counts[2]))) == 4
    print(done.stdout)
