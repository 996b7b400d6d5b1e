"""What does a checkpoint cost a run? The time that a save keeps it, and its steps while the background writes.

A decoder's AdamW state of a few hundred MB, in rounds of this order, so that noise of the machine meets all of them:

    copy            the whole state into fresh host memory, as a save that waited for nothing else would
    steps           without a write, each waited for
    blocking        the call of `save`
    steps           until the checkpoint is there; the first of them cannot reuse the buffers that the save still holds
    steps           without a write
    verify          reading every file against its checksum, and then the state

Judged by medians over the rounds: blocking against copy, and the median step during the write against that without in the same round. On
a machine with other load both vary; the quartiles and the load are in the result. So is the processor time that the threads of XLA took
for the same steps, which other load hardly changes: what the write costs them beyond their turn on a core.

    python benchmarks/checkpoint.py --rounds 10 --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
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

import jax
import numpy as np
import orbax.checkpoint
import tensorstore
from harness import facts, write

from consyn_jax.config import ModelConfig
from consyn_jax.distributed.host_memory import keep_freed_memory
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.parameters import initial_parameters
from consyn_jax.model.transformer import Compute
from consyn_jax.training.checkpoint import Checkpoints
from consyn_jax.training.optimizer import build_optimizer
from consyn_jax.training.program import TRAIN_AXES, Program

# What must hold.
BLOCKING_RATIO, STEP_RATIO = 1.2, 1.05


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long `work` took, and what it gave."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def xla_cpu_s() -> float:
    """Processor time that XLA's threads on a CPU have taken so far, where Linux tells."""
    total = 0.0
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # a thread that has just ended
            if (task / "comm").read_text().startswith("tf_XLA"):
                total += int((task / "schedstat").read_text().split()[0]) / 1e9
    return total


def quartiles(values: list[float]) -> list[float]:
    """First, second and third."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4)]


def race(hidden_dim: int, num_layers: int, batch_size: int, length: int, rounds: int, steps: int, directory: Path) -> dict[str, Any]:
    """Seconds of everything, all rounds."""
    heads = {"num_heads": 8, "num_kv_heads": 8, "head_dim": hidden_dim // 8}
    config = ModelConfig(vocab_size=4096, hidden_dim=hidden_dim, num_layers=num_layers, mlp_dim=4 * hidden_dim, context=length, **heads)
    mesh = build_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    rule = build_optimizer("adamw", 1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, mask=True)
    program = Program(config, Compute(unroll=jax.default_backend() == "cpu"), rule, 1.0, mesh)
    state: Any = program.initial_state(initial_parameters(config, 0, mesh))
    compiled = program.lower_train_step(1, batch_size, length).compile()
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, batch_size, length + 1), np.int32)
    rows = {"input_ids": ids[..., :-1], "labels": ids[..., 1:], "segment_ids": np.ones_like(ids[..., 1:]), "loss_mask": np.ones(ids[..., 1:].shape, bool)}
    batch = {name: jax.device_put(values, sharding(mesh, TRAIN_AXES)) for name, values in rows.items()}

    def step(into: dict[str, list[float]], name: str) -> None:
        nonlocal state
        before = xla_cpu_s()
        took, (state, _) = seconds(lambda: jax.block_until_ready(compiled(state, batch)))
        into[name].append(took)
        into[f"{name}_cpu"].append(xla_cpu_s() - before)

    found: list[dict[str, list[float]]] = []
    checkpoints = Checkpoints(directory, keep_last=1)
    for number in range(rounds + 1):
        into: dict[str, list[float]] = defaultdict(list)
        copy, host = seconds(lambda: jax.tree.map(lambda leaf: np.array(leaf, copy=True), state))
        del host
        for _ in range(steps):
            step(into, "without")
        began = time.perf_counter()
        blocking, _ = seconds(lambda number=number: checkpoints.save(number, state, {}))
        while checkpoints.saving:
            step(into, "during")
        checkpoints.wait()
        until_written = time.perf_counter() - began
        for _ in range(steps):
            step(into, "without")
        reader = Checkpoints(directory)
        verify, _ = seconds(reader.newest)
        restore, restored = seconds(lambda number=number, reader=reader: jax.block_until_ready(reader.restore(number, program.state_like)))
        reader.close()
        del restored
        once = {"copy": copy, "blocking": blocking, "until_written": until_written, "verify": verify, "restore": restore}
        found.append(into | {name: [value] for name, value in once.items()})
    checkpoints.close()
    return {"state_mb": round(sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6), "rounds": found[1:]}  # the first warmed up


def judge(results: dict[str, Any]) -> dict[str, Any]:
    """Medians, quartiles and what they come to."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_dim", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="steps without a write, before and behind that of a round")
    parser.add_argument("--work", type=Path, help="where the checkpoints go (a temporary directory)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    keep_freed_memory()  # as `consyn-train` does
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        results = race(arguments.hidden_dim, arguments.num_layers, arguments.batch_size, arguments.length, arguments.rounds, arguments.steps, Path(directory))
    summary = judge(results)
    print(json.dumps(summary, indent=2))
    if arguments.out:
        load = {"load_before": before, "load_after": os.getloadavg()}
        versions = {"orbax": orbax.checkpoint.__version__, "tensorstore": getattr(tensorstore, "__version__", None)}
        write(arguments.out, {**facts(), **load, **versions, **summary, "runs": results})


if __name__ == "__main__":
    main()
