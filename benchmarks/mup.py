"""Do activations and the best rate stay where they are when a model grows? Standard and muP.

Models are trained on the bytes of a text, each from the same seed on the same batches. Three
measurements: the root mean square of the activations after ten steps by width (the coordinate
check of Yang et al., 2022), and the training loss over a grid of rates by width and by depth, the
mean of three seeds, whose minimum is fitted with a parabola in log(rate).

    python benchmarks/mup.py --data PATH/TO/input.txt --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from programs import RecipeRun

from consyn_jax.model.transformer import Compute
from consyn_jax.tuning.shared_programs import SharedPrograms

HEAD = 32
BASE = {"base_hidden_dim": 64, "base_num_layers": 2, "base_head_dim": HEAD}
COMMON: dict[str, Any] = {
    **{
        "model": "haiku",
        "tokenizer": "bytes",
        "validation_fraction": 0.1,
        "logging_backend": "none",
    },
    **{"max_tokens": 64, "batch_size": 8, "head_dim": HEAD, "optimizer": "adamw"},
    **{"scheduler": "constant_with_warmup", "warmup_steps": 10, "weight_decay": 0.1},
}
KINDS = ("mup", "standard")
SEEDS = (1, 2, 3)
LAST = 30  # steps whose mean loss judges a rate


def run_of(
    data: Path,
    kind: str,
    width: int,
    layers: int,
    lr: float,
    steps: int,
    seed: int = 1,
    shared: SharedPrograms | None = None,
) -> RecipeRun:
    """A run of a model of this width and depth."""
    sizes = {"hidden_dim": width, "num_layers": layers, "mlp_dim": 3 * width}
    heads = {"num_heads": width // HEAD, "num_kv_heads": width // HEAD}
    own = {"parametrization": kind, "lr": lr, "max_steps": steps, "seed": seed, **BASE}
    return RecipeRun(data, COMMON, {**sizes, **heads, **own}, shared)


def trained(run: RecipeRun, steps: int) -> tuple[Any, list[float]]:
    """The state after some steps, and the loss of each."""
    state, losses = run.state, []
    for _, batch in zip(range(steps), run.batches(), strict=False):
        state, metrics = run.step(state, jax.tree.map(jax.device_put, batch))
        losses.append(float(metrics["loss"]))
    return state, losses


def activations(run: RecipeRun, params: Any) -> dict[str, float]:
    """Root mean squares of what the blocks add, of their output, and of the logits."""
    batch = next(iter(run.batches()))
    model = nnx.merge(run.program.layout.graphdef, params)
    ids, segments = (jnp.asarray(batch[name][0]) for name in ("input_ids", "segment_ids"))
    hidden, looks = model.traced(ids, segments, Compute(), None, _size)
    looks["logits"] = _size(hidden @ model.head_VD.T)
    return {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in looks.items()}


def _size(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def coordinate_check(data: Path, widths: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Mean activations after `steps` at one rate, and their ratio to those of the narrowest model."""
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        first: dict[str, float] = {}
        for width in widths:
            runs = (run_of(data, kind, width, 2, 2**-8, steps, seed) for seed in SEEDS)
            of_seeds = [activations(run, trained(run, steps)[0].params) for run in runs]
            found = {
                name: statistics.fmean(each[name] for each in of_seeds) for name in of_seeds[0]
            }
            first = first or found
            ratios = {f"{name} ratio": found[name] / first[name] for name in found}
            rows.append({"of": "activations", "kind": kind, "width": width, **found, **ratios})
            print(rows[-1], flush=True)
    return rows


def mean_loss(
    data: Path, kind: str, width: int, layers: int, lr: float, steps: int, shared: SharedPrograms
) -> float:
    """The training loss of the last steps, the mean of all seeds; of one seed in a tiny run."""
    seeds = SEEDS if steps > LAST else SEEDS[:1]
    runs = (run_of(data, kind, width, layers, lr, steps, seed, shared) for seed in seeds)
    return statistics.fmean(np.mean(trained(run, steps)[1][-LAST:]) for run in runs)


def best_rates(
    data: Path,
    name: str,
    sizes: Sequence[tuple[int, int]],
    rates: Sequence[float],
    steps: int,
    kinds: Sequence[str],
) -> list[dict[str, Any]]:
    """The best rate of each size (width, layers), and its ratio to that of the first."""
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        first = 0.0
        for width, layers in sizes:
            shared = SharedPrograms()  # one compilation for all rates and seeds of a size
            losses = [mean_loss(data, kind, width, layers, lr, steps, shared) for lr in rates]
            best = minimum(rates, losses)
            first = first or best
            by_rate = {f"{lr:.2g}": loss for lr, loss in zip(rates, losses, strict=True)}
            found = {"best rate": best, "against the first": best / first, "loss": min(losses)}
            rows.append({"of": name, "kind": kind, "width": width, "layers": layers, **found})
            rows[-1]["losses"] = str(by_rate)
            print(rows[-1], flush=True)
    return rows


def minimum(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at the minimum of a parabola through the lowest loss and its neighbours.

    >>> round(minimum([1, 2, 4, 8], [3, 1, 1, 3]), 3)
    2.828
    """
    i = int(np.clip(np.argmin(losses), 1, len(rates) - 2))
    a, b, _ = np.polyfit(np.log(rates[i - 1 : i + 2]), losses[i - 1 : i + 2], 2)
    lowest, highest = np.log(rates[i - 1]), np.log(rates[i + 1])
    return float(np.exp(np.clip(-b / (2 * a), lowest, highest))) if a > 0 else float(rates[i])


def measure(
    data: Path,
    parts: Sequence[str],
    kinds: Sequence[str] = KINDS,
    powers: Sequence[float] = range(10, 4, -1),
    steps: int = 150,
    tiny: bool = False,
) -> dict[str, Any]:
    """The rows of all measurements, at the rates 2^-power."""
    widths, depths, steps = (64, 128, 256, 512), (2, 4, 8, 16), steps
    rates = [2.0**-power for power in powers]
    if tiny:
        widths, depths, steps, rates = (32, 64), (1, 2), 12, rates[2:5]
    by_size = {
        "width": [(width, 2) for width in widths],
        "depth": [(64, layers) for layers in depths],
    }
    rows: list[dict[str, Any]] = []
    if "activations" in parts:
        rows += coordinate_check(data, widths if tiny else (*widths, 1024), 10)
    for part in filter(by_size.__contains__, parts):
        rows += best_rates(data, f"rate by {part}", by_size[part], rates, steps, kinds)
    own = {name: COMMON[name] for name in ("batch_size", "scheduler")}
    return {"steps": steps, **own, "seeds": SEEDS, "base": BASE, "rows": rows}


def main() -> None:
    """Run, print the table, write JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a text, such as tiny Shakespeare")
    parts = ("activations", "width", "depth")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of the rates")
    parser.add_argument(
        "--powers", nargs="+", type=float, default=range(10, 4, -1), help="rates are 2^-POWER"
    )
    parser.add_argument("--steps", type=int, default=150, help="of each run")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of 64 bytes in a step")
    parser.add_argument("--scheduler", default=COMMON["scheduler"], help="of the learning rate")
    a = parser.parse_args()
    COMMON.update(batch_size=a.batch_size, scheduler=a.scheduler)
    harness.report(measure(a.data, a.parts, a.kinds, a.powers, a.steps, a.tiny), a.out)


if __name__ == "__main__":
    main()
