"""The time of a run by activity: compute, data, evaluation, saving, compiling, and other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from consyn_jax.training.runtime.watchdog import (
    COMPILING,
    EVALUATING,
    SAVING,
    STEPPING,
    WAITING,
)

ACTIVITIES = ("compute", "data", "evaluation", "saving", "compiling", "other")
OF_PHASE = {
    STEPPING: "compute",
    WAITING: "data",
    EVALUATING: "evaluation",
    SAVING: "saving",
    COMPILING: "compiling",
}


def key(activity: str) -> str:
    """The key in `metrics.jsonl` for the seconds spent on an activity since the run began.

    >>> key("data")
    'time/data_s'
    """
    return f"time/{activity}_s"


class ActivityClock:
    """Assigns every second to one activity, so that the activities add up to the wall time.

    The run reports its phase to the watchdog, and each phase belongs to an activity (`OF_PHASE`). A
    step counts as compute until its metrics are read. Waiting for the next batch counts as data.

    Args:
        clock: clock in seconds, with any starting point.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity, self._since = "other", clock()

    def begin(self, earlier: Mapping[str, float]) -> None:
        """Start the clock now.

        Args:
            earlier: seconds by activity from earlier starts of the run.
        """
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0) | dict(earlier)
        self._since = self._clock()

    def enter(self, phase: str) -> None:
        """Add the time until now to the current activity, and begin a new phase.

        Args:
            phase: name of the new phase, as in the watchdog.
        """
        now = self._clock()
        self._seconds[self._activity] += now - self._since
        self._activity, self._since = OF_PHASE.get(phase, "other"), now

    def values(self) -> dict[str, float]:
        """Seconds of each activity since the run began, by key in `metrics.jsonl`."""
        now = self._clock()
        self._seconds[self._activity] += now - self._since
        self._since = now
        return {key(name): round(seconds, 4) for name, seconds in self._seconds.items()}
