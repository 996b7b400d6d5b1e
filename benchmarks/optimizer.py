"""What does the optimizer's update cost, against reading and writing its state once?

The update alone, with the gradients there: their norm, clipping, the rule, and the choice between the old and the new state where a step is
not finite. Against it one pass that reads gradients and state and writes the state, which is the least that an update could be. Both
take turns. "passes" is what the compiled program for one H200 moves, in the units of that pass (planning/aot.py): where the CUDA packages
are installed, on any machine. The norm must be known before the update begins, so the gradients are read twice: of AdamW's seven
journeys of a parameter's size that makes eight, 1.143.

    python benchmarks/optimizer.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import statistics
from typing import Any

import harness
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from consyn_jax.config import OPTIMIZERS, ModelConfig, RunConfig, architecture
from consyn_jax.model.parameters import initial_parameters, layout
from consyn_jax.planning.aot import compile_train_step, packages_are_there
from consyn_jax.resolve import resolve
from consyn_jax.training.guard import guarded
from consyn_jax.training.loss import LossSums
from consyn_jax.training.optimizer import of_parameters
from consyn_jax.training.program import build_program
from consyn_jax.training.scheduler import configured_schedule
from consyn_jax.training.step import TrainState, make_train_step

MEMORIES = ("float32", "bfloat16")


def configured(optimizer: str, moments: str, layers: int, width: int | None = None) -> tuple[ModelConfig, RunConfig]:
    """Verse, of so many layers and so wide."""
    given: dict[str, Any] = {"model": "verse", "optimizer": optimizer, "num_layers": layers, "max_tokens": 1024, "batch_size": 4, "lr": 1e-3}
    narrow = {} if width is None else {"hidden_dim": width, "mlp_dim": 2 * width, "num_heads": width // 64, "num_kv_heads": width // 64}
    precision = {"mixed_precision": "bf16", "moment_dtype": moments}
    run, _ = resolve(given | narrow | precision)
    return architecture(run.model, vocab_size=512 if width else 49_152), run


def contestants(model: ModelConfig, run: RunConfig) -> tuple[dict[str, Any], int]:
    """The update and the pass, each a call that waits for nothing, and the bytes of the pass."""
    program = build_program(model, run, configured_schedule(run.optimizer, 10_000), jax.devices()[:1]).program
    gradients = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), initial_parameters(model, 1, program.mesh))
    sums = LossSums(*(jnp.float32(1) for _ in LossSums._fields))

    def objective(params: Any, batch: Any) -> tuple[jax.Array, LossSums]:
        """Of which the given gradients are the gradients."""
        return sum(map(jnp.vdot, jax.tree.leaves(params), jax.tree.leaves(batch["gradients"])), jnp.float32(0)), sums

    update = jax.jit(guarded(make_train_step(objective, program.rule, run.optimizer.max_grad_norm), 1), donate_argnums=0)

    def once(state: TrainState, gradients: Any) -> TrainState:
        """Every array of the state is written, and depends on the old one and on the gradients."""
        own = of_parameters(state.opt_state, program.layout.shapes, gradients, jnp.float32(0))
        params, opt_state = (jax.tree.map(lambda x, g: (x + 1e-9 * g).astype(x.dtype), *pair) for pair in ((state.params, gradients), (state.opt_state, own)))
        return state._replace(params=params, opt_state=opt_state)

    least = jax.jit(once, donate_argnums=0)
    batch = {"gradients": jax.tree.map(lambda g: g[None], gradients), "labels": jnp.zeros((1, 1, 1), jnp.int32)}
    everywhere = NamedSharding(program.mesh, PartitionSpec())
    held = {name: program.initial_state(initial_parameters(model, 0, program.mesh)) for name in ("update", "least")}
    batch = jax.device_put(batch, everywhere)

    def run_update() -> Any:
        held["update"], _ = update(held["update"], batch)
        return held["update"]

    def run_least() -> Any:
        held["least"] = least(held["least"], gradients)
        return held["least"]

    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held["least"]))
    return {"update": run_update, "least": run_least}, 2 * size + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(gradients))


def measure(tiny: bool = False, rounds: int = 15) -> dict[str, Any]:
    """One row for each optimizer, with moments in float32 and for AdamW in bfloat16, too."""
    # five, for partial sums of products in four parts are as large as four stacked layers, and would count as the update's
    layers, width, calls = (1, 64, 1) if tiny else (5, None, 3)
    rows = []
    for optimizer in OPTIMIZERS[: 1 if tiny else None]:
        for moments in MEMORIES[: 2 if optimizer == "adamw" else 1]:
            model, run = configured(optimizer, moments, layers, width)
            calling, least_bytes = contestants(model, run)
            seconds = harness.alternate({name: harness.repeated(call, calls) for name, call in calling.items()}, 3 if tiny else rounds)
            median = {name: statistics.median(values) / calls for name, values in seconds.items()}
            ratios = [update / least for update, least in zip(seconds["update"], seconds["least"], strict=True)]
            row = {"optimizer": optimizer, "moments": moments, "update_ms": 1e3 * median["update"], "least_ms": 1e3 * median["least"]}
            row |= {"ratio": statistics.median(ratios), "gb_per_s": least_bytes / median["least"] / 1e9}
            compiled = compile_train_step(model, run, "h200:1x1") if packages_are_there() and not tiny else None
            rows.append(row | {"passes": None if compiled is None else compiled.update_passes})
            print(rows[-1], flush=True)
    return {"parameters": layout(model).num_parameters, "rounds": rounds, "rows": rows}


def main() -> None:
    """Run, print the table, write JSON."""
    arguments = harness.parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    given = arguments.parse_args()
    harness.report(measure(given.tiny, given.rounds), given.out)


if __name__ == "__main__":
    main()
