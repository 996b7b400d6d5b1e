"""The report on a GPU, rehearsed without one: whatever a part does, the others go on, and the page
says what became of each."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from consyn_jax.distributed.auto_mesh import Machine
from consyn_jax.distributed.hardware import described_gpu

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def gpu_report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as the script has it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_report

    return gpu_report


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(3900)
def test_a_rehearsal_runs_all_parts(gpu_report: Any, tmp_path: Path) -> None:
    """Every part but those that make the same call as an earlier one."""
    out = tmp_path / "report.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu_report.py"),
        "--tiny",
        "--budget_s",
        "3600",
        "--out",
        str(out),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    report = json.loads(out.read_text())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert {name: part["state"] for name, part in report["parts"].items()} == dict.fromkeys(
        (part.name for part in gpu_report.chosen(None, tiny=True)), "done"
    )
    names = ("exactness", "verse", "vs_verse_documents", "vs_verse", "vs_enwik8", "run", "model")
    for name in names:
        assert report["parts"][name]["rows"], name
        assert f"## {name}" in out.with_suffix(".md").read_text()


def seconds(parts: Any, time: str) -> float:
    """Seconds of parts, by their estimates or limits; those that share the GPU run at once."""
    together = [getattr(part, time) for part in parts if part.gpu == "all"]
    alone = sum(getattr(part, time) for part in parts if part.gpu != "all")
    return alone + max(together, default=0.0)


def test_no_chapter_can_take_more_than_three_minutes(gpu_report: Any) -> None:
    """Parts are killed at their limits; exactness comes first."""
    import gpu_parts

    names = list(gpu_parts.CHAPTERS)
    assert names[:4] == ["exactness", "verse", "stanza", "documents"]
    assert names[4:7] == ["documents_stanza", "attention", "fp8"]
    for parts in gpu_parts.CHAPTERS.values():
        assert seconds(parts, "limit_s") <= gpu_parts.CHAPTER_S == 180
    found = [part.name for part in gpu_report.chosen(["enwik8", "training"], tiny=False)]
    assert found == ["enwik8", "vs_enwik8", "training"]


def test_the_calls_of_the_readme_answer_everything(gpu_report: Any) -> None:
    """Three calls of under ten minutes answer what must hold; the fourth has the rest."""
    import gpu_parts

    text = (BENCHMARKS / "README.md").read_text()
    calls = re.findall(r"^    python benchmarks/gpu_report.py (--parts .*)$", text, re.MULTILINE)
    given = [gpu_report.parse_arguments(call.split()) for call in calls]
    parts = [gpu_report.chosen(each.parts, tiny=False) for each in given]
    assert len(calls) == 4
    for each, called in zip(given, parts, strict=True):
        assert seconds(called, "estimate_s") <= each.budget_s <= 570
    answered = {part.name for called in parts[:3] for part in called}
    rest = {"optimizer", "generate", "startup", "vs_stanza_autotuned"}
    asked = {name for goal in gpu_parts.GOALS for name in goal.parts}
    assert asked - answered == rest <= {part.name for part in parts[3]}
    left = [part.name for part in gpu_parts.PARTS if not any(part in called for called in parts)]
    assert left == ["vs_stanza_fp8"]  # needs torchao


def test_parts_without_time_are_named(gpu_report: Any, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    words = ["--tiny", "--budget_s", "1", "--out", str(out), "--parts", "verse", "head"]
    assert gpu_report.run(gpu_report.parse_arguments(words))
    states = {name: one["state"] for name, one in json.loads(out.read_text())["parts"].items()}
    assert states == {"verse": "left out", "cross_entropy": "left out"}
    command = "    python benchmarks/gpu_report.py --parts verse cross_entropy\n"
    assert command in out.with_suffix(".md").read_text()


@pytest.mark.slow
def test_attention_ends_in_its_budget(gpu_report: Any) -> None:
    """What does not fit is named."""
    import attention

    found = attention.measure(tiny=True, budget_s=0.0)
    assert len(found["rows"]) == 1
    assert set(found["not_here"].values()) == {"no time was left"}
    assert all(row["right"] for row in attention.measure(tiny=True)["rows"])


@pytest.mark.slow
def test_only_the_attention_of_this_device_is_checked(gpu_report: Any) -> None:
    import gpu_checks

    rows = gpu_checks.attention(tiny=True)["rows"]
    assert {row["check"].partition(",")[0] for row in rows} == {"xla"}
    assert all(row["ok"] for row in rows)


@pytest.mark.slow
def test_exactness_at_a_small_size(gpu_report: Any) -> None:
    """On a CPU nothing is chosen by timing."""
    import gpu_checks

    found = gpu_checks.exactness(tiny=True)
    assert [row["ok"] for row in found["rows"]] == [True] * 4
    assert found["choices_kept"] == 0


@pytest.mark.slow
def test_a_part_that_hangs_or_fails_is_reported(gpu_report: Any) -> None:
    hangs = gpu_report.run_part(
        gpu_report.PARTS[0], tiny=True, limit_s=0.05, environment=dict(os.environ)
    )
    assert (hangs["state"], "ended after" in hangs["said"]) == ("failed", True)
    fails = gpu_report.run_part(
        gpu_report.PARTS[0],
        tiny=True,
        limit_s=100.0,
        environment=os.environ | {"JAX_PLATFORMS": "nothing"},
    )
    assert (fails["state"], "Error" in fails["said"]) == ("failed", True)


def test_the_page_tells_what_holds(gpu_report: Any) -> None:
    rows = [{"model": "verse", "of the matmul rate": 0.5, "idle": 0.002}]
    parts = {
        "verse": {"state": "done", "seconds": 1.0, "rows": rows},
        "stanza": {"state": "left out"},
        "epic": {"state": "failed", "said": "no memory"},
    }
    page = gpu_report.page(
        {
            "gpu": "NVIDIA H200",
            "date": "2026-01-01",
            "commit": "abc",
            "tiny": False,
            "seconds": 1.0,
            "parts": parts,
        }
    )
    assert "| verse: of the matmul rate | at least 0.52 | 0.5 | NO |" in page
    assert "| verse: idle | at most 0.01 | 0.002 | yes |" in page
    assert "| stanza: of the matmul rate | at least 0.62 |  | not measured |" in page
    assert "| stanza | left out |" in page
    assert "no memory" in page


def test_the_worst_figure_of_several_parts_counts(gpu_report: Any) -> None:
    """The fastest of torch is the one to beat, also with kernels that took longer to find."""

    def best(ratio: float) -> dict[str, Any]:
        return {"rows": [{"who": "torch.compile", "ours is faster by": 9.0}, best_row(ratio)]}

    def best_row(ratio: float) -> dict[str, Any]:
        return {"who": "best of torch", "ours is faster by": ratio}

    parts = {"vs_verse": best(1.2), "vs_verse_autotuned": best(1.05)}
    parts["stanza"] = {"rows": [{"model": "stanza", "plan is off by": -0.06}]}
    found = {row["goal"]: (row["measured"], row["holds"]) for row in gpu_report.goals(parts)}
    assert found["verse against the best of torch"] == (1.05, "NO")
    assert found["stanza: the plan of the step's time"] == (-0.06, "NO")
    assert found["verse: the plan of the step's time"] == (None, "not measured")


def test_plans_are_compared_only_on_gpus_that_they_know(
    gpu_report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verse's step on an H200 takes 129 ms; the plan is near."""
    import programs

    case, step = programs.CASES["verse"], object.__new__(programs.TrainStep)
    made = programs.trainer(case.flags, case.vocab_size)
    step.run, step.config = made.run, made.model.config
    step.program = programs.program_of(
        *(step.config, step.run, jax.devices()[:1], Machine(1, 1, 2**40))
    )
    assert step.planned_s is None
    del step.planned_s
    h200 = described_gpu("NVIDIA H200")
    monkeypatch.setattr(programs, "described_gpu", lambda kind: h200)
    assert step.planned_s == pytest.approx(0.129, rel=0.15)


@pytest.mark.slow
def test_the_cost_of_exactness_is_that_of_other_sums(gpu_report: Any) -> None:
    import train_step

    (row,) = train_step.exact_sums(tiny=True)["rows"]
    assert row["exactness costs"] == pytest.approx(row["by atomics is faster by"] - 1)


class Answers:
    """A worker that gives the losses of a contestant, or fails if it has none."""

    def __init__(self, *losses: float, error: str = "") -> None:
        self.losses, self.error = list(losses), error

    def ask(self, method: str, *given: Any) -> list[float]:
        assert method == "losses"
        if self.error:
            raise RuntimeError(f"Traceback:\n{self.error}\n")
        return self.losses


def test_a_contestant_that_fails_leaves_the_race(gpu_report: Any) -> None:
    """The others go on; one that differs, or that nobody could run, is no answer."""
    import vs_pytorch

    workers = {
        "consyn_jax": Answers(2.0, 1.0),
        "eager": Answers(2.0, 1.001),
        "compiled": Answers(2.0, 1.1),
        "fused_loss": Answers(2.0, math.nan),
        "max_autotune": Answers(error="OutOfMemoryError: no memory"),
        "fp8": Answers(error="ModuleNotFoundError: No module named 'torchao'"),
    }
    losses, absent = vs_pytorch.compare_losses(workers, 0.01, math.inf)
    assert list(losses) == ["consyn_jax", "eager"]
    assert absent["compiled"] == "its losses are 1.0e-01 apart from ours"
    assert absent["fused_loss"] == "its losses are inf apart from ours"
    rows = {name: vs_pytorch._absent("verse", name, note) for name, note in absent.items()}
    assert {name for name, row in rows.items() if row.get("ok") is False} == {
        "compiled",
        "fused_loss",
        "max_autotune",
    }
    assert rows["max_autotune"]["note"] == "OutOfMemoryError: no memory"
    _, late = vs_pytorch.compare_losses(workers, 0.01, until=0.0)
    assert set(late.values()) == {"no time was left"}


def test_a_race_has_as_many_rounds_as_its_time_allows(
    gpu_report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vs_pytorch

    class Steady:
        """A contestant that takes a second for a step."""

        now = 0.0

        def ask(self, method: str, who: str, steps: int) -> float:
            Steady.now += steps
            return 0.0

    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(f"time.{clock}", lambda: Steady.now)
    workers = {"consyn_jax": Steady(), "eager": Steady()}
    # Two steps of each take 4 s; a round is 4 s, and the first one warms up.
    for ends, rounds in ((4 + 16, 3), (4, 1), (math.inf, 5)):
        Steady.now = 0.0
        steps, turns, _ = vs_pytorch.timed(workers, 5, 2.0, ends)
        assert (steps, [len(each) for each in turns.values()]) == (2, [rounds, rounds])
        assert set(turns["eager"]) == {2.0}


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    ("case", "way"), [("tiny", "eager"), ("tiny", "fused_loss"), ("tiny, muon", "eager")]
)
def test_torch_takes_our_steps(
    gpu_report: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str, way: str
) -> None:
    """A rate at which the first losses depend on the updates; nothing is compiled in torch."""
    import programs
    import vs_pytorch

    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    flags = programs.CASES[case].flags | {"warmup_steps": 0, "lr": 0.02}
    ours = vs_pytorch.Ours(flags, programs.CASES[case].vocab_size, tmp_path)
    theirs = vs_pytorch.Torch(ours.facts, tmp_path)
    losses = ours.losses("", 8)
    assert losses[-1] < losses[0] - 0.5
    assert vs_pytorch.apart(theirs.losses(way, 8), losses) < 1e-5


def test_idle_time_is_read_from_a_trace(gpu_report: Any) -> None:
    import train_step

    def kernel(name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": ts, "dur": dur}

    meta = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {
            "ph": "M",
            "name": "thread_name",
            "pid": 1,
            "tid": 1,
            "args": {"name": "Stream #13(Compute)"},
        },
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "XLA Ops"}},
    ]
    events = [
        *meta,
        kernel("a", 0, 40),
        kernel("b", 30, 30),
        kernel("a", 80, 20),
        kernel("fusion", 0, 100, tid=2),
    ]
    found = train_step.kernel_times(events, steps=2)
    assert found["idle"] == pytest.approx(0.2)
    assert found["kernels_ms"] == {"a": 0.03, "b": 0.015}
    assert train_step.kernel_times(meta, steps=2) == {}
