"""Does a store made by Ray have the bytes of a local one, and what does Ray cost?

`consyn-prepare` runs on enwik8, its pages as documents, with exact and near duplicates: with the
workers of this machine, on a Ray cluster of one node with two processors, and on one of two nodes
(two raylets on this machine) with one processor each; on both also with many writers. All stores are compared file by file.

The seconds of processor time of the main process alone, without those of its start, tell at which
rate it can feed workers on other machines and write what they return. Ray's threads in the main
process are part of it.

    python benchmarks/ray_preparation.py --data ../shared/data/enwik8/enwik8.gz \
        --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

sys.path.insert(0, str(harness.ROOT / "tests"))
from ray_nodes import Nodes, running

SEPARATOR = "</page>"
ENWIK8 = Path(__file__).parents[2] / "shared" / "data" / "enwik8" / "enwik8.gz"
PROCESSORS = 2
MANY = "many writers"
TINY_BYTES = 3_000_000
COMMAND = """
import sys, time
from consyn_jax.cli.prepare import main
code = main(sys.argv[1:])
print(time.process_time())
sys.exit(code)
"""


def run(data: Path, output: Path, nodes: Nodes | None, by_many: bool = False) -> dict[str, Any]:
    """Seconds of a `consyn-prepare`, and of the processor time of its main process."""
    flags = ["--data", data, "--document_separator", SEPARATOR, "--near_duplicates", "--quiet"]
    flags += ["--output", output, "--num_workers", PROCESSORS]
    if nodes is not None:
        flags += ["--engine", "ray", "--ray_address", nodes.address]
    if by_many:
        flags += ["--shared_directory", output.parent / "shared"]
    environment = {**(nodes.environment if nodes else os.environ)}
    environment["CONSYN_CACHE"] = str(output.parent / "cache")
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, flags)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"consyn-prepare ended with {done.returncode}: {done.stderr}")
    return {"seconds": seconds, "main_cpu_s": float(done.stdout.split()[-1])}


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of a store."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def contest(text: Path, small: Path, rounds: int, clusters: dict[str, Nodes | None]) -> Any:
    """Rows of all contestants, who take turns, and the hashes of their last stores."""
    place, size = text.parent, text.stat().st_size / 1e6
    starts = {
        name: run(small, place / f"{name}-start", nodes, MANY in name)
        for name, nodes in clusters.items()
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in clusters}
    for number in range(rounds):
        names = list(clusters) if number % 2 == 0 else list(reversed(clusters))
        for name in names:
            shutil.rmtree(place / name, ignore_errors=True)
            runs[name].append(run(text, place / name, clusters[name], MANY in name))
            print(name, json.dumps(runs[name][-1]), flush=True)
    rows = []
    for name in clusters:
        seconds = statistics.median(one["seconds"] for one in runs[name])
        main = statistics.median(one["main_cpu_s"] for one in runs[name])
        main -= starts[name]["main_cpu_s"]
        rows.append(
            {
                "workers": name,
                "MB": size,
                "start_s": starts[name]["seconds"],
                "seconds": seconds,
                "MB_per_s": size / seconds,
                "main_cpu_s": main,
                "main_MB_per_cpu_s": size / max(main, 1e-3),
            }
        )
    return rows, {name: hashes(place / name) for name in clusters}, runs


def measure(
    tiny: bool = False, data: Path = ENWIK8, limit: int | None = None, rounds: int = 1
) -> dict[str, Any]:
    """Run the contestants; the table, the hashes, and whether the stores are equal."""
    limit = TINY_BYTES if tiny else limit
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        text, small = place / "text.txt", place / "small.txt"
        with gzip.open(data) as file:
            content = file.read() if limit is None else file.read(limit)
        # A limit may cut a character.
        text.write_bytes(content.decode("utf-8", "ignore").encode())
        small.write_bytes(content[:1000])
        with running(PROCESSORS) as one, running(PROCESSORS // 2) as two:
            two.add()
            two.wait(2)
            clusters = {"local": None, "one node": one, "two nodes": two}
            clusters |= {f"one node, {MANY}": one, f"two nodes, {MANY}": two}
            rows, found, runs = contest(text, small, rounds, clusters)
        report = json.loads((place / "local" / "report.json").read_text())
    return {
        "rows": rows,
        "documents": {name: report[name] for name in ("documents", "dropped")},
        "stores_equal": {name: each == found["local"] for name, each in found.items()},
        "sha256": found["local"],
        "runs": runs,
    }


def main() -> None:
    """Run, print the table, write JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--data", type=Path, default=ENWIK8, help="enwik8.gz")
    parser.add_argument(
        "--bytes", type=lambda text: int(float(text)), help="use only the first BYTES"
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turns")
    arguments = parser.parse_args()
    result = measure(arguments.tiny, arguments.data, arguments.bytes, arguments.rounds)
    print(result["stores_equal"])
    harness.report(result, arguments.out)


if __name__ == "__main__":
    main()
