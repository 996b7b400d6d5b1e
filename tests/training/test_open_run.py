"""The resources of a run: what a signal means while they are closed."""

import signal
from typing import Any

import pytest

from consyn_jax.errors import Interrupted, Unsaved
from consyn_jax.resolve import resolve
from consyn_jax.training.open_run import run_resources

RUN = resolve({"output": "runs/verse"})[0]


def stop() -> None:
    raise Unsaved(signal.SIGTERM)


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ({}, "the same command"),
        ({"overwrite": True}, "the same command without --overwrite"),
        ({"resume": "never"}, "the same command with --resume auto"),
    ],
)
def test_a_signal_after_the_end_of_a_run_does_not_say_that_nothing_is_saved(
    flags: dict[str, Any], command: str
) -> None:
    """The command that it names does not delete the run."""
    run = resolve({"output": "runs/verse"} | flags)[0]
    with pytest.raises(Interrupted) as stopped, run_resources(run) as stack:
        stack.callback(stop)
    assert str(stopped.value) == (
        "SIGTERM: the run in runs/verse is complete, but its last files may be incomplete. Run "
        f"{command} again to check them."
    )


def test_a_signal_before_the_end_of_a_run_stays_what_it_is() -> None:
    closed = []

    def work() -> None:
        with run_resources(RUN) as stack:
            stack.callback(lambda: closed.append(True))
            stop()

    with pytest.raises(Unsaved) as stopped:
        work()
    stopped.value.settle()
    assert closed == [True]
