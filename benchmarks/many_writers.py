"""How does a corpus that many writers prepare scale with the cores?

The tasks of `consyn-prepare --engine ray --shared_directory` run on the two cores of this machine,
as processes and without Ray, on enwik8, its pages as documents, with exact and near duplicates; the
seconds and the bytes of each are recorded. A schedule over more cores is then simulated: the
measured tasks, each phase after the one before it, on 2 N cores, and with what the driver itself
needs, which does not shrink. Larger corpora are copies of enwik8: tasks of which there are many
are there as often as copies, and those of which there is one take that many times as long. What
shared storage and Ray would add is not in it.

All seconds are of processor time, so that other work on the machine hardly changes them. The local
rate is that of `consyn-prepare` with two workers on two cores that never wait: half of the
processor time of all its processes, without its start. This favours the local way. 1.8 per added
pair of cores means that N pairs have at least 0.9 N times the local rate.

    python benchmarks/many_writers.py --data ../shared/data/enwik8/enwik8.gz --out FILE.json
"""

from __future__ import annotations

import concurrent.futures
import gzip
import heapq
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import ray_preparation

from consyn_jax.data.preparation import store_making
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.segments import many_writers
from consyn_jax.data.preparation.segments.job import Job
from consyn_jax.data.preparation.segments.phases import work
from consyn_jax.data.store.file_hashes import hash_of
from consyn_jax.prepare_config import CorpusOptions, EngineOptions

CORES = 2
PAIRS = (1, 2, 4, 8, 16, 32, 64, 128)
COPIES = (1, 100, 1000)


def timed(*arguments: Any) -> float:
    """Seconds of a task."""
    began = time.process_time()
    fault, _ = work(*arguments)
    assert not fault, fault
    return time.process_time() - began


class TimedTasks(many_writers.Tasks):
    """Runs tasks on two processes, and keeps the seconds of each and the bytes of their results."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(CORES, context)
        self.seconds: dict[str, list[float]] = {}
        self.bytes: dict[str, int] = {}
        for future in [self._pool.submit(time.sleep, 0.5) for _ in range(CORES)]:
            future.result()

    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        """Run all tasks."""
        calls = [(str(job.root), job.identity, phase, number) for number in numbers]
        futures = [self._pool.submit(timed, *call) for call in calls]
        self.seconds[phase] = [future.result() for future in futures]
        self.bytes[phase] = sum(
            path.stat().st_size for path in (job.root / phase).rglob("*") if path.is_file()
        )

    def hashes(self, paths: Sequence[Path], done: Callable[[int], None]) -> list[Any]:
        """Refuse; a file of 100 MB is hashed by the driver."""
        raise NotImplementedError

    def close(self) -> None:
        """Keep the processes for the next corpus."""


def prepared(text: Path, tasks: TimedTasks) -> float:
    """Make a store from these tasks; return the seconds of the driver alone."""
    store_making.start_tasks = lambda spec: tasks
    rules = CorpusOptions(
        data=(str(text),), document_separator=ray_preparation.SEPARATOR, near_duplicates=0.8
    )
    engine = EngineOptions(shared_directory=str(text.parent / "shared"))
    began = time.process_time()
    prepare(rules, output=text.parent / f"many-{text.stem}", engine=engine)
    return time.process_time() - began


def makespan(seconds: Sequence[float], cores: int) -> float:
    """The time of tasks that free cores take up in order."""
    free = [0.0] * cores
    for task in seconds:
        heapq.heappush(free, heapq.heappop(free) + task)
    return max(free)


def simulated(
    phases: dict[str, list[float]], driver: Callable[[int], float], pairs: int, copies: int
) -> dict[str, float]:
    """Seconds of the driver and of each phase, of so many copies on so many pairs of cores."""
    found = {"driver": driver(copies)}
    for phase, seconds in phases.items():
        alone = len(seconds) == 1 and phase not in ("hash", "cuts")
        found[phase] = seconds[0] * copies if alone else makespan(seconds * copies, 2 * pairs)
    return found


def rows_of(
    phases: dict[str, list[float]], driver: Callable[[int], float], size: float, local: float
) -> list[dict[str, Any]]:
    """The rate for each corpus and number of cores, against the local rate."""
    rows = []
    for copies in COPIES:
        for pairs in PAIRS:
            seconds = simulated(phases, driver, pairs, copies)
            total = sum(seconds.values())
            rate = copies * size / total
            serial = sum(s for phase, s in seconds.items() if phase in ("driver", *SINGLE))
            rows.append(
                {
                    "GB": copies * size / 1e3,
                    "core pairs": pairs,
                    "seconds": total,
                    "MB_per_s": rate,
                    "of local": rate / local,
                    "per pair": 2 * rate / local / pairs,
                    "serial share": serial / total,
                }
            )
    return rows


SINGLE = ("long", "dropped-exact", "groups", "dropped-near")


def measure(
    tiny: bool = False, data: Path = ray_preparation.ENWIK8, limit: int | None = None
) -> dict[str, Any]:
    """Measure the tasks, and simulate."""
    limit = ray_preparation.TINY_BYTES if tiny else limit
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        os.environ["CONSYN_CACHE"] = str(place / "cache")
        text, quarter, small = (place / f"{name}.txt" for name in ("text", "quarter", "small"))
        with gzip.open(data) as file:
            content = file.read() if limit is None else file.read(limit)
        text.write_bytes(content.decode("utf-8", "ignore").encode())
        quarter.write_bytes(content[: len(content) // 4].decode("utf-8", "ignore").encode())
        small.write_bytes(content[:1000])
        size = text.stat().st_size / 1e6
        tasks = TimedTasks()
        prepared(small, tasks)  # imports
        of_quarter = prepared(quarter, tasks)
        of_whole = prepared(text, tasks)
        # The driver's seconds: a part that each corpus has, and one that grows with it.
        grows = max(of_whole - of_quarter, 0.0) / 0.75
        fixed = max(of_whole - grows, 0.0)
        began = time.process_time()
        hash_of(text)
        hashing = time.process_time() - began
        grows = max(grows - hashing, 0.0)  # of larger corpora, tasks hash
        phases = {"hash": [hashing], **tasks.seconds}
        start, one = (_by_one(data, place / data.stem / "one") for data in (small, text))
        same = ray_preparation.hashes(place / "text" / "one") == ray_preparation.hashes(
            place / "many-text"
        )
    local = CORES * size / (one - start)
    return {
        "rows": rows_of(phases, lambda copies: fixed + grows * copies, size, local),
        "store_equals_local": same,
        "local": {"cpu_s": one, "start_cpu_s": start, "MB_per_s": local},
        "driver": {"fixed_s": fixed, "per_copy_s": grows},
        "phases": {
            phase: {
                "tasks": len(seconds),
                "seconds": sum(seconds),
                "longest_s": max(seconds, default=0.0),
                "MB": tasks.bytes.get(phase, 0) / 1e6,
            }
            for phase, seconds in phases.items()
        },
    }


def _by_one(data: Path, output: Path) -> float:
    """Seconds of processor time of all processes of a local preparation."""
    output.parent.mkdir()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ray_preparation.run(data, output, None)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run, print the tables, write JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--data", type=Path, default=ray_preparation.ENWIK8, help="enwik8.gz")
    parser.add_argument(
        "--bytes", type=lambda text: int(float(text)), help="use only the first BYTES"
    )
    arguments = parser.parse_args()
    result = measure(arguments.tiny, arguments.data, arguments.bytes)
    print(harness.table({"phase": name, **row} for name, row in result["phases"].items()))
    print(result["local"], result["driver"], result["store_equals_local"])
    harness.report(result, arguments.out)


if __name__ == "__main__":
    main()
