"""How fast is preparation, compared with the tokenizer alone?

The text is enwik8, with its pages as documents, on all cores of this machine. Three contestants
take turns on a portion of the text each, so that noise affects all of them:

    raw         `encode_batch` of Hugging Face tokenizers, with its own threads: texts to encodings,
                ids not even extracted
    raw fast    the same with `encode_batch_fast`, which leaves out offsets
    pipeline    our workers on the same text: read, cut, clean, hash, tokenise, ids as arrays in
                this process; nothing is written

In each round `consyn-prepare` also runs as users run it, from the command to its end: hash, clean,
drop duplicates, split, tokenise, write, report. Finally it runs with four times the text. Memory is
the proportional set size of the process and all its children, sampled from /proc.

    python benchmarks/data_prepare.py --data ../shared/data/enwik8/enwik8.gz \
        --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "true"

import harness
import tokenizers
from harness import facts, write

from consyn_jax.data.preparation.workers.messages import WorkerSettings
from consyn_jax.data.preparation.workers.worker_pool import WorkerPool
from consyn_jax.data.sources.reader import START, Reading
from consyn_jax.data.sources.source import Source
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer

SEPARATOR = "</page>"
ENWIK8 = Path(__file__).parents[2] / "shared" / "data" / "enwik8" / "enwik8.gz"
PORTIONS = 4  # of the text, which take turns
# Of one call of encode_batch: enough for its threads; 100 MB at once would take gigabytes.
BATCH_BYTES = 4 << 20
# Limits: the pipeline and the whole command against `encode_batch`, and the peak of memory.
PIPELINE_RATIO, WHOLE_RATIO, PEAK_BYTES = 0.95, 0.6, 1.5e9
# The peak with the larger input may be this much higher, through sampling and the allocator.
PEAK_NOISE = 1.05


def read(path: Path, limit: int | None) -> list[str]:
    """The pages of the text, which are between the separators."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        data = file.read() if limit is None else file.read(limit)
    return data.decode("utf-8", "ignore").split(SEPARATOR)  # a limit may cut a character


def portions(pages: Sequence[str], count: int) -> list[list[str]]:
    """Divide the pages into `count` runs of about equal size."""
    total, done = sum(map(len, pages)), 0
    runs: list[list[str]] = [[] for _ in range(count)]
    for page in pages:
        runs[min(count * done // total, count - 1)].append(page)
        done += len(page)
    return runs


def num_bytes(pages: Sequence[str]) -> int:
    """Bytes of text without separators."""
    return sum(len(page.encode()) for page in pages)


def encode_raw(tokenizer: tokenizers.Tokenizer, pages: Sequence[str], name: str) -> float:
    """Seconds that `name` ("encode_batch" or "encode_batch_fast") takes."""
    encode, seconds = getattr(tokenizer, name), 0.0
    for batch in batches(pages):
        began = time.perf_counter()
        encodings = encode(batch, add_special_tokens=False)
        seconds += time.perf_counter() - began
        del encodings
    return seconds


def batches(pages: Sequence[str]) -> list[list[str]]:
    """Divide the pages into lists of about `BATCH_BYTES`."""
    return portions(pages, max(1, num_bytes(pages) // BATCH_BYTES))


def run_pipeline(
    workers: WorkerPool, options: CorpusOptions, tokenizer: BPETokenizer, file: Path
) -> tuple[float, int]:
    """Seconds and tokens of our worker processes on the documents of a file."""
    source = Source(str(file), "text")
    began = time.perf_counter()
    found = ((None, block) for block in source.blocks(START, Reading(options, tokenizer)))
    tokens = sum(len(result.kept.ids) for _, _, result in workers.results(found))
    return time.perf_counter() - began, tokens


# -------------------------------------------------------------------------------- the whole command


def run_command(data: Path, output: Path, cache: Path) -> dict[str, Any]:
    """Seconds, peak memory in bytes and the report of one `consyn-prepare`."""
    command = [sys.executable, "-m", "consyn_jax.cli.prepare", "--quiet"]
    command += ["--data", str(data), "--document_separator", SEPARATOR, "--output", str(output)]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "CONSYN_CACHE": str(cache)}
    )
    with Watch(process.pid) as watch:
        _, errors = process.communicate()
    seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"consyn-prepare ended with {process.returncode}: {errors}")
    report = json.loads((output / "report.json").read_text())
    return {
        "seconds": seconds,
        "peak_bytes": watch.peak,
        "samples": watch.samples,
        "splits": report["splits"],
        "dropped": report["dropped"],
    }


class Watch:
    """Measures the peak memory in bytes of a process and its children during a `with` block."""

    def __init__(self, pid: int, every_s: float = 0.05) -> None:
        self.pid, self.every_s = pid, every_s
        self.peak = self.samples = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(self.every_s):
            self.peak = max(self.peak, sum(resident(pid) for pid in family(self.pid)))
            self.samples += 1

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in tasks.read_text().split():
                found += family(int(child))
        except OSError:  # the thread has just ended
            continue
    return found


def resident(pid: int) -> int:
    """Proportional set size in bytes, which counts shared pages once; 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


# ----------------------------------------------------------------------------------------- the race


def write_text(file: Path, pages: Iterable[str]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        for number, page in enumerate(pages):
            out.write(f"{SEPARATOR}{page}" if number else page)


def portion_seconds(
    workers: WorkerPool,
    options: CorpusOptions,
    tokenizer: BPETokenizer,
    raw: tokenizers.Tokenizer,
    portions: Sequence[tuple[list[str], Path]],
) -> dict[str, float]:
    """Seconds of a round of the three contestants, by portion in turn."""
    seconds = dict.fromkeys(("raw", "raw fast", "pipeline"), 0.0)
    for pages, file in portions:
        seconds["raw"] += encode_raw(raw, pages, "encode_batch")
        seconds["pipeline"] += run_pipeline(workers, options, tokenizer, file)[0]
        seconds["raw fast"] += encode_raw(raw, pages, "encode_batch_fast")
    return seconds


def race(pages: list[str], rounds: int, directory: Path) -> dict[str, Any]:
    """Bytes of text per second by contestant and round, and the runs of the whole command."""
    tokenizer, cache = BPETokenizer(), directory / "cache"
    raw = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    options = CorpusOptions(document_separator=SEPARATOR)
    runs = portions(pages, PORTIONS)
    size = sum(map(num_bytes, runs))
    files = [directory / f"portion-{number}.txt" for number in range(PORTIONS)]
    text, one = directory / "text.txt", directory / "one.txt"
    for file, part in [*zip(files, runs, strict=True), (text, pages), (one, pages[:20])]:
        write_text(file, part)
    rates: dict[str, list[float]] = {"raw": [], "raw fast": [], "pipeline": [], "whole": []}
    whole: list[dict[str, Any]] = []
    startups = [
        run_command(one, directory / f"startup-{number}", cache)["seconds"] for number in range(3)
    ]
    with WorkerPool(os.cpu_count() or 1, WorkerSettings(options, tokenizer)) as workers:
        run_pipeline(workers, options, tokenizer, one)  # starts the processes
        encode_raw(raw, pages[:20], "encode_batch")
        for number in range(rounds):
            parts = list(zip(runs, files, strict=True))
            seconds = portion_seconds(workers, options, tokenizer, raw, parts)
            whole.append(run_command(text, directory / f"whole-{number}", cache))
            for name, took in {**seconds, "whole": whole[-1]["seconds"]}.items():
                rates[name].append(size / took)
            words = (f"{name} {values[-1] / 1e6:.2f} MB/s" for name, values in rates.items())
            print(f"round {number + 1}: {', '.join(words)}", flush=True)
    return {
        "bytes": size,
        "rates": rates,
        "startup_s": startups,
        "whole": whole,
        "whole_4x": run_larger(pages, directory, cache),
    }


def run_larger(pages: list[str], directory: Path, cache: Path) -> dict[str, Any]:
    """Run the command on four copies of the text."""
    text = directory / "text.txt"
    with text.open("w", encoding="utf-8", newline="") as file:
        for copy in range(4):  # with another first tag, so that none is a duplicate
            file.writelines(
                page.replace("<page>", f'<page copy="{copy}">') + SEPARATOR for page in pages
            )
    larger = run_command(text, directory / "larger", cache)
    return {**larger, "rate": text.stat().st_size / larger["seconds"]}


def judge(results: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios, and whether the limits hold."""
    rates = {name: statistics.median(values) for name, values in results["rates"].items()}
    # Ratios are within a round, because other load slows all contestants of a round.
    ratios = {
        name: statistics.median(
            a / b for a, b in zip(results["rates"][name], results["rates"]["raw"], strict=True)
        )
        for name in ("raw fast", "pipeline", "whole")
    }
    startup = statistics.median(results["startup_s"])
    peak = max(run["peak_bytes"] for run in results["whole"])
    peak_4x = results["whole_4x"]["peak_bytes"]
    return {
        "MB_per_s": {name: rate / 1e6 for name, rate in rates.items()}
        | {"whole 4x": results["whole_4x"]["rate"] / 1e6},
        "ratio_to_encode_batch": ratios,
        "startup_s": startup,
        "whole_without_startup_MB_per_s": results["bytes"]
        / (results["bytes"] / rates["whole"] - startup)
        / 1e6,
        "peak_MB": {"1x": peak / 1e6, "4x": peak_4x / 1e6},
        "holds": {
            f"pipeline >= {PIPELINE_RATIO} x encode_batch": ratios["pipeline"] >= PIPELINE_RATIO,
            f"whole >= {WHOLE_RATIO} x encode_batch": ratios["whole"] >= WHOLE_RATIO,
            f"peak < {PEAK_BYTES / 1e9} GB": max(peak, peak_4x) < PEAK_BYTES,
            "peak of 4x no higher": peak_4x <= PEAK_NOISE * peak,
        },
    }


def main() -> None:
    """Run, print the verdict, write JSON."""
    parser = harness.parser(__doc__, tiny=False)
    parser.add_argument(
        "--data",
        type=Path,
        default=ENWIK8,
        help="enwik8, plain or .gz (../shared/data/enwik8/enwik8.gz)",
    )
    parser.add_argument(
        "--bytes",
        type=lambda text: int(float(text)),
        help="use only the first BYTES, for a short run",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--work",
        type=Path,
        help="directory for temporary files, 1.2 GB for all of enwik8 (the system's)",
    )
    arguments = parser.parse_args()
    pages = read(arguments.data, arguments.bytes)
    print(f"{num_bytes(pages):,} bytes, {len(pages):,} pages", flush=True)
    before = facts()
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        results = race(pages, arguments.rounds, Path(directory))
    summary = judge(results)
    print(json.dumps(summary, indent=2))
    if arguments.out:
        write(arguments.out, {**before, "pages": len(pages), **summary, "runs": results})


if __name__ == "__main__":
    main()
