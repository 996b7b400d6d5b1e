"""What flushes, manifests and records cost a run that saves a checkpoint a minute.

Two checkouts take turns: this one, and the one that `--before` names, of a commit without them
(5131176; `git worktree add ../before 5131176`). Each turn is a run of the same model on the same
data, in a directory of its own, long enough for several checkpoints. Compared are the tokens per
second between the first checkpoint and the last step, as metrics.jsonl has them: work, waiting and
saving. Must: at most 1 % slower.

    python benchmarks/durability.py --before ../before --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, parser, report

MODEL = "--model haiku --tokenizer bytes --max_tokens 256 --batch_size 8 --logging_steps 5 --quiet"
SAVING = "--logging_backend none --validation_fraction 0"


def tokens_per_s(tree: Path, cache: Path, output: Path, steps: int, minutes: float) -> float:
    """Train with the code of `tree`; the rate after the first tenth of the steps."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "CONSYN_CACHE": str(cache)}
    command = [sys.executable, "-m", "consyn_jax.cli.train", *MODEL.split(), *SAVING.split()]
    command += ["--max_steps", str(steps), "--save_steps", str(steps), "--output", str(output)]
    command += ["--save_minutes", str(minutes)]
    subprocess.run(command, env=environment, check=True, cwd=output.parent)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steady = [line for line in lines if "train/loss" in line and line["step"] >= steps // 10]
    first, last = steady[0], steady[-1]
    return (last["tokens"] - first["tokens"]) / (last["time_s"] - first["time_s"])


def measure(before: Path, steps: int, rounds: int, minutes: float) -> dict[str, Any]:
    """Rates of both trees in turns, every other round in the opposite order."""
    trees = {"before": before.resolve(), "now": ROOT.resolve()}
    rates: dict[str, list[float]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            names = list(trees) if number % 2 == 0 else list(reversed(trees))
            for name in names:
                output = Path(folder) / f"{name}-{number}"
                rates[name].append(tokens_per_s(trees[name], Path(folder), output, steps, minutes))
    ratios = [now / then for then, now in zip(rates["before"], rates["now"], strict=True)]
    rows = [
        {"tree": name, "tokens_per_s": statistics.median(found)} for name, found in rates.items()
    ]
    return {
        "steps": steps,
        "rounds": rounds,
        "save_minutes": minutes,
        "rates": rates,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "rows": rows,
    }


def main() -> None:
    made = parser(__doc__, tiny=False)
    made.add_argument("--before", type=Path, required=True, help="a checkout to compare with")
    made.add_argument("--steps", type=int, default=1500, help="of each run: several minutes")
    made.add_argument("--rounds", type=int, default=6)
    made.add_argument("--save_minutes", type=float, default=1.0, help="less shows the cost larger")
    given = made.parse_args()
    found = measure(given.before, given.steps, given.rounds, given.save_minutes)
    report(found, given.out)
    print(f"now / before: {found['ratio']:.4f} by the median of {given.rounds} rounds")


if __name__ == "__main__":
    main()
