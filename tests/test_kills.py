"""A few of the kills of `tests.kills`; `python -m tests.kills --kills 200` makes more."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_runs_end_with_the_rows_of_undisturbed_ones():
    """In a process of its own: forks are to have no threads of other tests."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--kills", "6"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall("'kills': (\\d+)", done.stdout) == ["2"] * 3
    for name in ("lost", "doubled"):
        assert re.findall(f"'{name}': (\\d+)", done.stdout) == ["0"] * 3
