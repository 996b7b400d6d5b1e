"""Loss over a whole dataset, every token weighed alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from consyn_jax.training.loss import LossSums


def evaluate(sums_of: Callable[[Any], LossSums], batches: Iterable[Any], num_bytes: int | None = None) -> dict[str, float]:
    """Metrics of one pass: `eval/loss` (nats per token), `eval/perplexity`, `eval/accuracy`, `eval/tokens`, `eval/bits_per_byte`.

    Sums of batches are added in float64, one batch late, so that the device never waits.

    Args:
        sums_of: the loss sums of a batch, on the device.
        num_bytes: bytes of source text that the tokens stand for; without it there are no bits per byte.
    """
    totals = np.zeros(3)
    pending: LossSums | None = None
    for batch in batches:
        sums = sums_of(batch)
        if pending is not None:
            totals += np.array(jax.device_get(pending), np.float64)
        pending = sums
    if pending is not None:
        totals += np.array(jax.device_get(pending), np.float64)
    nll, tokens, correct = (float(x) for x in totals)
    loss = nll / tokens if tokens else math.nan
    metrics = {
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval/accuracy": correct / tokens if tokens else math.nan,
        "eval/tokens": int(tokens),
    }
    if num_bytes:
        metrics["eval/bits_per_byte"] = nll / math.log(2) / num_bytes
    return metrics
