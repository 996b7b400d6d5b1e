"""Metrics of runs for the tests of this folder."""

import math
from typing import Any

HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\x00\x1b[2J\ud800 & "
    '"quotes" {body} {style}'
)


def run(steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "time_s": 0.0, "event": "start"}]
    for step in range(1, steps + 1):
        at = {"step": step, "tokens": 512 * step, "time_s": 0.5 * step}
        loss = 3 + 5 * math.exp(-step / 10)
        speed = {
            "throughput/tokens_per_s": 1024.0,
            "throughput/mfu": 0.4,
            "memory/peak_bytes": 2**30,
        }
        lines.append(
            at
            | {"train/loss": loss, "train/learning_rate": 1e-3 / step, "train/grad_norm": 1.0}
            | speed
        )
        if step % 5 == 0:
            lines.append(
                at
                | {
                    "eval/loss": loss + abs(step - 15) / 10,
                    "eval/perplexity": 30.0,
                    "eval/bits_per_byte": 1.5,
                    "eval/accuracy": 0.4,
                }
            )
    return [
        *lines,
        {
            "step": steps,
            "tokens": 512 * steps,
            "time_s": 0.5 * steps,
            "event": "resume",
            "why": HOSTILE,
            "eval/loss": 0.5,
        },
    ]


NOT_FINITE = [
    {
        "step": 1,
        "tokens": 5,
        "time_s": 1.0,
        "train/loss": math.nan,
        "eval/loss": math.inf,
        "throughput/tokens_per_s": None,
    }
]
CASES = {
    "none": [],
    "event": run(0),
    "one": run(1),
    "two": run(2),
    "some": run(30),
    "many": run(3000),
    "not finite": NOT_FINITE,
    "broken then fine": NOT_FINITE + run(9)[1:],
}
