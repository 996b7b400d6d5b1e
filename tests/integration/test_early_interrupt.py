"""Ctrl-C while a command starts ends it in order, in whatever library it is at that moment."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import TINY, start

pytestmark = pytest.mark.slow

MOMENTS_S = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.3, 1.6, 2.0)


@pytest.mark.parametrize("moment_s", MOMENTS_S)
def test_interrupted_at_any_moment_of_the_start(
    moment_s: float, corpus: Path, tmp_path: Path
) -> None:
    process = start([*TINY, "--data", corpus, "--output", tmp_path / "run"])
    time.sleep(moment_s)
    process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=240)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    # Before Python has come to the command, the signal itself is what ends it, or Python does.
    if said.startswith("Fatal Python error: init_"):
        return
    assert process.returncode in (130, -signal.SIGINT, 75, 0), (process.returncode, said)
    assert "Fatal Python error" not in said
    assert "terminate called" not in said
