"""The report on a GPU, rehearsed without one: whatever a part does, the others go on, and the page
says what became of each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
def test_a_rehearsal_runs_all_parts(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu_report.py"),
        "--tiny",
        "--budget_s",
        "800",
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
    assert {part["state"] for part in report["parts"].values()} <= {"done", "absent"}
    names = ("model", "attention checks", "optimizers", "training", "verse", "vs_verse")
    for name in (*names, "vs_verse_documents"):
        assert report["parts"][name]["rows"], name
        assert f"## {name}" in out.with_suffix(".md").read_text()


def test_chapters_fit_a_short_slot_and_exactness_comes_first(gpu_report: Any) -> None:
    """Parts that share the GPU run at once; what is timed runs alone."""
    names = list(gpu_report.CHAPTERS)
    assert names[:6] == ["exactness", "verse", "stanza", "documents", "attention", "fp8"]
    for parts in gpu_report.CHAPTERS.values():
        together = [part.estimate_s for part in parts if part.gpu == "all"]
        alone = sum(part.estimate_s for part in parts if part.gpu != "all")
        assert alone + max(together, default=0.0) <= gpu_report.CHAPTER_S
    found = [part.name for part in gpu_report.chosen(["exactness", "fp8"], tiny=False)]
    assert found == ["exactness", "fp8", "logits"]


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
