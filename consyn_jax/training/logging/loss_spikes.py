"""Detection of losses that stand out from those before them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

WINDOW, FEWEST = 100, 20  # the most and the fewest earlier losses to compare with
# A loss stands out if it is this many median deviations above the median (6.7 standard deviations
# of a normal distribution) and this share of the median above it. The latter is for losses that
# hardly differ.
DEVIATIONS, LEAST_SHARE = 10.0, 0.1


@dataclass
class LossSpikeDetector:
    """Remembers the last losses and reports the first loss of each spike.

    All of it is in every checkpoint, so that a resumed run reports the same spikes.

    Attributes:
        losses: the newest last.
        above: whether the last loss stood out.
    """

    losses: list[float] = field(default_factory=list)
    above: bool = False

    def update(self, loss: float) -> float | None:
        """Add a finite loss; if it begins a spike, return the median before it.

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
