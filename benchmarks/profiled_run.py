"""Does a real run keep the device busy, and does its profile name where the time goes?

    python benchmarks/profiled_run.py --out benchmarks/results/NAME.json

`consyn-train` on verse, on text, with a line of the log for every step. The figures are those of
its own page (`--profile_steps`), and the time of the steps before the profile, which is that of a
run without one. "named" is the share of the busy time that the page gives to a module of the model
or to collectives; on GPUs the profiled steps launch each kernel by itself, so they are idle a
little longer than others.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import child_environment, parser, report

FIRST, LAST = 31, 40  # of the profile
SETTLED = 10  # steps before it that give the step time
UNNAMED = ("other", "matmuls")
FLAGS = (
    "--model verse --batch_size 32 --lr 6e-4 --logging_steps 1 --eval_steps 1000 "
    "--save_steps 1000 --logging_backend none --quiet"
)
SMALLEST = (
    "--tokenizer bytes --num_layers 1 --hidden_dim 32 --num_heads 2 --mlp_dim 64 "
    "--max_tokens 32 --batch_size 4"
)
TIMES = re.compile(r"([\d,.]+) ms each")
SHARE = re.compile(r"^  (busy|idle) +([\d.]+)%", re.MULTILINE)
PART = re.compile(r"^  ([\w-]+) +([\d.]+)% +[\d,.]+ ms per step", re.MULTILINE)


def figures(page: str) -> dict[str, float]:
    """The figures of a profile's page, as shares.

    >>> page = "Steps 1 to 2 on gpu:0, 100.0 ms each.\\n\\n  busy  99.5%\\n  idle  0.5%\\n"
    >>> page += "  mlp   60.0%  60.00 ms per step; at least\\n  other  1.5%  1.50 ms per step\\n"
    >>> figures(page)
    {'profiled step ms': 100.0, 'idle': 0.005, 'named': 0.985}
    """
    found = TIMES.search(page)
    assert found is not None, page
    unnamed = sum(float(share) for part, share in PART.findall(page) if part in UNNAMED)
    return {
        "profiled step ms": float(found[1].replace(",", "")),
        "idle": round(float(dict(SHARE.findall(page))["idle"]) / 100, 6),
        "named": round(1 - unnamed / 100, 6),
    }


def measure(tiny: bool = False, text: str = "sample") -> dict[str, Any]:
    """Run the command in a process of its own, and read its log and its page."""
    from consyn_jax.training.logging.metrics import read_metrics

    first, last = (3, 4) if tiny else (FIRST, LAST)
    flags = ["--data", text, *FLAGS.split(), *(SMALLEST.split() if tiny else [])]
    flags += ["--max_steps", str(last), "--profile_steps", f"{first}:{last}"]
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [sys.executable, "-m", "consyn_jax.cli.train", *flags, "--output", str(run)]
        done = subprocess.run(
            command, env=child_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        page = (run / "profile" / "summary.txt").read_text()
        log = read_metrics(run / "metrics.jsonl")
    name = "throughput/step_time_s"
    steps = [line[name] for line in log if name in line and line["step"] < first]
    step_ms = 1e3 * statistics.median(steps[-SETTLED:])
    return {"rows": [{"model": "verse", "step ms": step_ms, **figures(page)}], "page": page}


def main() -> None:
    """Run, print the table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", default="sample", help="a text")
    given = arguments.parse_args()
    result = measure(given.tiny, given.data)
    print(result["page"])
    report(result, given.out)


if __name__ == "__main__":
    main()
