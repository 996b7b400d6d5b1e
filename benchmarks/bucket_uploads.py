"""What copying a run to a bucket costs its steps.

Runs with and without `--remote` take turns, to a server of S3 (moto) in a process of its own. The
runs save a checkpoint a minute unless told otherwise. On a CPU that training fills, steps lose what
the copy takes: the share of the threads `mirror` and `lease` in the CPU time of the whole process
from the first step on. Both are CPU times, so other load on the machine does not make the share
smaller, as it would with clock times. The CPU time of a step with and without a copy is compared,
too. Must: under 1 %.

    python benchmarks/bucket_uploads.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from harness import ROOT, parser, report

FLAGS = "--model haiku --tokenizer bytes --max_tokens 256 --batch_size 8 --logging_steps 1 --quiet"
FLAGS += " --logging_backend none --validation_fraction 0.02"
# Uploads stay in the thread that is counted; elsewhere they have two more.
RUN = """
import json, sys, time
from pathlib import Path
from consyn_jax.cli.train import main
from consyn_jax.remote import lease
from consyn_jax.training.mirror import run_mirror
seconds, sent, steps = {}, [0, 0.0], []
from consyn_jax.training.run.recording import Recorder
recorded = Recorder.step
def step(self, *args):
    steps.append(time.process_time())
    return recorded(self, *args)
Recorder.step = step
def counted(owner, name):
    inner = getattr(owner, name)
    def run(self):
        inner(self)
        seconds[name] = time.thread_time()
    setattr(owner, name, run)
counted(run_mirror.RunMirror, "_run"), counted(lease.Lease, "_keep")
if "--remote" in sys.argv:
    from consyn_jax.remote import s3_bucket
    s3_bucket._TRANSFER.use_threads = False
    upload = s3_bucket.S3Bucket.upload
    def counting(self, file, key):
        began = time.thread_time()
        sent[0] += file.seek(0, 2)
        file.seek(0)
        upload(self, file, key)
        sent[1] += time.thread_time() - began
    s3_bucket.S3Bucket.upload = counting
code = main(sys.argv[2:])
found = {"cpu_s": seconds, "sent_bytes": sent[0], "upload_cpu_s": sent[1]}
found["process_cpu_s"] = time.process_time() - steps[0]
tenth = len(steps) // 10
found["step_cpu_s"] = (steps[-1] - steps[tenth]) / (len(steps) - 1 - tenth)
Path(sys.argv[1]).write_text(json.dumps(found))
sys.exit(code)
"""


def run(folder: Path, number: int, steps: int, minutes: float, port: int, copies: bool) -> Any:
    """One run, and what its steps and its copy cost."""
    output, facts = folder / f"run-{number}-{copies}", folder / f"facts-{number}-{copies}.json"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CONSYN_CACHE": str(folder / "cache"),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-c", RUN, str(facts), *FLAGS.split(), "--max_steps", str(steps)]
    command += ["--save_steps", str(steps), "--save_minutes", str(minutes), "--output", str(output)]
    command += ["--remote", f"s3://bucket/run-{number}"] if copies else []
    subprocess.run(command, env=environment, check=True, cwd=folder)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    saves = sum(line.get("event") == "save" for line in lines)
    found: dict[str, Any] = json.loads(facts.read_text())
    return found | {"copies": copies, "run_s": lines[-1]["time_s"], "saves": saves}


def measure(steps: int, rounds: int, minutes: float) -> dict[str, Any]:
    """Runs of both kinds in turns, every other round in the opposite order."""
    found: dict[bool, list[Any]] = {True: [], False: []}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(10)
        address = f"http://127.0.0.1:{port}/bucket"
        urllib.request.urlopen(urllib.request.Request(address, method="PUT"))
        with tempfile.TemporaryDirectory() as folder:
            for number in range(rounds):
                for copies in (True, False) if number % 2 else (False, True):
                    place = Path(folder), number, steps, minutes, port, copies
                    found[copies].append(run(*place))
    finally:
        server.kill()
        server.wait()
    pairs = zip(found[False], found[True], strict=True)
    ratios = [there["step_cpu_s"] / here["step_cpu_s"] for here, there in pairs]
    shares = [sum(each["cpu_s"].values()) / each["process_cpu_s"] for each in found[True]]
    sent, cpu = (sum(each[key] for each in found[True]) for key in ("sent_bytes", "upload_cpu_s"))
    row = {
        "share of CPU time": max(shares),
        "CPU s per GB": 1e9 * cpu / sent,
        "GB": sent / 1e9,
        "saves a run": statistics.median(each["saves"] for each in found[True]),
        "CPU of a step, with / without": f"{min(ratios):.3f} to {max(ratios):.3f}",
    }
    return {"steps": steps, "save_minutes": minutes, "runs": found[True] + found[False]} | {
        "rows": [row]
    }


def main() -> None:
    made = parser(__doc__, tiny=False)
    made.add_argument("--steps", type=int, default=600, help="of each run")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--save_minutes", type=float, default=1.0, help="less shows the cost larger")
    given = made.parse_args()
    report(measure(given.steps, given.rounds, given.save_minutes), given.out)


if __name__ == "__main__":
    main()
