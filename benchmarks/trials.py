"""How soon is a trial of `consyn-tune` at its first step, and does it compile anything?

Haiku on the text that comes with Python. The trials differ in rate, warm-up, decay, betas,
clipping, dropout and seed, so after the first one nothing is to be compiled. Timed is from
the claim of a trial until its first step is dispatched. On a machine with other load, look at the
processor time of all threads, which bounds the wall time on an idle one.

With `--lanes 8` the question is another one: how many trials an hour do eight lanes train
(`--vectorize 8`), against one trial after the other? Whole studies of eight such trials take turns,
with programs that are compiled already. Timed is a study without the preparation of its data.

    python benchmarks/trials.py --trials 20 --out benchmarks/results/NAME.json
    python benchmarks/trials.py --lanes 8 --out benchmarks/results/NAME.json
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
from consyn_jax.tuning import study_run
from consyn_jax.tuning.optuna_study import OptunaStudy
from consyn_jax.tuning.shared_programs import BoundStep, SharedPrograms

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


def run_study(tiny: bool, trials: int, *more: str) -> int:
    """Run a study with these flags, and return its exit code."""
    size = ["--hidden_dim", "32", "--num_heads", "2", "--num_layers", "1"] if tiny else []
    with tempfile.TemporaryDirectory() as directory:
        words = ["--model", "haiku", *size, "--tokenizer", "bytes", "--max_steps", "10"]
        words += ["--batch_size", "4", "--eval_steps", "5", "--pruner", "none", "--quiet"]
        words += ["--trials", str(trials), "--output", str(Path(directory) / "study"), *more]
        words += ["--validation_fraction", "0.002", "--sampler", "random", "--search", *SEARCH]
        return tune.main(words)


def measure_lanes(lanes: int, tiny: bool = False, rounds: int = 2) -> dict[str, Any]:
    """Trials an hour in lanes and one after the other, a row for each."""
    shared, whole = SharedPrograms(), study_run.Tuning.run
    taken: dict[str, list[tuple[float, float]]] = {"one after the other": [], f"{lanes} lanes": []}

    def timed(self: study_run.Tuning) -> Any:
        self.shared = shared
        began = time.perf_counter(), used_s()
        results = whole(self)
        row = "one after the other" if self.options.vectorize is None else f"{lanes} lanes"
        taken[row].append((time.perf_counter() - began[0], used_s() - began[1]))
        return results

    study_run.Tuning.run = timed  # type: ignore[method-assign]
    tokens = ("--max_tokens", "128")
    harness.alternate(
        {
            "alone": lambda: run_study(tiny, lanes, *tokens),
            "lanes": lambda: run_study(tiny, lanes, *tokens, "--vectorize", str(lanes)),
        },
        rounds,
    )
    study_run.Tuning.run = whole  # type: ignore[method-assign]
    rows = []
    for name, times in taken.items():
        walls, used = zip(*times[1:], strict=True)  # the first one compiles
        rows.append(
            {
                "trials": name,
                "an hour, median": round(3600 * lanes / statistics.median(walls), 1),
                "wall s": [round(wall, 2) for wall in walls],
                "processor s": [round(second, 2) for second in used],
            }
        )
    alone, together = rows
    return {
        "rows": rows,
        "trials an hour, ratio": round(together["an hour, median"] / alone["an hour, median"], 3),
        "processor time, ratio": round(sum(together["processor s"]) / sum(alone["processor s"]), 3),
    }


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
    code = run_study(tiny, 3 if tiny else trials)
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
    parser.add_argument("--lanes", type=int, help="compare lanes with one trial after the other")
    options = parser.parse_args()
    if options.lanes is not None:
        harness.report(measure_lanes(options.lanes, options.tiny), options.out)
        return
    found = measure(options.tiny, options.trials)
    harness.report(found, options.out)
    print(f"Zero programs compiled, first steps within {LIMIT_S:.0f} s: {found['holds']}.")


if __name__ == "__main__":
    main()
