"""How soon is a trial of `consyn-tune` at its first step, and does it compile anything?

Haiku on the text that comes with Python. The trials differ in rate, warm-up, decay, betas,
clipping, dropout and seed, so after the first one nothing is to be compiled. Timed is from
the claim of a trial until its first step is dispatched. On a machine with other load, look at the
processor time of all threads, which bounds the wall time on an idle one.

    python benchmarks/trials.py --trials 20 --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import jax

from consyn_jax.cli import tune
from consyn_jax.tuning.optuna_study import OptunaStudy
from consyn_jax.tuning.shared_programs import BoundStep

LIMIT_S = 1.0  # at most, for a trial after the first
COMPILED = "/jax/core/compile/backend_compile_duration"
SEARCH = (
    *("lr=1e-3:1e-2:log", "weight_decay=0:0.3", "beta1=0.8:0.95", "beta2=0.9:0.999"),
    *("warmup_steps=0:5", "max_grad_norm=0.5:2", "dropout=0.05:0.2", "seed=1:999"),
)


def used_s() -> float:
    """Processor time of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(tiny: bool = False, trials: int = 20) -> dict[str, Any]:
    """Run a study, and return a row for each of its trials."""
    rows: list[dict[str, Any]] = []
    began = (0.0, 0.0)
    claim, step = OptunaStudy.claim, BoundStep.__call__

    def claimed(self: OptunaStudy, limit: float) -> Any:
        nonlocal began
        found = claim(self, limit)
        began = time.perf_counter(), used_s()
        if found is not None:
            rows.append({"trial": found.number, "compiled": 0})
        return found

    def stepped(self: BoundStep, state: Any, batch: Any) -> Any:
        if "first step s" not in rows[-1]:
            rows[-1]["first step s"] = round(time.perf_counter() - began[0], 3)
            rows[-1]["processor s"] = round(used_s() - began[1], 3)
        return step(self, state, batch)

    def count(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILED and rows:
            rows[-1]["compiled"] += 1

    OptunaStudy.claim, BoundStep.__call__ = claimed, stepped  # type: ignore[method-assign]
    jax.monitoring.register_event_duration_secs_listener(count)
    size = ["--hidden_dim", "32", "--num_heads", "2", "--num_layers", "1"] if tiny else []
    with tempfile.TemporaryDirectory() as directory:
        words = ["--model", "haiku", *size, "--tokenizer", "bytes", "--max_steps", "10"]
        words += ["--batch_size", "4", "--eval_steps", "5", "--pruner", "none", "--quiet"]
        words += [
            "--trials",
            str(3 if tiny else trials),
            "--output",
            str(Path(directory) / "study"),
        ]
        words += ["--validation_fraction", "0.002", "--sampler", "random", "--search", *SEARCH]
        code = tune.main(words)
    OptunaStudy.claim, BoundStep.__call__ = claim, step  # type: ignore[method-assign]
    later = rows[1:]
    slowest = max(row["first step s"] for row in later)
    compiled = sum(row["compiled"] for row in later)
    return {
        "rows": rows,
        "exit_code": code,
        "compiled by later trials": compiled,
        "first step s, median": statistics.median(row["first step s"] for row in later),
        "first step s, slowest": slowest,
        "holds": code == 0 and compiled == 0 and slowest <= LIMIT_S,
    }


def main() -> None:
    """Time the trials of a study."""
    parser = harness.parser(__doc__)
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()
    found = measure(options.tiny, options.trials)
    harness.report(found, options.out)
    print(f"Zero programs compiled, first steps within {LIMIT_S:.0f} s: {found['holds']}.")


if __name__ == "__main__":
    main()
