"""Which losses stand out from those before them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

WINDOW, FEWEST = 100, 20  # losses that are looked back at: at most, and at least
# A loss stands out from so many median deviations above the median on (6.7 standard deviations of a normal distribution), and from this
# share of the median: where losses hardly differ, a little more is no spike.
DEVIATIONS, LEAST_SHARE = 10.0, 0.1


@dataclass
class RecentLosses:
    """The losses of the last steps; all of it is in every checkpoint, so that a resumed run tells of the same spikes.

    Attributes:
        losses: the newest last.
        above: the last one stood out.
    """

    losses: list[float] = field(default_factory=list)
    above: bool = False

    def update(self, loss: float) -> float | None:
        """Take in a finite loss. Where it is the first of a spike, the usual loss: the median of those before it.

        >>> recent = RecentLosses()
        >>> [recent.update(loss) for loss in [2.0, 2.1] * 10 + [7.0, 6.5, 2.0]][-4:]
        [None, 2.05, None, None]
        """
        before, was_above = self.losses, self.above
        self.losses = [*before, loss][-WINDOW:]
        if len(before) < FEWEST:
            return None
        usual = statistics.median(before)
        deviation = statistics.median(abs(other - usual) for other in before)
        self.above = loss > usual + max(DEVIATIONS * deviation, LEAST_SHARE * abs(usual))
        return usual if self.above and not was_above else None
