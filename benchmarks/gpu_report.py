"""All that one GPU can tell about this code: whether it is exact and correct, and how fast.

The parts follow in order of importance, in chapters of at most three minutes, so that a short slot
gives a whole answer. Each part is a process of its own, so that a failure or a hang costs only that
part; one whose estimate no longer fits the budget is left out and listed. JSON and a page are
rewritten after every part. Without a GPU this is a rehearsal with small sizes on the CPU.

    # writes benchmarks/results/<gpu>-<date>.json and .md
    python benchmarks/gpu_report.py
    # some chapters or parts; the rest of the day's report stays
    python benchmarks/gpu_report.py --only exactness verse --budget_s 240
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

from harness import child_environment, commit, facts, parser, table, write

HERE = Path(__file__).parent
BUDGET_S = 520.0
LATEST = 2.5  # a part is killed after this many times its estimate
TEXT = "CONSYN_REPORT_TEXT"  # the environment variable with the text of the part "training"
SMALLEST = (
    "--model haiku --num_layers 1 --max_tokens 32 --batch_size 2 --data sample --tokenizer bytes"
)
MEMORY = {
    "alone": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"},
    "two": {},
    "all": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the report, run in a process of its own.

    Attributes:
        call: module:function, which returns a dict with "rows".
        estimate_s: on an H200, with compilation; measured where benchmarks/results has it, or
            judged.
        tiny: its arguments in a rehearsal, if they differ. A function that an earlier part calls is
            not rehearsed again.
        gpu: "alone": it has the GPU's memory for itself; "two": JAX and torch share it;
            "all": it runs in parallel with others.
    """

    name: str
    call: str
    estimate_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] | None = None
    gpu: Literal["alone", "two", "all"] = "alone"


# In order of importance. Each chapter fits a slot of `CHAPTER_S` seconds, programs compiled; what is
# timed is compiled alone, as XLA and torch choose its kernels by timing them.
CHAPTERS: dict[str, tuple[Part, ...]] = {
    "exactness": (Part("exactness", "gpu_checks:exactness", 150),),
    "verse": (Part("verse", "train_step:measure", 60, {"models": ("verse",), "rounds": 4}, {}),),
    "stanza": (Part("stanza", "train_step:measure", 70, {"models": ("stanza",), "rounds": 4}, {}),),
    "documents": (
        Part(
            "vs_verse_documents",
            "vs_pytorch:measure",
            170,
            {"models": ("verse",), "rounds": 4, "documents": 8},
            {"compiled": (), "documents": 4},
            gpu="two",
        ),
    ),
    "attention": (
        Part("attention", "attention:measure", 100, {"budget_s": 90.0}, {}),
        Part("attention checks", "gpu_checks:attention", 80),
    ),
    "fp8": (
        Part("fp8", "train_step:fp8", 90, {"rounds": 4}),
        Part("logits", "train_step:logits", 60, {"rounds": 4}),
    ),
    "against torch: verse": (
        Part(
            "vs_verse",
            "vs_pytorch:measure",
            160,
            {"models": ("verse",), "rounds": 4},
            {"compiled": ()},
            gpu="two",
        ),
    ),
    "against torch: stanza": (
        Part(
            "vs_stanza",
            "vs_pytorch:measure",
            175,
            {"models": ("stanza",), "rounds": 3},
            {},
            gpu="two",
        ),
    ),
    "epic": (
        Part("epic", "train_step:measure", 60, {"models": ("epic",), "rounds": 4}, {}),
        Part("cross_entropy", "cross_entropy:measure", 25),
        Part("optimizer", "optimizer:measure", 35, {"rounds": 5}, {}),
    ),
    "checks": (
        Part("model", "gpu_checks:model", 140, gpu="all"),
        Part("optimizers", "gpu_checks:optimizer", 80, gpu="all"),
        Part("training", "gpu_checks:training", 60, gpu="all"),
    ),
    "start": (
        Part(
            "startup",
            "startup:measure",
            60,
            {"flags": ["--model", "verse", "--data", "sample"], "starts": 2},
            {"flags": SMALLEST.split(), "starts": 1},
        ),
        Part("compile_time", "compile_time:measure", 90),
    ),
    "generate": (Part("generate", "generate:on_gpu", 90, gpu="two"),),
}
PARTS = tuple(part for parts in CHAPTERS.values() for part in parts)
CHAPTER_S = 180.0


@dataclass(frozen=True)
class Goal:
    """A bound on a figure: that of `column`, in the row where another column has a value."""

    text: str
    part: str
    row: tuple[str, str]
    column: str
    at_least: float | None = None
    at_most: float | None = None


RATE, RACE = "of the matmul rate", "ours is faster by"
COMPILED = ("who", "torch.compile")


def in_model(name: str) -> tuple[str, str]:
    return ("model", name)


GOALS = (
    Goal(f"verse: {RATE}", "verse", in_model("verse"), RATE, at_least=0.52),
    Goal(f"stanza: {RATE}", "stanza", in_model("stanza"), RATE, at_least=0.62),
    Goal(f"epic, 4 layers: {RATE}", "epic", in_model("epic"), RATE, at_least=0.64),
    Goal(
        "verse, 8 documents a row, against torch.compile with FlexAttention",
        "vs_verse_documents",
        COMPILED,
        RACE,
        at_least=1.25,
    ),
    Goal("verse against torch.compile", "vs_verse", COMPILED, RACE, at_least=1.10),
    Goal("stanza against torch.compile", "vs_stanza", COMPILED, RACE, at_least=1.08),
    Goal("stanza: fp8 against bf16", "fp8", in_model("stanza"), "fp8 is faster by", at_least=1.25),
    Goal(
        "cross-entropy in chunks against all at once",
        "cross_entropy",
        ("logits", "as in training"),
        "against all at once",
        at_most=1.03,
    ),
    Goal(
        "softmax kernel, 2,048 x 49,152 float32 logits: us",
        "cross_entropy",
        ("logits", "softmax kernel, float32"),
        "us",
        at_most=165,
    ),
    Goal(
        "AdamW's update against one pass",
        "optimizer",
        ("optimizer", "adamw"),
        "ratio",
        at_most=1.15,
    ),
    Goal(
        "one text of verse: decode against transformers",
        "generate",
        in_model("verse"),
        "decode_ratio",
        at_least=1.0,
    ),
    Goal(
        "one text of verse: decode, share of the bandwidth",
        "generate",
        in_model("verse"),
        "of the bandwidth",
        at_least=0.6,
    ),
    Goal("verse: idle", "verse", in_model("verse"), "idle", at_most=0.01),
    Goal(
        "verse: from the command to the first step, programs kept",
        "startup",
        ("part", "total"),
        "warm wall s",
        at_most=15.0,
    ),
    Goal("stanza: idle", "stanza", in_model("stanza"), "idle", at_most=0.01),
)


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


def run_part(part: Part, tiny: bool, limit_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part: its result, its state and its seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        command = [sys.executable, __file__, "--part", part.name, "--out", str(out)]
        process = subprocess.Popen(
            [*command, *(["--tiny"] if tiny else [])],
            env=environment | MEMORY[part.gpu],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
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
    """In the part's process: measure, and write the result."""
    module, _, function = part.call.partition(":")
    try:
        measure = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as missing:
        if missing.name != module:
            raise
        write(out, {"state": "absent"})
        return
    arguments = part.tiny if tiny and part.tiny is not None else part.arguments
    offered, takes = {"tiny": tiny, "text": os.environ[TEXT]}, inspect.signature(measure).parameters
    taken = {name: value for name, value in offered.items() if name in takes}
    result = measure(**arguments, **taken)
    wrong = any(row.get("ok", row.get("right")) is False for row in result.get("rows", ()))
    write(out, {"state": "wrong" if wrong else "done", "facts": facts(), **result})


# ----------------------------------------------------------------------------------------- the page


def goals(parts: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Each bound, the measured value, and whether it holds."""
    for goal in GOALS:
        rows = parts.get(goal.part, {}).get("rows", ())
        column, wanted = goal.row
        value = next((row.get(goal.column) for row in rows if row.get(column) == wanted), None)
        least, most = goal.at_least, goal.at_most
        bound = f"at least {least:g}" if least is not None else f"at most {most:g}"
        holds = None
        if value is not None:
            holds = (least is None or value >= least) and (most is None or value <= most)
        yield {
            "goal": goal.text,
            "bound": bound,
            "measured": value,
            "holds": {None: "not measured", True: "yes", False: "NO"}[holds],
        }


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
        before = json.loads(self.out.read_text()) if given.only and self.out.exists() else {}
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


def chosen(only: list[str] | None, tiny: bool) -> list[Part]:
    """The parts to run, by their names or those of chapters; a rehearsal runs a function once."""
    wanted = [
        part
        for chapter, parts in CHAPTERS.items()
        for part in parts
        if not only or part.name in only or chapter in only
    ]
    if not tiny:
        return wanted
    firsts: dict[str, Part] = {}
    for part in wanted:
        firsts.setdefault(part.call, part)
    return list(firsts.values())


def run(given: argparse.Namespace) -> bool:
    """Run the parts in order; whether none failed."""
    report = Report(given)
    wanted = chosen(given.only, report.tiny)
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "CUDA_VISIBLE_DEVICES": "0",
            **child_environment(CONSYN_COMMIT=report.found["commit"] or ""),
            "JAX_COMPILATION_CACHE_DIR": cache,
            TEXT: given.data,
        }

        def measured(part: Part) -> dict[str, Any]:
            left = given.budget_s - report.passed_s
            if part.estimate_s > left:
                return {"state": "left out"}
            limit = left if report.tiny else min(left, LATEST * part.estimate_s)
            return run_part(part, report.tiny, limit, environment)

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


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument(
        "--only",
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
        help="text for the part 'training', such as tiny Shakespeare (Python's language reference)",
    )
    made.add_argument("--part", help=argparse.SUPPRESS)  # in the process of a part
    return made.parse_args()


def main() -> int:
    """Run the parts; 1 if one failed or found something wrong."""
    given = parse_arguments()
    if given.part is None:
        return 0 if run(given) else 1
    try:
        child(next(part for part in PARTS if part.name == given.part), given.tiny, given.out)
    except Exception:  # noqa: BLE001 -- any error goes into the report
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
