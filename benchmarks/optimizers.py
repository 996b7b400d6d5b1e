"""Which optimizer learns most from the same steps of tiny Shakespeare, each tuned by six trials?

Each trains the model of configs/shakespeare-bytes.yaml on its batches under its schedule. Six
trials of 300 steps find its settings (see `tune`); then it trains 2,000 steps with the best of
them, and again with a third of the rate, because short trials favour high rates. Judged on the
WHOLE validation part. The shipped recipe follows on three seeds. The results are written after
every run, and runs that are already in the file are not repeated.

    python benchmarks/optimizers.py --data PATH/TO/input.txt --out benchmarks/results/NAME.json

To compare another recipe with the shipped one, on the same three seeds and in the same file:

    python benchmarks/optimizers.py --data PATH/TO/input.txt --out NAME.json \
        --instead rope_theta=100 lr_multipliers=head=0.5
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import jax
from harness import facts, write
from programs import RecipeRun

from consyn_jax.config_file import read_config_file
from consyn_jax.training.optim.state import evaluation_params

RECIPE = Path(__file__).parents[1] / "configs" / "shakespeare-bytes.yaml"
GOAL = 1.886  # nats: nanoGPT's final loss on the same split, 2,000 steps of 12 x 64 characters
TRIAL_STEPS, STEPS, SEEDS = 300, 2000, (42, 1, 2)
# Flags of the recipe that are for its own optimizer only.
OPTIMIZERS_OWN = (
    "optimizer",
    "lr",
    "lr_multipliers",
    "weight_decay",
    "beta1",
    "beta2",
    "momentum",
    "max_grad_norm",
    "eps",
)
EMBEDDING = {"lr_multipliers": "embedding=3"}
# For each optimizer: its first rate, another momentum to try, and flags that it always needs.
# AdamW's decay would shrink the weights of sgd by 3 % and more per step, because sgd's rates are so
# much higher; schedule-free training refuses falling rates.
SPACE: dict[str, tuple[float, dict[str, float], dict[str, Any]]] = {
    "adamw": (4e-3, {"beta1": 0.8}, {}),
    "adafactor": (4e-3, {"momentum": 0.9}, {}),
    "lion": (8e-4, {"beta1": 0.95}, {}),
    "muon": (4e-3, {"momentum": 0.9}, {}),
    "sgd": (0.3, {"momentum": 0.95}, {"weight_decay": 1e-3}),
    "schedule_free_adamw": (8e-3, {"beta1": 0.95}, {"scheduler": "constant_with_warmup"}),
}


def train(
    data: Path, settings: dict[str, Any], steps: int, seed: int, shipped: bool = False
) -> dict[str, Any]:
    """Train once; the final validation loss in nats and the processor time per step.

    A long run is also evaluated on the way to the goal.
    """
    recipe = read_config_file(RECIPE)
    if not shipped:
        recipe = {name: value for name, value in recipe.items() if name not in OPTIMIZERS_OWN}
    run = RecipeRun(data, recipe, {"max_steps": steps, "seed": seed, **settings})
    state, evaluated = run.state, jax.jit(evaluation_params)
    curve: list[tuple[int, float]] = []
    reached, cpu_s = None, 0.0
    began = time.process_time()
    for done, batch in zip(range(1, steps + 1), run.batches(), strict=False):
        state, metrics = run.step(state, jax.tree.map(jax.device_put, batch))
        every = 50 if done <= 600 else 100
        seeks_goal = steps == STEPS and reached is None and done >= 300 and done % every == 0
        if done % 500 == 0 or done == steps or seeks_goal:
            jax.block_until_ready(metrics)
            cpu_s += time.process_time() - began
            loss = run.evaluation(evaluated(state.opt_state, state.params))["eval/loss"]
            curve.append((done, loss))
            reached = done if reached is None and loss <= GOAL else reached
            began = time.process_time()
    last = curve[-1][1]
    return {
        "loss": last if math.isfinite(last) else None,
        "reached_goal_at": reached,
        "cpu_ms_a_step": 1e3 * cpu_s / steps,
        "parameters": run.program.layout.num_parameters,
        "curve": [point for point in curve if math.isfinite(point[1])],
    }


def tune(optimizer: str, trial: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """The best settings of six trials.

    These are three rates, a factor of 3 apart; a fourth beyond the best of them, or between it and
    the better of its neighbours; and, each on top of the best so far, another momentum and a higher
    rate for the embedding.
    """
    first, momentum, always = SPACE[optimizer]
    losses: dict[float, float] = {}

    def try_rate(rate: float) -> None:
        rate = float(f"{rate:.2g}")
        losses[rate] = trial({"lr": rate, **always})

    for rate in (first / 3, first, first * 3):
        try_rate(rate)
    second, best = sorted(losses, key=lambda rate: losses[rate], reverse=True)[-2:]
    try_rate((best * second) ** 0.5 if best == first else best**2 / first)
    settings = {"lr": min(losses, key=lambda rate: losses[rate]), **always}
    least = min(losses.values())
    for other in (momentum, EMBEDDING):
        loss = trial({**settings, **other})
        if loss < least:
            settings, least = {**settings, **other}, loss
    return settings


class Results:
    """The runs so far, kept in a file between starts of the script."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = (
            json.loads(path.read_text())["runs"] if path is not None and path.exists() else []
        )

    def get(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run that `key` describes; `make` runs it if it is not there yet."""
        found = next(
            (run for run in self.runs if {name: run.get(name) for name in key} == key), None
        )
        if found is None:
            found = json.loads(json.dumps({**key, **make()}))
            self.runs.append(found)
            print({name: value for name, value in found.items() if name != "curve"}, flush=True)
            self.write()
        return found

    def write(self) -> None:
        """Write all runs with the facts of the machine."""
        if self.path is not None:
            about = {"goal": GOAL, "trial_steps": TRIAL_STEPS, "steps": STEPS}
            write(self.path, {**facts(), **about, "runs": self.runs})


def parse_arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__, tiny=False)
    everything = [*SPACE, "recipe"]
    parser.add_argument("--data", type=Path, required=True, help="tiny Shakespeare, input.txt")
    parser.add_argument(
        "--only", nargs="+", choices=everything, default=everything, help="contestants (all)"
    )
    parser.add_argument(
        "--instead",
        nargs="+",
        metavar="FLAG=VALUE",
        default=[],
        help="only the recipe, with these flags in place of its own",
    )
    return parser.parse_args()


def loss_of(found: dict[str, Any]) -> float:
    """The final loss of a run, infinite if it diverged."""
    return math.inf if found["loss"] is None else found["loss"]


def print_table(best: list[dict[str, Any]]) -> None:
    print("| optimizer | settings | nats at 2,000 | steps to 1.886 | processor ms a step |")
    print("|---|---|---:|---:|---:|")
    for found in sorted(best, key=loss_of):
        settings = dict(found["settings"])
        name = settings.pop("optimizer")
        words = ", ".join(f"{flag} {value}" for flag, value in settings.items())
        print(
            f"| {name} | {words} | {found['loss']:.3f} | {found['reached_goal_at']} | "
            f"{found['cpu_ms_a_step']:.0f} |"
        )


def main() -> None:
    """Run what is missing, print the table, write JSON."""
    arguments = parse_arguments()
    results = Results(arguments.out)
    changes = dict(text.split("=", 1) for text in arguments.instead)
    contestants = ["recipe"] if changes else arguments.only

    def run(
        kind: str, settings: dict[str, Any], steps: int, seed: int = SEEDS[0]
    ) -> dict[str, Any]:
        key = {"kind": kind, "settings": settings, "seed": seed}
        return results.get(
            key, lambda: train(arguments.data, settings, steps, seed, shipped=kind == "recipe")
        )

    best = []
    for name in filter(SPACE.__contains__, contestants):
        chosen = {"optimizer": name}
        settings = tune(
            name, lambda given, chosen=chosen: loss_of(run("trial", chosen | given, TRIAL_STEPS))
        )
        rates = (settings["lr"], float(f"{settings['lr'] / 3:.2g}"))
        finals = [run("final", {**chosen, **settings, "lr": rate}, STEPS) for rate in rates]
        best.append(min(finals, key=loss_of))
    recipe = [run("recipe", changes, STEPS, seed) for seed in SEEDS if "recipe" in contestants]
    print_table(best)
    print("the recipe:", [(r["seed"], r["loss"], r["reached_goal_at"]) for r in recipe])
    results.write()


if __name__ == "__main__":
    main()
