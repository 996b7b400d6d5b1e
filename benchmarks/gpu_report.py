"""Everything that one GPU can tell about this code in nine minutes: first whether it is right, then how fast it is.

Each part is a process of its own, so that one that fails or hangs costs itself alone. First all that is not timed runs at once: the checks, and
compiling of what will be timed, for the caches of JAX and torch. Then come the rest, one at a time, in order of importance; one whose estimate no longer fits
the budget is left out and listed. JSON and a page are written again after every part. Without a GPU this is a rehearsal: small sizes, on the
CPU, to try the code.

    python benchmarks/gpu_report.py                              # benchmarks/results/<gpu>-<date>.json and .md
    python benchmarks/gpu_report.py --only stanza vs_stanza      # some parts; the rest of the report of the day stays
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness import commit, facts, table, write

HERE = Path(__file__).parent
BUDGET_S = 520.0
LATEST = 2.5  # a part that takes so many times its estimate is ended
TEXT = "CONSYN_REPORT_TEXT"  # names the text of the part "training" to its process
SMALLEST = ["--model", "haiku", "--num_layers", "1", "--max_tokens", "32", "--batch_size", "2", "--data", "sample", "--tokenizer", "bytes"]
MEMORY = {"alone": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}, "two": {}, "all": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}}


@dataclass(frozen=True, eq=False)
class Part:
    """One process.

    Args:
        call: module:function, which gives a dict with "rows".
        estimate_s: on an H200, compilation included; what has been measured (benchmarks/results), else judged.
        tiny: its arguments in a rehearsal, where they are others. What calls the same function as a part before it is not rehearsed again.
        gpu: "alone": it has the GPU's memory for itself; "two": it is two processes that share it; "all": it runs beside others.
    """

    name: str
    call: str
    estimate_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] | None = None
    gpu: Literal["alone", "two", "all"] = "alone"


PARTS = (
    Part("model", "gpu_checks:model", 140, gpu="all"),
    Part("attention checks", "gpu_checks:attention", 120, gpu="all"),
    Part("optimizers", "gpu_checks:optimizer", 80, gpu="all"),
    Part("training", "gpu_checks:training", 60, gpu="all"),
    Part("programs", "programs:compile_ahead", 130, {"models": ("verse", "stanza", "epic", "stanza, fp8")}, gpu="all"),
    Part("torch programs", "vs_pytorch:compile_ahead", 135, {"models": ("verse", "stanza")}, gpu="all"),
    Part("verse", "train_step:measure", 30, {"models": ("verse",), "rounds": 4}, {}),
    Part("vs_verse", "vs_pytorch:measure", 80, {"models": ("verse",), "rounds": 4}, {"compiles": False}, gpu="two"),
    Part("stanza", "train_step:measure", 35, {"models": ("stanza",), "rounds": 4}, {}),
    Part("epic", "train_step:measure", 35, {"models": ("epic",), "rounds": 4}, {}),
    Part("vs_stanza", "vs_pytorch:measure", 110, {"models": ("stanza",), "rounds": 3}, {}, gpu="two"),
    Part("cross_entropy", "cross_entropy:measure", 25),
    Part("startup", "startup:measure", 60, {"flags": ["--model", "verse", "--data", "sample"], "starts": 2}, {"flags": SMALLEST, "starts": 1}),
    Part("fp8", "train_step:fp8", 40, {"rounds": 4}),
    Part("attention", "attention:measure", 30),
    Part("optimizer", "optimizer:measure", 35, {"rounds": 5}, {}),
    Part("compile_time", "compile_time:measure", 90),
)


@dataclass(frozen=True)
class Goal:
    """A figure that must hold: the value of a column in the row where another column has a value."""

    text: str
    part: str
    row: tuple[str, str]
    column: str
    at_least: float | None = None
    at_most: float | None = None


GOALS = (
    Goal("verse: of the matmul rate", "verse", ("model", "verse"), "of the matmul rate", at_least=0.52),
    Goal("stanza: of the matmul rate", "stanza", ("model", "stanza"), "of the matmul rate", at_least=0.62),
    Goal("epic, 4 layers: of the matmul rate", "epic", ("model", "epic"), "of the matmul rate", at_least=0.64),
    Goal("verse against torch.compile", "vs_verse", ("who", "torch.compile"), "ours is faster by", at_least=1.15),
    Goal("stanza against torch.compile", "vs_stanza", ("who", "torch.compile"), "ours is faster by", at_least=1.08),
    Goal("stanza: fp8 against bf16", "fp8", ("model", "stanza"), "fp8 is faster by", at_least=1.15),
    Goal("cross-entropy in chunks against all at once", "cross_entropy", ("logits", "as in training"), "against all at once", at_most=1.03),
    Goal("AdamW's update against one pass", "optimizer", ("optimizer", "adamw"), "ratio", at_most=1.15),
    Goal("verse: idle", "verse", ("model", "verse"), "idle", at_most=0.01),
    Goal("verse: from the command to the first step, programs kept", "startup", ("part", "total"), "warm wall s", at_most=15.0),
    Goal("stanza: idle", "stanza", ("model", "stanza"), "idle", at_most=0.01),
)


def gpu() -> str | None:
    """Its name, asked without taking its memory."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


# --------------------------------------------------------------------------------------------------------------------- the parts


def run_part(part: Part, tiny: bool, limit_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """The part's result, what became of it, and its seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        command = [sys.executable, str(Path(__file__)), "--part", part.name, "--out", str(out), *(["--tiny"] if tiny else [])]
        process = subprocess.Popen(
            command, env=environment | MEMORY[part.gpu], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            said, _ = process.communicate()
            said += f"\nended after {limit_s:.0f} s"
        result = json.loads(out.read_text()) if out.exists() else {}
    state = result.pop("state", "failed")
    found = {"state": state, "seconds": round(time.perf_counter() - began, 1), **result}
    return found if state in ("done", "absent") else {**found, "said": said[-3000:]}


def child(part: Part, tiny: bool, out: Path) -> None:
    """In the part's process: measure, and write what was found."""
    module, _, function = part.call.partition(":")
    try:
        measure = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as missing:
        if missing.name != module:
            raise
        write(out, {"state": "absent"})
        return
    arguments = part.tiny if tiny and part.tiny is not None else part.arguments
    takes, offered = inspect.signature(measure).parameters, {"tiny": tiny, "text": os.environ[TEXT]}
    result = measure(**arguments, **{name: value for name, value in offered.items() if name in takes})
    wrong = any(row.get("ok", row.get("right")) is False for row in result.get("rows", ()))
    write(out, {"state": "wrong" if wrong else "done", "facts": facts(), **result})


# ---------------------------------------------------------------------------------------------------------------------- the page


def goals(parts: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """What must hold, what was measured, and whether it holds."""
    for goal in GOALS:
        rows = parts.get(goal.part, {}).get("rows", ())
        value = next((row.get(goal.column) for row in rows if row.get(goal.row[0]) == goal.row[1]), None)
        least, most = goal.at_least, goal.at_most
        holds = None if value is None else (least is None or value >= least) and (most is None or value <= most)
        bound = f"at least {least:g}" if least is not None else f"at most {most:g}"
        yield {"goal": goal.text, "bound": bound, "measured": value, "holds": {None: "not measured", True: "yes", False: "NO"}[holds]}


def page(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    parts = report["parts"]
    lines = [f"# {report['gpu'] or 'Rehearsal without a GPU'}, {report['date']}", ""]
    known = next((one["facts"] for one in parts.values() if "facts" in one), {})
    versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    warning = " Small sizes, to try the code: the figures mean nothing." if report["tiny"] else ""
    lines += [f"Commit {report['commit']}; {report['seconds']:.0f} s; {versions}.{warning}", ""]
    if not report["tiny"]:
        lines += ["## What must hold", "", table(goals(parts)), ""]
    lines += ["## Parts", "", table({"part": name, "state": one["state"], "seconds": one.get("seconds")} for name, one in parts.items()), ""]
    for name, one in parts.items():
        if one.get("rows"):
            lines += [f"## {name}", "", table(one["rows"]), ""]
        if "said" in one:
            lines += [f"## {name}: {one['state']}", "", "```", one["said"][-1500:], "```", ""]
    return "\n".join(lines)


def main() -> int:
    """Run the parts; 1 where one failed or found something wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS], help="these parts: %(choices)s")
    parser.add_argument("--budget_s", type=float, default=BUDGET_S, help="seconds for all of it (%(default)s)")
    parser.add_argument("--data", default="sample", help="text for the run of the part 'training', such as tiny Shakespeare (Python's language reference)")
    parser.add_argument("--out", type=Path, help="JSON file; the page lies beside it (benchmarks/results/<gpu>-<date>.json)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on whatever is there")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in the process of a part
    given = parser.parse_args()
    if given.part is not None:
        try:
            child(next(part for part in PARTS if part.name == given.part), given.tiny, given.out)
        except Exception:  # noqa: BLE001 -- into the report, whatever it is
            traceback.print_exc()
            return 1
        return 0
    return 0 if run(given) else 1


def run(given: argparse.Namespace) -> bool:
    """The parts in order; whether none failed."""
    began, name = time.perf_counter(), gpu()
    tiny, date = given.tiny or name is None, time.strftime("%Y-%m-%d")
    slug = "rehearsal" if tiny else "-".join(name.lower().removeprefix("nvidia ").split())
    out = given.out or HERE / "results" / f"{slug}-{date}.json"
    before = json.loads(out.read_text()) if given.only and out.exists() else {}
    report: dict[str, Any] = {"gpu": name, "date": date, "commit": commit(), "tiny": tiny, "seconds": 0.0, "parts": before.get("parts", {})}
    with tempfile.TemporaryDirectory() as cache:
        environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "CONSYN_COMMIT": report["commit"] or "", "JAX_COMPILATION_CACHE_DIR": cache, TEXT: given.data}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))

        def measured(part: Part) -> dict[str, Any]:
            left = given.budget_s - (time.perf_counter() - began)
            limit = left if tiny else min(left, LATEST * part.estimate_s)
            return {"state": "left out"} if part.estimate_s > left else run_part(part, tiny, limit, environment)

        wanted = [part for part in PARTS if not given.only or part.name in given.only]
        if tiny:  # each function once
            firsts: dict[str, Part] = {}
            for part in wanted:
                firsts.setdefault(part.call, part)
            wanted = list(firsts.values())

        def keep(part: Part, found: dict[str, Any]) -> None:
            report["parts"][part.name] = found
            report["seconds"] = time.perf_counter() - began
            print(f"{report['seconds']:6.0f} s  {part.name:20} {found['state']}", flush=True)
            write(out, report)
            out.with_suffix(".md").write_text(page(report))

        together = [part for part in wanted if part.gpu == "all"]
        with ThreadPoolExecutor(max(1, len(together))) as pool:
            running = {pool.submit(measured, part): part for part in together}
            for done in as_completed(running):
                keep(running[done], done.result())
        for part in wanted:
            if part not in together:
                keep(part, measured(part))
    print(page(report))
    print(f"Written: {out}, {out.with_suffix('.md')}")
    return all(report["parts"][part.name]["state"] in ("done", "absent", "left out") for part in wanted)


if __name__ == "__main__":
    sys.exit(main())
