"""How long does the train step take to compile, by depth, and to load from the cache?

Verse with 12, 24 and 48 layers, each in a process of its own: on this machine's CPU, and for an H200 that is not there where the CUDA packages
are (deviceless: without autotuning, which a real GPU adds). "cold" is compiling with an empty cache, "cached" tracing and loading in another
process. For described machines JAX keeps nothing, so there is no "cached". The layers of models that are not deep are unrolled, which compiles
longer and runs faster; "loop" is the same depth as deeper models have it.

Judged by processor time, all threads: wall time is that of whatever else the machine does.

    python benchmarks/compile_time.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
from startup import ROOT, has_gpu

from consyn_jax.planning import aot

DEPTHS = (12, 24, 48)
GROWTH = 1.3  # what must hold, from 12 to 48 layers
TOPOLOGY = "h200:1x1"


def child(target: str, depth: int) -> None:
    """Compile one train step and print the seconds of its phases."""
    import jax

    from consyn_jax.config import architecture
    from consyn_jax.distributed.auto_mesh import Machine
    from consyn_jax.planning.topology import parse_topology
    from consyn_jax.resolve import resolve
    from consyn_jax.training.program import Program, build_program
    from consyn_jax.training.scheduler import configured_schedule

    values = {"model": "verse", "num_layers": depth, "max_tokens": 1024, "batch_size": 4, "mixed_precision": "no" if target.startswith("cpu") else "bf16"}
    run, _ = resolve(values)
    shape = architecture(run.model, vocab_size=32_768, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    devices, here = jax.devices()[:1], Machine(1, 1, 2**40)
    if target.startswith("cuda"):
        from jax.experimental import topologies

        topology = parse_topology(TOPOLOGY)
        devices = topologies.get_topology_desc(platform="cuda", target_config=topology.gpu.target_config, topology="1x1x1").devices
    program: Program = build_program(shape, run, configured_schedule(run.optimizer, 1000), devices, here).program
    if target.endswith("loop"):
        program = dataclasses.replace(program, compute=dataclasses.replace(program.compute, unroll=False))
    _ = program.state_like
    began, used = time.perf_counter(), time.process_time()
    lowered = program.lower_train_step(1, 4, 1024)
    lowered_cpu = time.process_time() - used
    compiled = lowered.compile()
    total = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - used, "lower_cpu_s": lowered_cpu}
    total["compile_cpu_s"] = total["cpu_s"] - lowered_cpu
    print(json.dumps(total | {"program_bytes": len(compiled.as_text())}))


def compile_once(target: str, depth: int, programs: Path) -> dict[str, float]:
    """The seconds of one process."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if target.startswith("cuda"):
        env |= aot.environment()
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, __file__, "--child", target, str(depth)], env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(targets: Sequence[str] | None = None, depths: Sequence[int] = DEPTHS, tiny: bool = False) -> dict[str, Any]:
    """Seconds by target and depth, cold and cached, and what the last depth takes of the first.

    Args:
        targets: "cpu", "gpu" for the one that is here, "cuda" deviceless, each also with its layers in a "loop"; None for all that this machine has.
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
                cached = compile_once(target, depth, programs) if not target.startswith("cuda") else {}
                taken.append(cold["cpu_s"])
                row = {"target": target, "layers": depth, "trace and lower cpu s": cold["lower_cpu_s"], "compile cpu s": cold["compile_cpu_s"]}
                row |= {"cold cpu s": cold["cpu_s"], "cold wall s": cold["wall_s"], "cached cpu s": cached.get("cpu_s"), "cached wall s": cached.get("wall_s")}
                rows.append({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()})
            if target.endswith("loop"):
                growth[target] = round(taken[-1] / taken[0], 3)
    return {"model": "verse, 4 x 1024 tokens", "growth": growth, "rows": rows}


def main() -> None:
    """All that this machine can do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    found = measure()
    harness.report({"versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}, **found}, given.out)
    for target, ratio in found["growth"].items():
        print(f"{target}: from {DEPTHS[0]} to {DEPTHS[-1]} layers {ratio:.2f} x, must be at most {GROWTH} x: {'holds' if ratio <= GROWTH else 'misses'}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
    else:
        main()
