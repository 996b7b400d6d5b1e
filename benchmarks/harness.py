"""What the benchmarks share: taking turns, the record of machine, versions and commit, tables and JSON.

A benchmark is a script with `measure(tiny=False) -> dict`, which other scripts call, and `main()`. Whatever a table shows stands under
"rows", one flat dict a line. `tiny` makes all of it run on a CPU in seconds, to try the code and not the machine.
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

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "triton", "transformers", "tokenizers")


def alternate(contestants: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call. In each round all have their turn, in the opposite order every other round, so noise and drift meet all alike.

    Args:
        contestants: each call must wait for what it began on a device.
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
    """One turn of `calls` calls of something of JAX, which waits for the last: a device runs them in order."""

    def turn() -> None:
        import jax

        for _ in range(calls - 1):
            function()
        jax.block_until_ready(function())

    return turn


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def facts() -> dict[str, Any]:
    """Date, commit, machine, device, and the versions of what this process has loaded."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in sys.modules}
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": processor(), "cores": len(os.sched_getaffinity(0))}
    found |= {"load": round(os.getloadavg()[0], 1), "python": platform.python_version(), "versions": versions}
    if "jax" in sys.modules:
        import jax

        found |= {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    return found


def commit() -> str | None:
    """Of the code that runs, "-dirty" where it was changed since; CONSYN_COMMIT says it for a copy without a repository, or with another's."""
    if "CONSYN_COMMIT" in os.environ:
        return os.environ["CONSYN_COMMIT"] or None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def processor() -> str:
    """Its name, or where the system does not tell, its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of the same keys in Markdown, numbers to four digits."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a script, whose help is its own text, with --tiny and --out."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    made.add_argument("--out", type=Path, help="JSON file for the result")
    return made


def report(result: Mapping[str, Any], out: Path | None) -> None:
    """Print the table of a result and write the whole of it with `facts` to `out`, if there is one."""
    print(table(result.get("rows", ())), flush=True)
    if out is not None:
        write(out, {**facts(), **result})


def write(out: Path, result: Mapping[str, Any]) -> None:
    """As JSON, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(out)
