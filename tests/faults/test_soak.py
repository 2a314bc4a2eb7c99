"""Six trials of soak.py, about a minute; CONTRIBUTING.md has the command for an hour."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_faults_at_random_lose_nothing() -> None:
    soak = [sys.executable, Path(__file__).with_name("soak.py"), "--trials", "6", "--minutes", "15"]
    done = subprocess.run(soak, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"^(\d+) faults \(.*\); trials: (.*), 0 failed$", done.stdout, re.MULTILINE)
    assert counts, done.stdout + done.stderr
    assert int(counts[1]) >= 3
    assert sum(map(int, re.findall(r"\d+", counts[2]))) == 6
    print(done.stdout)
