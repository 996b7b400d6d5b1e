"""Detect spikes: losses far above the losses before them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

WINDOW, FEWEST = 100, 20  # the most and the fewest earlier losses to compare with
# A loss is a spike if it exceeds the median of earlier losses by more than both thresholds: this
# many median absolute deviations (10 are 6.7 standard deviations of a normal distribution), and
# this share of the median. The second threshold is for losses that hardly vary.
DEVIATIONS, LEAST_SHARE = 10.0, 0.1


@dataclass
class LossSpikeDetector:
    """Reports the first loss of each spike, by comparing it with recent losses.

    Every checkpoint contains this state, so that a resumed run reports the same spikes.

    Attributes:
        losses: recent losses, the newest last.
        above: whether the newest loss is part of a spike.
    """

    losses: list[float] = field(default_factory=list)
    above: bool = False

    def update(self, loss: float) -> float | None:
        """Add a finite loss; if a spike begins with it, return the median of the recent losses.

        >>> detector = LossSpikeDetector()
        >>> [detector.update(loss) for loss in [2.0, 2.1] * 10 + [7.0, 6.5, 2.0]][-4:]
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
