"""How long does a run take from its command to its first step, with and without cached programs?

Each start is a process of its own in a new run directory; the token store is made beforehand. The
first start has an empty cache of programs, the others a full one. Each part is timed from the end
of the part before it:

    python       the interpreter, this package without JAX, and the command line
    imports      JAX, Flax, Optax, the trainer
    data         finding and opening the token store (on a GPU also JAX's start, which precedes it)
    build        the programs' shapes, the run directory
    programs     initial values and the optimizer's state, in parallel with tracing and then
                 compiling or loading the train step
    first step   until its loss is on the host and the second step is dispatched

Judged by the best wall time of the warm starts. On a machine with other load, look at the processor
time of all threads of the process: it bounds the wall time on an idle machine.

    python benchmarks/startup.py --starts 5 --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
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

QUICKSTART = ["--config", str(harness.ROOT / "configs" / "quickstart.yaml")]
VERSE = ["--model", "verse", "--data", "sample", "--batch_size", "8"]
CPU_LIMIT_S, GPU_LIMIT_S = 6.0, 15.0  # at most, for a warm start
PARTS = ("python", "imports", "data", "build", "programs", "first step")


def child(began: float, out: Path, flags: list[str]) -> None:
    """Start a run in this process, which was launched at the time `began`."""
    marks: dict[str, tuple[float, float]] = {}

    def mark(name: str) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        marks[name] = time.time() - began, used.ru_utime + used.ru_stime

    from consyn_jax.cli import train as command
    from consyn_jax.cli.choices import training_data

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

    marking(training_data, "_prepared", "data")
    marking(loop.Training, "_print_header", "build")
    marking(Program, "initial_state", "programs")
    marking(trainer.ConsynTrainer, "compile_train_step", "programs")
    loop.Training._record = record
    try:
        command.run(flags)
    except FirstStep:
        out.write_text(json.dumps(marks))


def start(cache: Path, programs: Path, flags: list[str]) -> dict[str, dict[str, float]]:
    """Start a run; the wall time of every part, and the processor time of all threads."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "marks.json"
        env = harness.child_environment(
            CONSYN_CACHE=str(cache),
            JAX_COMPILATION_CACHE_DIR=str(programs),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        )
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
        command = [sys.executable, __file__, "--child", str(time.time()), str(out)]
        command += [*flags, "--output", str(Path(directory) / "run"), "--quiet"]
        subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
        marks = json.loads(out.read_text())
    ends = [(0.0, 0.0), *(marks[part] for part in PARTS)]
    spent = {
        part: {"wall_s": end[0] - before[0], "cpu_s": end[1] - before[1]}
        for part, before, end in zip(PARTS, ends, ends[1:], strict=False)
    }
    return spent | {"total": {"wall_s": ends[-1][0], "cpu_s": ends[-1][1]}}


def measure(flags: list[str], starts: int = 5) -> dict[str, Any]:
    """Seconds by part, of the cold start and of the warm ones.

    The warm figures are those of the start with the best wall time, the least processor time, and
    the medians.

    Args:
        flags: of `consyn-train`.
        starts: how many warm ones.
    """
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "cache"
        # The first makes the token store and brings the files of all libraries into memory.
        start(cache, Path(directory) / "other", flags)
        cold = start(cache, Path(directory) / "programs", flags)
        warm = [start(cache, Path(directory) / "programs", flags) for _ in range(starts)]
    best = min(warm, key=lambda each: each["total"]["wall_s"])
    rows = []
    for part in (*PARTS, "total"):
        row = {
            "cold wall s": cold[part]["wall_s"],
            "cold cpu s": cold[part]["cpu_s"],
            "warm wall s": best[part]["wall_s"],
            "warm cpu s": min(each[part]["cpu_s"] for each in warm),
            "warm median wall s": statistics.median(each[part]["wall_s"] for each in warm),
            "warm median cpu s": statistics.median(each[part]["cpu_s"] for each in warm),
        }
        rows.append({"part": part, **{name: round(value, 3) for name, value in row.items()}})
    return {
        "command": ["consyn-train", *(flag.removeprefix(f"{harness.ROOT}/") for flag in flags)],
        "rows": rows,
    }


def has_gpu() -> bool:
    """Whether JAX finds a GPU, without this process taking its memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() == "gpu"


def main() -> None:
    """Time the quickstart on a CPU, or verse on a GPU."""
    parser = harness.parser(__doc__, tiny=False)
    parser.add_argument("--starts", type=int, default=5, help="warm starts (%(default)s)")
    given = parser.parse_args()
    gpu = has_gpu()
    found = measure(VERSE if gpu else QUICKSTART, given.starts)
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    harness.report({"device": "gpu" if gpu else "cpu", "versions": versions, **found}, given.out)
    best, limit = found["rows"][-1]["warm wall s"], GPU_LIMIT_S if gpu else CPU_LIMIT_S
    print(
        f"Warm, best of {given.starts}: {best:.1f} s, must be at most {limit:.0f} s: "
        f"{'holds' if best <= limit else 'misses'}."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        main()
