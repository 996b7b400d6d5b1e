"""Shared by the benchmarks: taking turns, the record of the machine, tables and JSON.

A benchmark is a script with `main()` and `measure(tiny=False) -> dict`, which other scripts call.
The table of a result is under "rows", one flat dict per line. With `tiny` everything runs on a CPU
in seconds, to test the code rather than the machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from consyn_jax.files import write_whole

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "triton", "transformers", "tokenizers")


def alternate(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, with all contestants taking turns in each round.

    Every other round has the opposite order, so that noise and drift affect all of them alike.

    Args:
        contestants: each call must wait for the work that it started on a device.
        warm_up: rounds before those that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm_up, rounds):
        names = list(contestants) if number % 2 == 0 else list(reversed(contestants))
        for name in names:
            began = time.perf_counter()
            contestants[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def repeated(function: Callable[[], Any], calls: int) -> Callable[[], None]:
    """Make a turn of `calls` calls of a JAX function that waits for the last.

    A device runs them in order.
    """

    def turn() -> None:
        import jax

        for _ in range(calls - 1):
            function()
        jax.block_until_ready(function())

    return turn


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def facts() -> dict[str, Any]:
    """Date, commit, machine, device, and the versions of the packages that are loaded."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in sys.modules}
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }
    found |= {
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
    }
    if "jax" in sys.modules:
        import jax

        found |= {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    return found


def commit() -> str | None:
    """The commit of the code, with "-dirty" if it was changed since.

    CONSYN_COMMIT names it for a copy of the code outside its repository.
    """
    if "CONSYN_COMMIT" in os.environ:
        return os.environ["CONSYN_COMMIT"] or None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def processor() -> str:
    """The processor's name, or its kind if the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table, numbers to four digits."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([_cell(row.get(name)) for name in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def parser(doc: str | None, tiny: bool = True) -> argparse.ArgumentParser:
    """The parser of a script, with its docstring as help, --out and where asked for --tiny."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if tiny:
        made.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    made.add_argument("--out", type=Path, help="JSON file for the result")
    return made


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child that imports this very code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **changes, "PYTHONPATH": path}


def report(result: Mapping[str, Any], out: Path | None) -> None:
    """Print the table of a result; if `out` is given, write the result there with `facts`."""
    print(table(result.get("rows", ())), flush=True)
    if out is not None:
        write(out, {**facts(), **result})


def write(out: Path, result: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(result, indent=1) + "\n")
