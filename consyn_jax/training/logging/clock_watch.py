"""Check regularly whether a GPU of this process throttles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax

from consyn_jax.distributed.gpu_clocks import HALVED, HOT, read_clocks, reasons_in_words
from consyn_jax.distributed.visible_gpus import visible_gpus

EVERY_S = 30.0
IN_A_ROW = 3  # consecutive checks that must find throttling, so that a short dip does not count


def gpus_in_use() -> list[str]:
    """UUIDs of the GPUs that this process trains on; none on a CPU."""
    return [] if jax.default_backend() == "cpu" else visible_gpus()


class ClockWatch:
    """Check the clocks of GPUs, at most every half minute.

    Args:
        gpus: UUIDs of the GPUs.
        clock: clock in seconds, with any starting point.
    """

    def __init__(
        self, gpus: Sequence[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._gpus, self._clock = gpus, clock
        self._next, self._counts = clock(), [0] * len(gpus)
        self._found = ""

    def throttled(self) -> str:
        """Name the GPUs that throttled in the last three checks, with reasons; "" if none did."""
        if not self._gpus or self._clock() < self._next:
            return self._found
        self._next = self._clock() + EVERY_S
        states = read_clocks(self._gpus)
        why = [reasons_in_words([state], HALVED | HOT) for state in states]
        if not states:  # the GPUs have no UUIDs, or NVML is missing
            return ""
        self._counts = [
            count + 1 if reason else 0 for count, reason in zip(self._counts, why, strict=True)
        ]
        found = [
            f"GPU {i}: {reason}"
            for i, (count, reason) in enumerate(zip(self._counts, why, strict=True))
            if count >= IN_A_ROW
        ]
        self._found = "; ".join(found[:3])
        return self._found
