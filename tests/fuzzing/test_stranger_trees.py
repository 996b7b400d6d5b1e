"""No tree of a stranger makes a command touch what lies outside of it."""

import subprocess
import sys
from pathlib import Path

import pytest

TREES = 50


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute, and far more beside other load
@pytest.mark.long
def test_nothing_outside_is_touched_and_every_command_ends_with_its_own_code() -> None:
    search = Path(__file__).with_name("stranger_trees.py")
    done = subprocess.run(
        [sys.executable, search, "--trees", str(TREES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"0 of {TREES} broke something" in done.stdout
