"""All that one GPU can tell about this code: whether it is exact and correct, and how fast.

The parts (`gpu_parts.py`) follow in order of importance. Each is a process of its own, so that a
failure or a hang costs only that part, and is killed after at most three minutes; one whose
estimate no longer fits the budget is left out and listed. So everything ends in its budget. JSON
and a page are rewritten after every part. Without a GPU this is a rehearsal with small sizes on the
CPU. benchmarks/README.md has the calls that answer everything in slots of under ten minutes.

    # writes benchmarks/results/<gpu>-<date>.json and .md
    python benchmarks/gpu_report.py
    # some chapters or parts; the rest of the day's report stays
    python benchmarks/gpu_report.py --parts exactness verse --budget_s 240
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
from pathlib import Path
from typing import Any

from gpu_parts import CHAPTERS, GOALS, PARTS, Part
from harness import child_environment, commit, facts, parser, table, write

HERE = Path(__file__).parent
BUDGET_S = 570.0
MEASURING = 0.85  # of a part's limit; the rest is for its process to start and to end
PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
MEMORY = {
    "alone": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"},
    "two": {},
    "all": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


def gpu() -> str | None:
    """The GPU's name, without taking its memory; None without a GPU."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    found = done.returncode == 0 and done.stdout.strip()
    return found.splitlines()[0].strip() if found else None


# ---------------------------------------------------------------------------------------- the parts


def run_part(
    part: Part, tiny: bool, limit_s: float, environment: dict[str, str], text: str = "sample"
) -> dict[str, Any]:
    """Run a part: its result, its state and its seconds.

    Its output goes to a file: a pipe would stay open while any process that it started lives.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory) / "result.json", Path(directory) / "said"
        command = [sys.executable, __file__, "--part", part.name, "--out", str(out)]
        command += ["--data", text, "--budget_s", str(MEASURING * limit_s)]
        with log.open("w") as said:
            process = subprocess.Popen(
                [*command, *(["--tiny"] if tiny else [])],
                env=environment | MEMORY[part.gpu],
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                said.write(f"\nended after {limit_s:.0f} s")
        result = json.loads(out.read_text()) if out.exists() else {}
        words = log.read_text(errors="replace")[-3000:]
    state = result.pop("state", "failed")
    found = {"state": state, "seconds": round(time.perf_counter() - began, 1), **result}
    return found if state in ("done", "absent") else {**found, "said": words}


def child(part: Part, given: argparse.Namespace) -> None:
    """In the part's process: measure, and write the result."""
    module, _, function = part.call.partition(":")
    try:
        measure = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as missing:
        if missing.name != module:
            raise
        write(given.out, {"state": "absent"})
        return
    offered = {"tiny": given.tiny, "text": given.data, "budget_s": given.budget_s}
    takes = inspect.signature(measure).parameters
    taken = {name: value for name, value in offered.items() if name in takes}
    result = measure(**part.arguments_for(given.tiny), **taken)
    wrong = any(row.get("ok", row.get("right")) is False for row in result.get("rows", ()))
    write(given.out, {"state": "wrong" if wrong else "done", "facts": facts(), **result})


# ----------------------------------------------------------------------------------------- the page


def goals(parts: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Each bound, the measured value, and whether it holds."""
    for goal in GOALS:
        value = goal.measured(parts)
        holds = "not measured" if value is None else "yes" if goal.missed_by(value) <= 0 else "NO"
        yield {"goal": goal.text, "bound": goal.bound, "measured": value, "holds": holds}


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
    if out := [name for name, one in parts.items() if one["state"] == "left out"]:
        lines += ["No time was left for these parts; this runs them:", ""]
        lines += [f"    python benchmarks/gpu_report.py --parts {' '.join(out)}", ""]
    states = [
        {"part": name, "state": one["state"], "seconds": one.get("seconds")}
        for name, one in parts.items()
    ]
    lines += ["## Parts", "", table(states), ""]
    for name, one in parts.items():
        if one.get("rows"):
            lines += [f"## {name}", "", table(one["rows"]), ""]
        if "said" in one:
            lines += [f"## {name}: {one['state']}", "", "```", one["said"][-1500:], "```", ""]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ the run


class Report:
    """The report so far, written again after every part."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.began, name = time.perf_counter(), gpu()
        self.tiny, date = given.tiny or name is None, time.strftime("%Y-%m-%d")
        slug = "rehearsal" if self.tiny else "-".join(name.lower().removeprefix("nvidia ").split())
        self.out: Path = given.out or HERE / "results" / f"{slug}-{date}.json"
        before = json.loads(self.out.read_text()) if given.parts and self.out.exists() else {}
        self.found: dict[str, Any] = {
            "gpu": name,
            "date": date,
            "commit": commit(),
            "tiny": self.tiny,
            "seconds": 0.0,
            "parts": before.get("parts", {}),
        }

    @property
    def passed_s(self) -> float:
        return time.perf_counter() - self.began

    def keep(self, part: Part, found: dict[str, Any]) -> None:
        """Add the result of a part."""
        self.found["parts"][part.name] = found
        self.found["seconds"] = self.passed_s
        print(f"{self.passed_s:6.0f} s  {part.name:20} {found['state']}", flush=True)
        write(self.out, self.found)
        self.out.with_suffix(".md").write_text(page(self.found))


def chosen(names: list[str] | None, tiny: bool) -> list[Part]:
    """The parts to run, by their names or those of chapters; a rehearsal repeats no call."""
    wanted = [
        part
        for chapter, parts in CHAPTERS.items()
        for part in parts
        if not names or part.name in names or chapter in names
    ]
    if not tiny:
        return wanted
    firsts: dict[str, Part] = {}
    for part in wanted:
        firsts.setdefault(f"{part.call} {part.arguments_for(tiny)}", part)
    return list(firsts.values())


def run(given: argparse.Namespace) -> bool:
    """Run the parts in order; whether none failed."""
    report = Report(given)
    wanted = chosen(given.parts, report.tiny)
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            PROGRAMS: cache,
            "CUDA_VISIBLE_DEVICES": "0",
            **child_environment(CONSYN_COMMIT=report.found["commit"] or ""),
        }

        def measured(part: Part) -> dict[str, Any]:
            left = given.budget_s - report.passed_s
            if part.estimate_s > left:
                return {"state": "left out"}
            limit = left if report.tiny else min(left, part.limit_s)
            return run_part(part, report.tiny, limit, environment, given.data)

        for parts in CHAPTERS.values():
            here = [part for part in parts if part in wanted]
            together = [part for part in here if part.gpu == "all"]
            with ThreadPoolExecutor(max(1, len(together))) as pool:
                running = {pool.submit(measured, part): part for part in together}
                for done in as_completed(running):
                    report.keep(running[done], done.result())
            for part in here:
                if part not in together:
                    report.keep(part, measured(part))
    print(page(report.found))
    print(f"Written: {report.out}, {report.out.with_suffix('.md')}")
    states = {report.found["parts"][part.name]["state"] for part in wanted}
    return states <= {"done", "absent", "left out"}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument(
        "--parts",
        nargs="+",
        metavar="PART",
        choices=list(dict.fromkeys([*CHAPTERS, *(part.name for part in PARTS)])),
        help="these chapters or parts: %(choices)s",
    )
    made.add_argument(
        "--budget_s", type=float, default=BUDGET_S, help="seconds for everything (%(default)s)"
    )
    made.add_argument(
        "--data",
        default="sample",
        help="text of the runs, such as tiny Shakespeare (Python's language reference)",
    )
    made.add_argument("--part", help=argparse.SUPPRESS)  # in the process of a part
    return made.parse_args(words)


def main() -> int:
    """Run the parts; 1 if one failed or found something wrong."""
    given = parse_arguments()
    if given.part is None:
        return 0 if run(given) else 1
    try:
        child(next(part for part in PARTS if part.name == given.part), given)
    except Exception:  # noqa: BLE001 -- any error goes into the report
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
