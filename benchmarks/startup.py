"""How long does a run take from its command to its first step? With nothing compiled yet, and with all of it in the cache.

Each start is a process of its own, in a new run directory, with the token store made beforehand. The first has an empty cache of programs,
the others find it full. Parts are timed in the process, by their end: what a part took is what came since the part before it.

    python       the interpreter, this package without JAX, and the command line
    imports      JAX, Flax, Optax, the trainer
    data         find and open the token store (on a GPU JAX's start, too, which comes before it)
    build        the programs' shapes, the run directory
    programs     first values and the optimizer's state, and beside them tracing and then compiling or loading the train step
    first step   until its loss is on the host, and the second step dispatched

Judged by the best wall time of the warm starts. On a machine with other load, look at the processor time: it is what the process itself took,
all threads, and a bound for the wall time of a machine with nothing else to do.

    python benchmarks/startup.py --starts 5 --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).parents[1]
QUICKSTART = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
VERSE = ["--model", "verse", "--data", "sample", "--batch_size", "8"]
CPU_LIMIT_S, GPU_LIMIT_S = 6.0, 15.0  # what must hold, of a warm start
PARTS = ("python", "imports", "data", "build", "programs", "first step")


def child(began: float, out: Path, flags: list[str]) -> None:
    """A start, in this process; `began` is the time at which it was asked for."""
    marks: dict[str, tuple[float, float]] = {}

    def mark(name: str) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        marks[name] = time.time() - began, used.ru_utime + used.ru_stime

    from consyn_jax.cli import train as command

    command.read_arguments(flags)
    mark("python")
    from consyn_jax.training import loop, trainer
    from consyn_jax.training.program import Program

    mark("imports")

    def marking(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def marked(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            mark(name)
            return result

        setattr(owner, method, marked)

    class FirstStep(Exception):
        pass

    def record(self: Any, step: Any, *_: Any) -> None:
        float(step[0]["loss"])
        mark("first step")
        raise FirstStep

    marking(command, "_prepared", "data")
    marking(loop.Training, "_header", "build")
    marking(Program, "initial_state", "programs")
    marking(trainer.ConsynTrainer, "compile_train_step", "programs")
    loop.Training._record = record
    try:
        command.run(flags)
    except FirstStep:
        out.write_text(json.dumps(marks))


def start(cache: Path, programs: Path, flags: list[str]) -> dict[str, dict[str, float]]:
    """One start: of every part the wall time, and the processor time of all threads."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "marks.json"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "CONSYN_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(programs), "PYTHONPATH": path}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
        command = [sys.executable, __file__, "--child", str(time.time()), str(out), *flags, "--output", str(Path(directory) / "run"), "--quiet"]
        subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
        marks = json.loads(out.read_text())
    ends = [(0.0, 0.0), *(marks[part] for part in PARTS)]
    spent = {part: {"wall_s": end[0] - before[0], "cpu_s": end[1] - before[1]} for part, before, end in zip(PARTS, ends, ends[1:], strict=False)}
    return spent | {"total": {"wall_s": ends[-1][0], "cpu_s": ends[-1][1]}}


def measure(flags: list[str], starts: int = 5) -> dict[str, Any]:
    """Seconds by part: of the cold start, and of the warm ones the best by wall time, the least processor time, and the medians.

    Args:
        flags: of `consyn-train`.
        starts: warm ones.
    """
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "cache"
        start(cache, Path(directory) / "other", flags)  # makes the token store, and has the files of all libraries in memory
        cold = start(cache, Path(directory) / "programs", flags)
        warm = [start(cache, Path(directory) / "programs", flags) for _ in range(starts)]
    best = min(warm, key=lambda each: each["total"]["wall_s"])
    rows = []
    for part in (*PARTS, "total"):
        row: dict[str, Any] = {"part": part, "cold wall s": cold[part]["wall_s"], "cold cpu s": cold[part]["cpu_s"]}
        row |= {"warm wall s": best[part]["wall_s"], "warm cpu s": min(each[part]["cpu_s"] for each in warm)}
        row |= {f"warm median {unit} s": statistics.median(each[part][f"{unit}_s"] for each in warm) for unit in ("wall", "cpu")}
        rows.append({name: value if isinstance(value, str) else round(value, 3) for name, value in row.items()})
    return {"command": ["consyn-train", *(flag.removeprefix(f"{ROOT}/") for flag in flags)], "rows": rows}


def has_gpu() -> bool:
    """Asked of another process, so that this one leaves the GPU alone."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip() == "gpu"


def main() -> None:
    """The quickstart on a CPU, verse on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="warm ones (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    gpu = has_gpu()
    found = measure(VERSE if gpu else QUICKSTART, given.starts)
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    harness.report({"device": "gpu" if gpu else "cpu", "versions": versions, **found}, given.out)
    best, limit = found["rows"][-1]["warm wall s"], GPU_LIMIT_S if gpu else CPU_LIMIT_S
    print(f"Warm, best of {given.starts}: {best:.1f} s, must be at most {limit:.0f} s: {'holds' if best <= limit else 'misses'}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        main()
