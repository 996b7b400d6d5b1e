"""Does a narrow type cost accuracy? float32, bfloat16, float16 and fp8 on tiny Shakespeare.

Each trains configs/shakespeare-bytes.yaml for 1,000 steps from the same weights on the same
batches, on three seeds, and is judged on the whole validation part. One more contestant is float16
whose loss scale begins 2^16 times too high: it must recover. Where the device has no arithmetic of
a type, it is simulated by rounding after each operation, so the losses count and the times do not.

    python benchmarks/precision.py --data PATH/TO/input.txt --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
from programs import RecipeRun

from consyn_jax.config_file import read_config_file

RECIPE = Path(__file__).parents[1] / "configs" / "shakespeare-bytes.yaml"
CONTESTANTS = {
    "float32": ("no", None),
    "bfloat16": ("bf16", None),
    "fp8": ("fp8", None),
    "float16": ("fp16", None),
    "float16, overflowing": ("fp16", 2.0**32),
}


def train(
    data: Path, precision: str, first_scale: float | None, seed: int, steps: int
) -> dict[str, float]:
    """Validation loss after `steps`, and for float16 the final loss scale."""
    flags = {"mixed_precision": precision, "seed": seed, "max_steps": steps}
    run = RecipeRun(data, read_config_file(RECIPE), flags)
    state = run.state
    if first_scale is not None:
        state = state._replace(opt_state=state.opt_state._replace(scale=jnp.float32(first_scale)))
    began, metrics = time.perf_counter(), {}
    for _, batch in zip(range(steps), run.batches(), strict=False):
        state, metrics = run.step(state, jax.tree.map(jax.device_put, batch))
    found = {
        name: float(metrics[name])
        for name in ("loss", "loss_scale", "skipped_steps")
        if name in metrics
    }
    seconds = time.perf_counter() - began
    return {"eval_loss": run.evaluation(state.params)["eval/loss"], "train_s": seconds, **found}


def measure(data: Path, contestants: list[str], seeds: list[int], steps: int) -> dict[str, Any]:
    """One row per contestant and seed, with the distance to the first contestant on that seed."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        first: dict[str, float] = {}
        for name in contestants:
            found = train(data, *CONTESTANTS[name], seed, steps)
            first = first or found
            against = {
                f"against {contestants[0]}": found["eval_loss"] / first["eval_loss"] - 1,
            }
            rows.append({"seed": seed, "type": name, **found, **against})
            print(rows[-1], flush=True)
    return {"steps": steps, "rows": rows}


def main() -> None:
    """Run, print the table, write JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="tiny Shakespeare, input.txt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--types",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        help="the others are compared with the first",
    )
    arguments = parser.parse_args()
    seeds, steps = arguments.seeds, arguments.steps
    if arguments.tiny:
        seeds, steps = seeds[:1], 25
    harness.report(measure(arguments.data, arguments.types, seeds, steps), arguments.out)


if __name__ == "__main__":
    main()
