import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from consyn_jax.errors import UserError
from consyn_jax.training.diagnostics import profile
from consyn_jax.training.diagnostics.profile import CompiledStep, Profile, page
from consyn_jax.training.diagnostics.trace import STEP, LargeOperation, Least, Summary
from consyn_jax.validation import parse_profile_steps

pytestmark = pytest.mark.users_compiler


def test_the_page_has_the_achieved_rate_and_the_shares_of_time() -> None:
    summary = Summary(
        "gpu:0",
        2,
        2.0,
        1.5,
        {"host": 0.5},
        {"mlp": 1.2, "head": 0.4, "collectives": 0.0},
        (
            LargeOperation("fusion.7", "mlp", 0.8, 48, Least(0.5, 0.4, 0.45)),
            LargeOperation("copy.3", "other", 0.1, 2, None),
        ),
        {"mlp": Least(0.9, 0.8, 0.5), "head": Least(0.3, 0.1, 0.3)},
        0.71,
    )
    text = page(summary, CompiledStep(str, 400e12, "NVIDIA H200"), (10, 11))
    assert "Steps 10 to 11 on gpu:0, 1,000.0 ms each." in text
    assert re.search(r"achieved +400 TFLOP/s: 40.4% of the device's peak of 989 TFLOP/s", text)
    assert re.search(r"busy +75.0%\n +idle +25.0%  \(host 25.0%\)", text)
    assert re.search(r"mlp +75.0% +600.00 ms per step; at least 450.00 ms, bound by comp", text)
    assert re.search(r"head +25.0% +200.00 ms per step; at least 150.00 ms, bound by memory", text)
    assert re.search(r"collectives +0.0% +0.00 ms per step; 71% of it overlaps other", text)
    assert "mlp loses the most time: 150.00 ms per step, because its matmuls run below the" in text
    assert re.search(
        r"The 2 largest kernels:\n +50.0% +400.00 ms in 24 per step; at least 250.00 ms, bound by "
        r"memory  fusion.7 \(mlp\)\n +6.2% +50.00 ms in 1 per step  copy.3 \(other\)",
        text,
    )


@pytest.mark.parametrize("text", ["", "3", "5:3", "0:3", "a:b", "1:2:3", "-1:2", "1.5:2", "٣:٤"])
def test_impossible_steps_are_refused(text: str) -> None:
    with pytest.raises(
        UserError, match="--profile_steps must be the first and the last step to trace"
    ):
        parse_profile_steps(text)


class Profiled:
    def __init__(self, steps: tuple[int, int] | None, path: Path) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.profile = Profile(steps, path, self.notes.append, self.warnings.append)

    def run(self, steps: int) -> None:
        """Run steps of a small program, and end the run."""
        with jax.named_scope("mlp"):
            compiled = jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((64, 64))).compile()
        self.profile.program = CompiledStep(compiled.as_text, 2.0 * 64**3, "cpu")
        x = jnp.ones((64, 64))
        for number in range(1, steps + 1):
            with self.profile.step(number, x):
                x = compiled(x)
            self.profile.ended(number, x)
        self.profile.close()


@pytest.fixture
def no_trace_left() -> Iterator[None]:
    yield
    with pytest.raises(RuntimeError):
        jax.profiler.stop_trace()


@pytest.mark.parametrize(
    ("asked", "steps"), [((2, 3), "2 to 3"), ((4, 9), "4 to 5")], ids=["inside", "beyond the end"]
)
def test_the_requested_steps_are_traced(
    asked: tuple[int, int], steps: str, tmp_path: Path, no_trace_left: None
) -> None:
    profiled = Profiled(asked, tmp_path)
    profiled.run(5)
    assert profiled.warnings == []
    assert f"Steps {steps} on " in (tmp_path / "summary.txt").read_text()
    assert profiled.notes[0].startswith(f"Steps {steps} on ")
    assert str(tmp_path / "summary.txt") in profiled.notes[-1]
    [trace] = tmp_path.rglob("*.xplane.pb")
    events = [
        event
        for plane in ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    assert [dict(event.stats)["step_num"] for event in events if event.name == STEP] == list(
        range(asked[0], min(asked[1], 5) + 1)
    )


def test_steps_that_are_never_run_are_reported(tmp_path: Path) -> None:
    profiled = Profiled((7, 8), tmp_path / "profile")
    profiled.run(5)
    assert profiled.notes == ["No step of --profile_steps 7:8 was run, so there is no profile."]
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("where", ["start_trace", "stop_trace", "page"])
def test_a_failing_profiler_is_reported_once_and_steps_continue(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_trace_left: None
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        if where == "stop_trace":
            real()
        raise OSError("no space left on device")

    real = jax.profiler.stop_trace
    monkeypatch.setattr(*((profile, "page") if where == "page" else (jax.profiler, where)), fail)
    profiled = Profiled((2, 3), tmp_path)
    profiled.run(5)
    assert profiled.warnings == [
        "Profiling failed; the run continues. OSError: no space left on device"
    ]
    assert profiled.notes == []
    monkeypatch.undo()


def test_without_profile_steps_nothing_is_traced(tmp_path: Path) -> None:
    profiled = Profiled(None, tmp_path / "profile")
    profiled.run(2)
    assert (profiled.notes, profiled.warnings, (tmp_path / "profile").exists()) == ([], [], False)
