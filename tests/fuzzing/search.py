"""A coverage-guided search for inputs that break a reader.

Install it with `pip install 'atheris>=3'` (2.3 miscompiles loops on Python 3.11), then run

    python tests/fuzzing/search.py --minutes 60

Each target gets its share of the time in a separate process. It also breaks if it takes more than
2 GiB of memory, or more than 10 seconds for one input (longer in proportion to other load on the
machine). Inputs that break a target are printed and kept as files in --findings.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def search(name: str, seconds: int, corpus: Path, findings: Path) -> None:
    """Search one target in this process; atheris does not return."""
    import atheris

    with atheris.instrument_imports(include=["consyn_jax"]):
        import targets

    here = Path(tempfile.mkdtemp())
    limit = 10 * max(1, round(os.getloadavg()[0] / (os.cpu_count() or 1)))
    ends = [f"-max_total_time={seconds}", f"-timeout={limit}", "-rss_limit_mb=2048"]
    flags = [*ends, "-max_len=8192", "-print_final_stats=1", f"-artifact_prefix={findings}/{name}-"]
    atheris.Setup(
        [sys.argv[0], *flags, str(corpus)], lambda data: targets.attempt(name, data, here)
    )
    atheris.Fuzz()


def main() -> int:
    """Search all targets in turn, and return the number of those that broke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.findings.mkdir(parents=True, exist_ok=True)
    if arguments.corpus is not None:
        search(arguments.target, arguments.seconds, arguments.corpus, arguments.findings)

    os.environ["CONSYN_CACHE"] = tempfile.mkdtemp()
    import targets

    broken, names = [], [arguments.target] if arguments.target else list(targets.TARGETS)
    with tempfile.TemporaryDirectory() as directory:
        seeds = targets.seeds(Path(directory))
        for name in names:
            corpus = Path(directory) / f"corpus-{name}"
            corpus.mkdir()
            for number, data in enumerate(seeds[name]):
                (corpus / str(number)).write_bytes(data)
            began, seconds = time.monotonic(), round(60 * arguments.minutes / len(names))
            words = [
                "--target",
                name,
                "--seconds",
                str(seconds),
                "--corpus",
                str(corpus),
                "--findings",
                str(arguments.findings),
            ]
            done = subprocess.run(
                [sys.executable, __file__, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            runs = next(
                (
                    line.split()[-1]
                    for line in done.stdout.splitlines()
                    if "number_of_executed_units" in line
                ),
                "?",
            )
            seconds_taken, state = time.monotonic() - began, "BROKEN" if done.returncode else "held"
            print(f"{name:15} {runs:>9} inputs in {seconds_taken:.0f} s: {state}", flush=True)
            if done.returncode:
                broken.append(name)
                print(done.stdout[-5000:], flush=True)
    return len(broken)


if __name__ == "__main__":
    sys.exit(main())
