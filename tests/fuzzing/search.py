"""A search for inputs that break a reader, led by coverage: `pip install 'atheris>=3'` (2.3 miscompiles loops on Python 3.11), then

    python tests/fuzzing/search.py --minutes 60

Each target has its share of the time in a process of its own, which 2 GiB of memory or 10 seconds over one input end, too (on a machine with
other load as many times longer as there are others who wait for a core). What breaks is left as a file in --findings, and printed.
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
    """One target, in this process; atheris does not come back."""
    import atheris

    with atheris.instrument_imports(include=["consyn_jax"]):
        import targets

    here = Path(tempfile.mkdtemp())
    limit = 10 * max(1, round(os.getloadavg()[0] / (os.cpu_count() or 1)))
    ends = [f"-max_total_time={seconds}", f"-timeout={limit}", "-rss_limit_mb=2048"]
    flags = [*ends, "-max_len=8192", "-print_final_stats=1", f"-artifact_prefix={findings}/{name}-"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], lambda data: targets.attempt(name, data, here))
    atheris.Fuzz()


def main() -> int:
    """All targets, one after the other; the number of those that broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            words = ["--target", name, "--seconds", str(seconds), "--corpus", str(corpus), "--findings", str(arguments.findings)]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            runs = next((line.split()[-1] for line in done.stdout.splitlines() if "number_of_executed_units" in line), "?")
            print(f"{name:15} {runs:>9} inputs in {time.monotonic() - began:.0f} s: {'BROKEN' if done.returncode else 'held'}", flush=True)
            if done.returncode:
                broken.append(name)
                print(done.stdout[-5000:], flush=True)
    return len(broken)


if __name__ == "__main__":
    sys.exit(main())
