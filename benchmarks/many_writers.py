"""How does a corpus that many writers prepare scale with the cores?

The tasks of `consyn-prepare --engine ray --shared_directory` run on the two cores of this machine,
as processes and without Ray, on enwik8, its pages as documents, with exact and near duplicates. The
seconds and the bytes of each are recorded, in turns with local preparations. A schedule over more
cores is then simulated: the measured tasks, as often as the corpus is larger, each phase after the
one before it, on 2 N cores. What one process does, the driver and the phases of a single task, does
not shrink; its seconds are a part that each corpus has, one for each segment, measured on many
small segments, and one for each document in a bucket with others. What shared storage and Ray
would add is not in it.

All seconds are of processor time, so that other work on the machine changes them less. The local
rate is that of `consyn-prepare` with two workers on two cores that never wait: half of the
processor time of all its processes, without its start. A second, higher one is that of its workers
alone, `Worker.work` on the blocks of each segment, measured beside the segment in one process; this
comparison depends least on what else the machine does. Both favour the local way. 1.8 per added
pair of cores means that N pairs have at least 0.9 N times the local rate.

    python benchmarks/many_writers.py --data ../shared/data/enwik8/enwik8.gz --out FILE.json
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
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
import numpy as np
import ray_preparation

from consyn_jax.data.preparation import store_making
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.segments import duplicates, many_writers, phases
from consyn_jax.data.preparation.segments.job import Job
from consyn_jax.data.preparation.segments.spans import segment_blocks
from consyn_jax.data.preparation.segments.tasks import Tasks
from consyn_jax.data.store.file_hashes import hash_of
from consyn_jax.prepare_config import CorpusOptions, EngineOptions

CORES = 2
SMALL_SEGMENT = 1 << 20
PAIRS = (1, 2, 4, 8, 16, 32, 64, 128, 2048)
SIZES_MB = (100, 10_000, 1_000_000, 10_000_000)
SINGLE = ("long", "dropped-exact", "groups", "dropped-near")
SHARE_IN_BUCKETS = 0.1  # of the documents, each in three pairs: an assumption
DOCUMENT_BYTES = 8000
MOST_SIMULATED = 200_000  # tasks; of more, the time is that of so many times their number


def timed(root: str, identity: str, phase: str, number: int) -> tuple[float, float, float]:
    """Seconds of a task, and those before it in which its process reads the settings.

    Of a segment also those of `Worker.work` alone on its blocks, which is what a local worker
    does: in the same process, before every other segment and after the others.
    """
    began = time.process_time()
    job = phases._job(root, identity)
    ready = time.process_time() - began
    alone = _work_alone(job, number) if phase == "segments" and number % 2 else 0.0
    began = time.process_time()
    fault, _ = phases.work(root, identity, phase, number)
    seconds = time.process_time() - began
    assert not fault, fault
    if phase == "segments" and number % 2 == 0:
        alone = _work_alone(job, number)
    return seconds, ready, alone


def _work_alone(job: Job, segment: int) -> float:
    blocks, worker = list(segment_blocks(job, segment)), job.settings.worker()
    began = time.process_time()
    for _, block in blocks:
        worker.work(block)
    return time.process_time() - began


class TimedTasks(Tasks):
    """Runs tasks on two processes, and keeps the seconds of each and the bytes of their results."""

    def __init__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # as Ray does
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(CORES, context)
        self.seconds: dict[str, list[float]] = {}
        self.bytes: dict[str, int] = {}
        self.ready_s = self.alone_s = 0.0
        for future in [self._pool.submit(time.sleep, 0.5) for _ in range(CORES)]:
            future.result()

    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        """Run all tasks."""
        calls = [(str(job.root), job.identity, phase, number) for number in numbers]
        futures = [self._pool.submit(timed, *call) for call in calls]
        results = [future.result() for future in futures]
        self.seconds[phase] = [seconds for seconds, _, _ in results]
        self.ready_s = max([self.ready_s, *(ready for _, ready, _ in results)])
        if phase == "segments":
            self.alone_s = sum(alone for _, _, alone in results)
        self.bytes[phase] = sum(
            path.stat().st_size for path in job.place(phase, 0).parent.rglob("*") if path.is_file()
        )

    def hashes(self, paths: Sequence[Path], done: Callable[[int], None]) -> list[Any]:
        """Hash the files on both processes."""
        names = [str(path.resolve()) for path in paths]
        results = []
        for fault, result in self._pool.map(phases.work_on_file, names):
            assert not fault, fault
            results.append(result)
            done(len(results))
        return results

    def close(self) -> None:
        """Keep the processes for the next corpus."""


def prepared(
    text: Path, output: Path, tasks: TimedTasks, segment: int = many_writers.LEAST_SEGMENT_BYTES
) -> float:
    """Make a store from these tasks; return the seconds of the driver alone."""
    many_writers.LEAST_SEGMENT_BYTES = segment
    store_making.start_tasks = lambda spec: tasks
    rules = CorpusOptions(
        data=(str(text),), document_separator=ray_preparation.SEPARATOR, near_duplicates=0.8
    )
    engine = EngineOptions(shared_directory=str(output.parent / "shared"))
    began = time.process_time()
    prepare(rules, output=output, engine=engine)
    return time.process_time() - began


def makespan(seconds: Sequence[float], times: float, cores: int) -> float:
    """The time of tasks, each of them `times` times, that free cores take up in order."""
    here = max(1, min(round(times), MOST_SIMULATED // max(len(seconds), 1)))
    free = [0.0] * cores
    for task in [*seconds] * here:
        heapq.heappush(free, heapq.heappop(free) + task)
    return max(free) * max(times / here, 1.0)


@dataclasses.dataclass
class Measured:
    """What was measured; seconds are of processor time.

    Attributes:
        megabytes: size of the corpus of `tasks`.
        tasks: seconds of each task of the phases with many.
        ready_s: of a process, before its first task.
        fixed_s: of one process, for any corpus.
        segment_s, pair_s: of one process, for each segment and for each pair of documents.
    """

    megabytes: float
    tasks: dict[str, list[float]]
    ready_s: float
    fixed_s: float
    segment_s: float
    pair_s: float

    def row(self, size: float, pairs: int, local: float, alone_rate: float) -> dict[str, Any]:
        """The rate for a corpus of `size` megabytes on so many pairs of cores."""
        least, most = many_writers.LEAST_SEGMENT_BYTES, many_writers.MOST_SEGMENT_BYTES
        segment_bytes = min(max(size * 1e6 / many_writers.SEGMENTS, least), most)
        joined = 3 * SHARE_IN_BUCKETS * size * 1e6 / DOCUMENT_BYTES
        segments = size * 1e6 / segment_bytes
        alone = self.fixed_s + self.segment_s * segments + self.pair_s * joined
        # A larger segment is one task with the seconds of several.
        larger = segment_bytes / least
        together = self.ready_s
        for phase, seconds in self.tasks.items():
            scale = larger if phase in ("segments", "kept") else 1.0
            times = size / self.megabytes / scale
            together += makespan([each * scale for each in seconds], times, 2 * pairs)
        total = alone + together
        return {
            "GB": size / 1e3,
            "core pairs": pairs,
            "seconds": total,
            "MB_per_s": size / total,
            "of local": size / total / local,
            "per pair": 2 * size / total / local / pairs,
            "per pair, of work alone": 2 * size / total / alone_rate / pairs,
            "one process": alone / total,
        }


def measure(
    tiny: bool = False,
    data: Path = ray_preparation.ENWIK8,
    limit: int | None = None,
    rounds: int = 3,
) -> dict[str, Any]:
    """Measure the tasks, and simulate."""
    limit, rounds = (ray_preparation.TINY_BYTES, 1) if tiny else (limit, rounds)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        os.environ["CONSYN_CACHE"] = str(place / "cache")
        text, small = place / "text.txt", place / "small.txt"
        with gzip.open(data) as file:
            content = file.read() if limit is None else file.read(limit)
        text.write_bytes(content.decode("utf-8", "ignore").encode())
        small.write_bytes(content[:1000])
        tasks = TimedTasks()
        prepared(small, place / "imports", tasks)
        fixed = min(prepared(small, place / f"small-{n}", tasks) + _alone(tasks) for n in "abc")
        cut = min(
            prepared(text, place / f"cut-{n}", tasks, SMALL_SEGMENT) + _alone(tasks) for n in "ab"
        )
        segment_s = max(cut - fixed, 0.0) / len(tasks.seconds["segments"])
        found: dict[str, list[float]] = {"hash": [], "cuts": []}
        starts, ones, same, totals, alone = [], [], [], [], []
        for number in range(rounds):
            prepared(text, place / f"many-{number}", tasks)
            began = time.process_time()
            hash_of(text)
            found["hash"].append(time.process_time() - began)
            for phase, seconds in tasks.seconds.items():
                if phase not in SINGLE:
                    found.setdefault(phase, []).extend(seconds)
            alone.append(tasks.alone_s)
            totals.append(sum(tasks.seconds["segments"]))
            starts.append(_by_one(small, place / f"start-{number}"))
            ones.append(_by_one(text, place / f"one-{number}"))
            stores = [place / f"one-{number}", place / f"many-{number}", place / "cut-a"]
            first, *others = map(ray_preparation.hashes, stores)
            same.append(all(other == first for other in others))
        size = rounds * text.stat().st_size / 1e6
    local = CORES * size / (sum(ones) - sum(starts))
    measured = Measured(size, found, tasks.ready_s, fixed, segment_s, _seconds_of_a_pair())
    return {
        "rows": [
            measured.row(mb, pairs, local, CORES * size / sum(alone))
            for mb in SIZES_MB
            for pairs in PAIRS
        ],
        "stores_equal_local": same,
        "local": {"cpu_s": ones, "start_cpu_s": starts, "MB_per_s": local},
        "one_process": {
            name: getattr(measured, name) for name in ("fixed_s", "segment_s", "pair_s", "ready_s")
        },
        "phases": {
            phase: {
                "tasks": len(seconds) // rounds,
                "seconds": sum(seconds) / rounds,
                "longest_s": max(seconds, default=0.0),
                "MB": tasks.bytes.get(phase, 0) / 1e6,
            }
            for phase, seconds in found.items()
        },
        "MB": size / rounds,
        "segments_cpu_s": totals,
        "work_alone": {"cpu_s": alone, "MB_per_s": CORES * size / sum(alone)},
    }


def _alone(tasks: TimedTasks) -> float:
    """Seconds of the phases that have one task."""
    return sum(sum(tasks.seconds[phase]) for phase in SINGLE)


def _seconds_of_a_pair(count: int = 1_000_000) -> float:
    """Seconds to join documents into groups, for each pair of them."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, count, (count, 2), dtype=np.uint64)
    began = time.process_time()
    found, places = np.unique(ids, return_inverse=True)
    duplicates._joined(places.reshape(-1, 2), len(found))
    return (time.process_time() - began) / count


def _by_one(data: Path, output: Path) -> float:
    """Seconds of processor time of all processes of a local preparation."""
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
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns")
    arguments = parser.parse_args()
    result = measure(arguments.tiny, arguments.data, arguments.bytes, arguments.rounds)
    print(harness.table({"phase": name, **row} for name, row in result["phases"].items()))
    print(result["work_alone"], result["segments_cpu_s"])
    print(result["local"], result["one_process"], result["stores_equal_local"])
    harness.report(result, arguments.out)


if __name__ == "__main__":
    main()
