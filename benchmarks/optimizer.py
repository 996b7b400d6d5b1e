"""What does the optimizer's update cost, compared with reading and writing its state once?

The update alone, with given gradients: their norm, clipping, the rule, and the choice between the
old and the new state in case a step is not finite. It takes turns with one pass that reads
gradients and state and writes the state, the least that an update could do. "passes" are the bytes
that the program compiled for one H200 moves, in units of that pass (planning/aot.py), wherever the
CUDA packages are installed. The norm must be known before the update begins, so the gradients are
read twice: AdamW then moves 8 arrays of the parameters' size where the pass moves 7, 1.143.

    python benchmarks/optimizer.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import statistics
from typing import Any

import harness
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from programs import program_of

from consyn_jax.config import RunConfig, architecture
from consyn_jax.model.parameters import initial_parameters, layout
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import OPTIMIZERS
from consyn_jax.planning.aot import compile_train_step, packages_are_there
from consyn_jax.resolve import resolve
from consyn_jax.training.loss import LossSums
from consyn_jax.training.optim.skip_nonfinite import skip_nonfinite
from consyn_jax.training.optim.state import of_parameters
from consyn_jax.training.step import TrainState, make_train_step

MEMORIES = ("float32", "bfloat16")
CALLS = ("update", "least")  # of `Contestants`


def configured(
    optimizer: str, moments: str, layers: int, width: int | None = None
) -> tuple[ModelConfig, RunConfig]:
    """Verse with so many layers, and another width if given."""
    given: dict[str, Any] = {"model": "verse", "num_layers": layers, "max_tokens": 1024}
    given |= {"batch_size": 4, "mixed_precision": "bf16"}
    given |= {"optimizer": optimizer, "moment_dtype": moments, "lr": 1e-3}
    if width is not None:
        given |= {"hidden_dim": width, "mlp_dim": 2 * width}
        given |= {"num_heads": width // 64, "num_kv_heads": width // 64}
    run, _ = resolve(given)
    return architecture(run.model, vocab_size=512 if width else 49_152), run


class Contestants:
    """The update and the pass, each with a state of its own; neither call waits for its result."""

    def __init__(self, model: ModelConfig, run: RunConfig) -> None:
        program = program_of(model, run, jax.devices()[:1])

        def draw(seed: int) -> Any:
            return initial_parameters(model, seed, program.mesh)

        self.gradients = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), draw(1))
        batch = {
            "gradients": jax.tree.map(lambda g: g[None], self.gradients),
            "labels": jnp.zeros((1, 1, 1), jnp.int32),
        }
        self.updated, self.passed = (program.initial_state(draw(0)) for _ in range(2))
        self.batch = jax.device_put(batch, NamedSharding(program.mesh, PartitionSpec()))
        step = make_train_step(_objective, program.rule, run.optimizer.max_grad_norm)
        self._update = jax.jit(skip_nonfinite(step, 1), donate_argnums=0)

        def one_pass(state: TrainState, gradients: Any) -> TrainState:
            """Write every array of the state, from the old one and the gradients."""
            own = of_parameters(state.opt_state, program.layout.shapes, gradients, jnp.float32(0))
            params, opt_state = (
                jax.tree.map(lambda x, g: (x + 1e-9 * g).astype(x.dtype), *pair)
                for pair in ((state.params, gradients), (state.opt_state, own))
            )
            return state._replace(params=params, opt_state=opt_state)

        self._pass = jax.jit(one_pass, donate_argnums=0)

    def update(self) -> Any:
        self.updated, _ = self._update(self.updated, self.batch)
        return self.updated

    def least(self) -> Any:
        self.passed = self._pass(self.passed, self.gradients)
        return self.passed

    @property
    def least_bytes(self) -> int:
        """Bytes that the pass moves: the state read and written, the gradients read."""
        state, gradients = (
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
            for tree in (self.passed, self.gradients)
        )
        return 2 * state + gradients


def _objective(params: Any, batch: Any) -> tuple[jax.Array, LossSums]:
    """An objective whose gradients are those of the batch."""
    pairs = map(jnp.vdot, jax.tree.leaves(params), jax.tree.leaves(batch["gradients"]))
    return sum(pairs, jnp.float32(0)), LossSums(*(jnp.float32(1) for _ in LossSums._fields))


def measure(tiny: bool = False, rounds: int = 15) -> dict[str, Any]:
    """One row per optimizer with moments in float32, and for AdamW one in bfloat16."""
    # Not four layers: partial sums of matmuls in four parts would be as large as these stacked, and
    # would count as part of the update.
    layers, width, calls = (1, 64, 1) if tiny else (5, None, 3)
    rows = []
    for optimizer in list(OPTIMIZERS)[: 1 if tiny else None]:
        for moments in MEMORIES[: 2 if optimizer == "adamw" else 1]:
            model, run = configured(optimizer, moments, layers, width)
            made = Contestants(model, run)
            turns = {name: harness.repeated(getattr(made, name), calls) for name in CALLS}
            seconds = harness.alternate(turns, 3 if tiny else rounds)
            row = {"optimizer": optimizer, "moments": moments}
            row |= _times(seconds, calls, made.least_bytes)
            compiles = packages_are_there() and not tiny
            compiled = compile_train_step(model, run, "h200:1x1") if compiles else None
            rows.append(row | {"passes": None if compiled is None else compiled.update_passes})
            print(rows[-1], flush=True)
    return {"parameters": layout(model).num_parameters, "rounds": rounds, "rows": rows}


def _times(seconds: dict[str, list[float]], calls: int, least_bytes: int) -> dict[str, float]:
    update, least = (statistics.median(seconds[name]) / calls for name in CALLS)
    ratios = [a / b for a, b in zip(*(seconds[name] for name in CALLS), strict=True)]
    return {
        "update_ms": 1e3 * update,
        "least_ms": 1e3 * least,
        "ratio": statistics.median(ratios),
        "gb_per_s": least_bytes / least / 1e9,
    }


def main() -> None:
    """Run, print the table, write JSON."""
    arguments = harness.parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    given = arguments.parse_args()
    harness.report(measure(given.tiny, given.rounds), given.out)


if __name__ == "__main__":
    main()
