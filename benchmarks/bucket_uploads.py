"""What copying a run to a bucket costs its steps.

Runs with and without `--remote` take turns, to a server of S3 (moto) in a process of its own. The
runs save a checkpoint a minute unless told otherwise; all threads share the cores of the machine,
so the share of a core that the copy takes is what steps can lose at most. Compared are that share,
as the CPU time of the threads `mirror` and `lease` per second of the run, and the tokens per second
of both kinds of runs. Must: under 1 %.

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
seconds, sent = {}, [0, 0.0]
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
Path(sys.argv[1]).write_text(json.dumps(found))
sys.exit(code)
"""


def run(folder: Path, number: int, steps: int, minutes: float, port: int, copies: bool) -> Any:
    """One run; its rate after the first tenth of the steps, and what its copy cost."""
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
    steady = [line for line in lines if "train/loss" in line and line["step"] >= steps // 10]
    wall_s = steady[-1]["time_s"] - steady[0]["time_s"]
    saves = sum(line.get("event") == "save" for line in lines)
    found: dict[str, Any] = json.loads(facts.read_text())
    return found | {
        "tokens_per_s": (steady[-1]["tokens"] - steady[0]["tokens"]) / wall_s,
        "step_time_s": statistics.median(line["throughput/step_time_s"] for line in steady),
        "run_s": lines[-1]["time_s"],
        "saves": saves,
    }


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
    ratio = statistics.median(b["tokens_per_s"] / a["tokens_per_s"] for a, b in pairs)
    shares = [sum(each["cpu_s"].values()) / each["run_s"] for each in found[True]]
    sent, cpu = (sum(each[key] for each in found[True]) for key in ("sent_bytes", "upload_cpu_s"))
    row = {
        "share of a core": statistics.median(shares),
        "CPU s per GB": 1e9 * cpu / sent,
        "GB": sent / 1e9,
        "tokens/s with / without": ratio,
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
