"""What does a checkpoint cost a run, in blocked time and in slower steps during the write?

A decoder's AdamW state of a few hundred MB is saved in rounds of this order, so that noise affects
all parts:

    copy            the whole state into fresh host memory, the least that a save must do
    steps           without a write, each waited for
    blocking        the call of `save`
    steps           until the checkpoint is written; the first of them cannot reuse the buffers
                    that the save still holds
    steps           without a write
    verify          reading every file against its checksum, and then the state

Judged by medians over the rounds: blocking against copy, and steps during the write against steps
without one in the same round. On a machine with other load both vary; the quartiles and the load
are in the result. So is the processor time of XLA's threads for these steps, which other load
hardly changes: it is the cost of the write beyond waiting for a core.

    python benchmarks/checkpoint.py --rounds 10 --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
import orbax.checkpoint
import tensorstore
from harness import facts, write
from programs import make_batch

from consyn_jax.distributed.allocators import keep_freed_memory
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.parameters import initial_parameters, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.optim.optimizers import build_optimizer
from consyn_jax.training.program import TRAIN_AXES, Program

BLOCKING_RATIO, STEP_RATIO = 1.2, 1.05  # limits that must hold


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long `work` took, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def xla_cpu_s() -> float:
    """Processor time of XLA's CPU threads so far; 0 where the system is not Linux."""
    total = 0.0
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # the thread has just ended
            if (task / "comm").read_text().startswith("tf_XLA"):
                total += int((task / "schedstat").read_text().split()[0]) / 1e9
    return total


def quartiles(values: list[float]) -> list[float]:
    """The three quartiles."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4)]


class Trained:
    """A small decoder whose train step and state are compiled and ready."""

    def __init__(self, hidden_dim: int, num_layers: int, batch_size: int, length: int) -> None:
        config = ModelConfig(
            vocab_size=4096,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_heads=8,
            num_kv_heads=8,
            head_dim=hidden_dim // 8,
            mlp_dim=4 * hidden_dim,
            context=length,
        )
        mesh = build_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
        options = OptimizerOptions(beta2=0.95, weight_decay=0.1)
        rule = build_optimizer(options, 1e-3, layout(config).logical_axes)
        compute = Compute(unroll=jax.default_backend() == "cpu")
        self.program = Program(config, compute, rule, 1.0, mesh)
        self.state: Any = self.program.initial_state(initial_parameters(config, 0, mesh))
        self.compiled = self.program.lower_train_step(1, batch_size, length).compile()
        rows = make_batch((1, batch_size, length), config.vocab_size, 0)
        place = sharding(mesh, TRAIN_AXES)
        self.batch = {name: jax.device_put(values, place) for name, values in rows.items()}

    def step(self, into: dict[str, list[float]], name: str) -> None:
        """Take a step, and add its wall time and the processor time of XLA's threads."""
        before = xla_cpu_s()
        took, (self.state, _) = seconds(
            lambda: jax.block_until_ready(self.compiled(self.state, self.batch))
        )
        into[name].append(took)
        into[f"{name}_cpu"].append(xla_cpu_s() - before)


def one_round(
    trained: Trained, checkpoints: Checkpoints, directory: Path, number: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of each part of a round."""
    into: dict[str, list[float]] = defaultdict(list)
    copy, host = seconds(
        lambda: jax.tree.map(lambda leaf: np.array(leaf, copy=True), trained.state)
    )
    del host
    for _ in range(steps):
        trained.step(into, "without")
    began = time.perf_counter()
    blocking, _ = seconds(lambda: checkpoints.save(number, trained.state, {}))
    while checkpoints.saving:
        trained.step(into, "during")
    checkpoints.wait()
    until_written = time.perf_counter() - began
    for _ in range(steps):
        trained.step(into, "without")
    reader = Checkpoints(directory)
    verify, _ = seconds(reader.newest)
    restore, restored = seconds(
        lambda: jax.block_until_ready(reader.restore(number, trained.program.state_like))
    )
    reader.close()
    del restored
    once = {
        "copy": copy,
        "blocking": blocking,
        "until_written": until_written,
        "verify": verify,
        "restore": restore,
    }
    return into | {name: [value] for name, value in once.items()}


def race(trained: Trained, rounds: int, steps: int, directory: Path) -> dict[str, Any]:
    """Seconds of all parts in all rounds; the first round warms up and does not count."""
    checkpoints = Checkpoints(directory, keep_last=1)
    found = [
        one_round(trained, checkpoints, directory, number, steps) for number in range(rounds + 1)
    ]
    checkpoints.close()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.state))
    return {"state_mb": round(size / 1e6), "rounds": found[1:]}


def judge(results: dict[str, Any]) -> dict[str, Any]:
    """Medians, quartiles, and whether the limits hold."""
    rounds = results["rounds"]
    median = statistics.median

    def ratios(of: str, to: str) -> list[float]:
        return [median(found[of]) / max(median(found[to]), 1e-9) for found in rounds]

    blocking, during = median(ratios("blocking", "copy")), median(ratios("during", "without"))
    together = {name: [value for found in rounds for value in found[name]] for name in rounds[0]}
    return {
        "state_mb": results["state_mb"],
        "blocking_against_copy": round(blocking, 3),
        "blocking_holds": blocking <= BLOCKING_RATIO,
        "steps_during_against_without": round(during, 3),
        "of_each_round": [round(ratio, 3) for ratio in ratios("during", "without")],
        "steps_hold": during <= STEP_RATIO,
        "step_cpu_during_against_without": round(median(ratios("during_cpu", "without_cpu")), 3),
        "quartiles_s": {name: quartiles(values) for name, values in together.items()},
        "count": {name: len(values) for name, values in together.items()},
    }


def main() -> None:
    """Run, print, write JSON."""
    parser = harness.parser(__doc__, tiny=False)
    parser.add_argument("--hidden_dim", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="steps without a write, before and after that of a round",
    )
    parser.add_argument(
        "--work", type=Path, help="where the checkpoints go (a temporary directory)"
    )
    arguments = parser.parse_args()
    keep_freed_memory()  # as `consyn-train` does
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        trained = Trained(
            arguments.hidden_dim, arguments.num_layers, arguments.batch_size, arguments.length
        )
        results = race(trained, arguments.rounds, arguments.steps, Path(directory))
    summary = judge(results)
    print(json.dumps(summary, indent=2))
    if arguments.out:
        load = {"load_before": before, "load_after": os.getloadavg()}
        versions = {
            "orbax": orbax.checkpoint.__version__,
            "tensorstore": getattr(tensorstore, "__version__", None),
        }
        write(arguments.out, {**facts(), **load, **versions, **summary, "runs": results})


if __name__ == "__main__":
    main()
