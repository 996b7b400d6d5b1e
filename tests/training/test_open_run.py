"""The resources of a run: what a signal means while they are closed."""

import signal
from pathlib import Path

import pytest

from consyn_jax.errors import Interrupted, Unsaved
from consyn_jax.training.open_run import run_resources

PATH = Path("runs/verse")


def stop() -> None:
    raise Unsaved(signal.SIGTERM)


def test_a_signal_after_the_end_of_a_run_does_not_say_that_nothing_is_saved() -> None:
    with (
        pytest.raises(Interrupted, match=r"^SIGTERM: the run in runs/verse is complete, but its "),
        run_resources(PATH) as stack,
    ):
        stack.callback(stop)


def test_a_signal_before_the_end_of_a_run_stays_what_it_is() -> None:
    closed = []

    def work() -> None:
        with run_resources(PATH) as stack:
            stack.callback(lambda: closed.append(True))
            stop()

    with pytest.raises(Unsaved) as stopped:
        work()
    stopped.value.settle()
    assert closed == [True]
