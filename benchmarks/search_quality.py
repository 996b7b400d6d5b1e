"""How good is what 16 trials find, against a grid of 64, and what does ending trials early cost?

A small model on the bytes of tiny Shakespeare, over rate and weight decay. A grid of 8 x 8 has the
reference. Then come studies of 16 trials with another seed of the sampler each, with and without a
pruner; the model's seed is the same in all runs, so equal values give equal losses.

    python benchmarks/search_quality.py --data PATH/TO/input.txt --out benchmarks/results/NAME.json

With --output, the studies stay there, and go on if this is started again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import jax  # noqa: F401 - its version belongs to the result
import numpy as np

from consyn_jax.cli import tune
from consyn_jax.tuning import study_run
from consyn_jax.tuning.optuna_study import OptunaStudy
from consyn_jax.tuning.shared_programs import SharedPrograms
from consyn_jax.tuning.study_results import StudyResults

NEAR_GRID, SAVED, LOST = 0.005, 0.4, 0.002  # at most, at least, at most
LR, DECAY = (5e-3, 2e-1), (0.0, 0.3)
TRIALS, STEPS, POINTS = 16, 300, 8
SAMPLER_SEEDS = (1, 2, 3)
FLAGS = (
    *("--model", "haiku", "--num_layers", "2", "--hidden_dim", "32", "--num_heads", "2"),
    *("--mlp_dim", "88", "--tokenizer", "bytes", "--validation_fraction", "0.02"),
    *("--max_tokens", "64", "--batch_size", "12", "--tie_embeddings", "false"),
    *("--optimizer", "muon", "--momentum", "0.9", "--beta2", "0.99"),
    *("--scheduler", "linear", "--min_lr_ratio", "0", "--logging_backend", "none", "--quiet"),
)


class Studies:
    """Studies of one model, which share their programs.

    Args:
        directory: the studies, each in a directory of its own.
    """

    def __init__(self, data: Path, directory: Path, steps: int, points: int) -> None:
        self.shared, self.directory = SharedPrograms(), directory
        flags = (*FLAGS, "--data", str(data), "--max_steps", str(steps))
        self.flags = (*flags, "--eval_steps", str(steps // 10))
        rates, decays = np.geomspace(*LR, points), np.linspace(*DECAY, points)
        self.grid = f"lr={_values(rates)}", f"weight_decay={_values(decays)}"

    def run(self, name: str, *words: str, seed: int = 0) -> StudyResults:
        """The results of a study, or of what is left of it.

        Args:
            seed: of the sampler.
        """
        with captured(self.shared, seed) as results:
            code = tune.main([*self.flags, *words, "--output", str(self.directory / name)])
        assert code == 0, code
        return results[0]

    def of_grid(self) -> StudyResults:
        """All points of the grid."""
        return self.run("grid", "--sampler", "grid", "--pruner", "none", "--search", *self.grid)

    def of_sampler(self, pruner: str, seed: int, trials: int) -> StudyResults:
        """Trials that the sampler chooses from the ranges of the grid."""
        search = f"lr={LR[0]}:{LR[1]}:log", f"weight_decay={DECAY[0]}:{DECAY[1]}"
        words = ["--trials", str(trials), "--pruner", pruner, "--search", *search]
        return self.run(f"{pruner}-{seed}", *words, seed=seed)


def _values(values: Sequence[float] | np.ndarray) -> str:
    return ",".join(f"{value:.4g}" for value in values)


@contextmanager
def captured(shared: SharedPrograms, seed: int) -> Iterator[list[StudyResults]]:
    """Collect the results of studies, which use these programs and this seed of the sampler."""
    found: list[StudyResults] = []
    run, init = study_run.Tuning.run, OptunaStudy.__init__

    def kept(self: study_run.Tuning) -> StudyResults:
        self.shared = shared
        found.append(run(self))
        return found[-1]

    def seeded(self: OptunaStudy, *given: Any, **named: Any) -> None:
        init(self, *given, **{**named, "seed": seed})

    study_run.Tuning.run, OptunaStudy.__init__ = kept, seeded  # type: ignore[method-assign]
    try:
        yield found
    finally:
        study_run.Tuning.run, OptunaStudy.__init__ = run, init  # type: ignore[method-assign]


def best(results: StudyResults) -> float:
    """The lowest loss of a study."""
    assert results.best is not None
    assert results.best.value is not None
    return results.best.value


def curves(results: StudyResults) -> list[dict[str, Any]]:
    """Values and evaluations of all trials."""
    return [
        {"values": dict(trial.values), "losses": [round(x, 5) for x in trial.curve.values()]}
        for trial in results.trials
    ]


def measure(
    data: Path, directory: Path, pruner: str, seeds: Sequence[int], tiny: bool = False
) -> dict[str, Any]:
    """A row for each seed of the sampler, and the curves of all trials."""
    steps, points, trials = (20, 2, 4) if tiny else (STEPS, POINTS, TRIALS)
    studies = Studies(data, directory, steps, points)
    grid = studies.of_grid()
    records, rows = {"grid": curves(grid)}, []
    for seed in seeds:
        whole = studies.of_sampler("none", seed, trials)
        pruned = studies.of_sampler(pruner, seed, trials)
        records |= {f"none, seed {seed}": curves(whole), f"{pruner}, seed {seed}": curves(pruned)}
        rows.append(
            {
                **{"sampler seed": seed, "grid": best(grid)},
                **{"found": best(whole), "above the grid": best(whole) / best(grid) - 1},
                **{f"found with {pruner}": best(pruned), "steps saved": pruned.saved},
                "lost": best(pruned) / best(whole) - 1,
            }
        )
        print(rows[-1], flush=True)
    return {
        "question": f"{trials} trials against a grid of {points} x {points}, and --pruner {pruner}",
        **{"flags": " ".join(FLAGS), "steps": steps, "rows": rows, "studies": records},
        "near the grid": all(row["above the grid"] <= NEAR_GRID for row in rows),
        "pruning pays": all(row["steps saved"] >= SAVED and row["lost"] <= LOST for row in rows),
    }


def main() -> None:
    """Run, print the table, write JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="tiny Shakespeare, input.txt")
    parser.add_argument("--output", type=Path, help="directory for the studies (a temporary one)")
    parser.add_argument("--pruner", default="median", help="to compare with none")
    parser.add_argument("--seeds", type=int, nargs="+", default=SAMPLER_SEEDS, help="of samplers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.output or Path(temporary)
        found = measure(options.data, directory, options.pruner, options.seeds, options.tiny)
    harness.report(found, options.out)
    print(f"Within {NEAR_GRID:.1%} of the grid's best: {found['near the grid']}.")
    print(f"Saves {SAVED:.0%} of the steps, loses {LOST:.1%}: {found['pruning pays']}.")


if __name__ == "__main__":
    main()
