"""A minute of soak.py; CONTRIBUTING.md has the command for an hour."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_minute_of_faults_loses_nothing() -> None:
    soak = [sys.executable, Path(__file__).with_name("soak.py"), "--minutes", "1"]
    done = subprocess.run(soak, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    faults = re.search(r"^(\d+) faults .* 0 failed$", done.stdout, re.MULTILINE)
    assert faults, done.stdout + done.stderr
    assert int(faults[1]) >= 3
    print(done.stdout)
