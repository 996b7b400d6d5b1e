"""How long does the train step take to compile, by depth, and to load from the cache?

Verse with 12, 24 and 48 layers, each in a process of its own: for this machine, and where the CUDA
packages are installed also for an H200 that is not present (without autotuning, which a real GPU
adds). "cold" is compiling with an empty cache, "cached" tracing and loading in another process.
JAX caches nothing for described machines, so they have no "cached". Models that are not deep have
unrolled layers, which compile longer and run faster; "loop" has the same depth in a loop, as deeper
models do.

Judged by the processor time of all threads, since wall time depends on other load.

    python benchmarks/compile_time.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
from startup import has_gpu

from consyn_jax.planning import aot

DEPTHS = (12, 24, 48)
GROWTH = 1.3  # at most, from 12 to 48 layers
TOPOLOGY = "h200:1x1"


def child(target: str, depth: int) -> None:
    """Compile one train step and print the seconds of its phases as JSON."""
    import jax
    from programs import program_of

    from consyn_jax.config import architecture
    from consyn_jax.distributed.auto_mesh import Machine
    from consyn_jax.planning.topology import parse_topology
    from consyn_jax.resolve import resolve

    values = {
        "model": "verse",
        "num_layers": depth,
        "max_tokens": 1024,
        "batch_size": 4,
        "mixed_precision": "no" if target.startswith("cpu") else "bf16",
    }
    run, _ = resolve(values)
    words = {"vocab_size": 32_768, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape, described = architecture(run.model, **words), target.startswith("cuda")
    devices = parse_topology(TOPOLOGY).described_devices() if described else jax.devices()[:1]
    program = program_of(shape, run, devices, Machine(1, 1, 2**40))
    if target.endswith("loop"):
        program = dataclasses.replace(
            program, compute=dataclasses.replace(program.compute, unroll=False)
        )
    _ = program.state_like
    began, used = time.perf_counter(), time.process_time()
    lowered = program.lower_train_step(1, 4, 1024)
    lowered_cpu = time.process_time() - used
    compiled = lowered.compile()
    total = {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - used,
        "lower_cpu_s": lowered_cpu,
    }
    total["compile_cpu_s"] = total["cpu_s"] - lowered_cpu
    print(json.dumps(total | {"program_bytes": len(compiled.as_text())}))


def compile_once(target: str, depth: int, programs: Path) -> dict[str, float]:
    """The seconds of one process."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    compiler = aot.environment() if target.startswith("cuda") else {}
    env = harness.child_environment(**compiler, **cache)
    done = subprocess.run(
        [sys.executable, __file__, "--child", target, str(depth)],
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    targets: Sequence[str] | None = None, depths: Sequence[int] = DEPTHS, tiny: bool = False
) -> dict[str, Any]:
    """Seconds by target and depth, cold and cached, and the last depth relative to the first.

    Args:
        targets: "cpu", "gpu" for the one that is here, "cuda" for a described one, each also with
            its layers in a "loop"; None for all that this machine has.
        tiny: one layer, on a CPU.
    """
    if targets is None:
        targets = ["gpu" if has_gpu() else "cpu", *(["cuda"] if aot.packages_are_there() else [])]
        targets = [variant for target in targets for variant in (target, f"{target} loop")]
    if tiny:
        targets, depths = ["cpu"], [1]
    rows, growth = [], {}
    with tempfile.TemporaryDirectory() as directory:
        for target in targets:
            taken = []
            for depth in depths:
                programs = Path(directory) / f"{target} {depth}"
                cold = compile_once(target, depth, programs)
                kept = not target.startswith("cuda")
                cached = compile_once(target, depth, programs) if kept else {}
                taken.append(cold["cpu_s"])
                rows.append(_row(target, depth, cold, cached))
            if target.endswith("loop"):
                growth[target] = round(taken[-1] / taken[0], 3)
    return {"model": "verse, 4 x 1024 tokens", "growth": growth, "rows": rows}


def _row(
    target: str, depth: int, cold: dict[str, float], cached: dict[str, float]
) -> dict[str, Any]:
    seconds = {
        "trace and lower cpu s": cold["lower_cpu_s"],
        "compile cpu s": cold["compile_cpu_s"],
        "cold cpu s": cold["cpu_s"],
        "cold wall s": cold["wall_s"],
        "cached cpu s": cached.get("cpu_s"),
        "cached wall s": cached.get("wall_s"),
    }
    rounded = {name: None if s is None else round(s, 2) for name, s in seconds.items()}
    return {"target": target, "layers": depth, **rounded}


def main() -> None:
    """Measure all targets that this machine has, print the table, write JSON."""
    given = harness.parser(__doc__, tiny=False).parse_args()
    found = measure()
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    harness.report({"versions": versions, **found}, given.out)
    for target, ratio in found["growth"].items():
        print(
            f"{target}: from {DEPTHS[0]} to {DEPTHS[-1]} layers {ratio:.2f} x, must be at most "
            f"{GROWTH} x: {'holds' if ratio <= GROWTH else 'misses'}."
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
    else:
        main()
