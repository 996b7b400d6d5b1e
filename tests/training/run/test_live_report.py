"""The page of a run while it runs: written in time, never in the way."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from consyn_jax.files import write_whole
from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.logging.advice import RunSettings
from consyn_jax.training.logging.console import Console
from consyn_jax.training.logging.metrics import MetricsLog
from consyn_jax.training.logging.run_page import Status
from consyn_jax.training.logging.tracking.callbacks import Callbacks
from consyn_jax.training.run import live_report
from consyn_jax.training.run.directory import RunDirectory
from consyn_jax.training.run.live_report import SAMPLES, LiveReport, read_samples
from consyn_jax.training.run.recording import Lengths, Recorder


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Said(Console):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


Opened = Callable[..., tuple[LiveReport, Recorder, Clock, Said]]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Opens the report of a run at a step."""
    with ExitStack() as stack:

        def make(step: int = 4) -> tuple[LiveReport, Recorder, Clock, Said]:
            said, clock = Said(), Clock()
            lengths = Lengths(12, 1, 4, None, None)
            log = stack.enter_context(MetricsLog(tmp_path))
            progress = Progress(step=step, tokens=10 * step)
            settings = RunSettings(12, 0, 0.1, 1.0, 4, 1, "none", None, None)
            recorder = Recorder(
                progress, lengths, said, log, Callbacks(), {}, lambda step: 0.1, settings
            )
            directory = RunDirectory(tmp_path, False, RunRecord.new())
            return LiveReport(directory, recorder, {}, {}, clock=clock), recorder, clock, said

        yield make


def page(path: Path) -> str:
    return (path / "report.html").read_text()


def test_a_page_is_left_out_where_pages_would_take_too_long(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _, clock, _ = opened()
    written = []

    def slowly(path: Path, content: bytes) -> None:
        written.append(clock.now)
        clock.now += 1.0
        write_whole(path, content)

    monkeypatch.setattr("consyn_jax.training.logging.run_page.write_whole", slowly)
    report.refresh()
    for _ in range(50):
        clock.now += 10.0
        report.refresh()
        report.tick()
    assert len(written) in (3, 4), "0.5 % of 500 seconds, and the first"
    report.finish()
    assert "<b>Complete</b>" in page(tmp_path)


def test_a_minute_old_page_is_renewed_after_a_step(opened: Opened, tmp_path: Path) -> None:
    report, recorder, clock, _ = opened()
    report.refresh()
    recorder.progress.step = 5
    recorder.event("save")
    clock.now += 59
    report.tick()
    assert "step 0 of 12" in page(tmp_path)
    clock.now += 1
    report.tick()
    assert "step 5 of 12" in page(tmp_path)
    assert '"alive":true' in page(tmp_path)


@pytest.mark.parametrize(
    ("event", "details", "words"),
    [
        ("signal", {"signal": "SIGINT"}, "Stopped by SIGINT"),
        ("nonfinite", {"action": "halt"}, "Diverged"),
        ("save", {}, "Ended without a record"),
    ],
)
def test_the_last_page_says_how_the_run_ended(
    event: str, details: dict[str, Any], words: str, opened: Opened, tmp_path: Path
) -> None:
    report, recorder, _, _ = opened()
    report.refresh()
    assert "<b>Running</b>" in page(tmp_path)
    recorder.event(event, details)
    report.close()
    assert f"<b>{words}</b>" in page(tmp_path)
    assert '"alive":false' in page(tmp_path)
    report.finish()
    report.close()
    assert "<b>Complete</b>" in page(tmp_path), "nothing is written after the end"


def test_a_complete_page_stays(opened: Opened, tmp_path: Path) -> None:
    report, recorder, _, _ = opened()
    report.finish()
    assert '"alive":false' in page(tmp_path)
    recorder.event("signal", {"signal": "SIGINT"})
    report.close()
    assert "<b>Complete</b>" in page(tmp_path)


def test_an_ended_page_stays(opened: Opened, tmp_path: Path) -> None:
    report, recorder, _, _ = opened()
    report.close()
    before = page(tmp_path)
    recorder.event("signal", {"signal": "SIGINT"})
    report.close()
    assert page(tmp_path) == before


def test_a_page_has_all_about_the_run(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest time between two versions tells its reader when to worry."""
    _, recorder, clock, _ = opened()
    written = Mock()
    monkeypatch.setattr(live_report, "write_report", written)
    recorder.last = {"train/loss": 2.0}
    facts: Any = ({"lr": 1.0}, {"lr": "flag"}, [("model", "haiku")])
    directory = RunDirectory(tmp_path, False, RunRecord.new())
    report = LiveReport(directory, recorder, *facts, left_s=lambda: 90.0, clock=clock)
    report.add_sample("text")
    for seconds in (50.0, 400.0, 30.0):
        clock.now += seconds
        report.refresh()
    report.finish()
    ((*place, samples, _), more) = written.call_args_list[1]
    assert (place, samples) == ([tmp_path, recorder.history, {"lr": 1.0}], [(4, "text")])
    assert more == {
        "summary": recorder.summary(),
        "activities": recorder.activities.values,
        "origins": {"lr": "flag"},
        "about": [("model", "haiku")],
    }
    states = [call.args[-1] for call in written.call_args_list]
    assert states == [
        Status("running", True, 12, 90.0, 50.0),
        Status("running", True, 12, 90.0, 400.0),
        Status("running", True, 12, 90.0, 400.0),
        Status("complete", False, 12, None, 400.0),
    ]


def test_a_page_that_cannot_be_written_is_said_once(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("consyn_jax.training.logging.run_page.write_whole", refuse)
    monkeypatch.setattr(live_report, "write_whole", refuse)
    report, _, clock, said = opened()
    for _ in range(3):
        report.refresh()
        report.add_sample("text")
        clock.now += 1000
    assert said.warnings == [
        "report.html could not be written (No space left on device); the run goes on, and "
        "metrics.jsonl has its numbers."
    ]


def test_samples_are_kept_over_a_resume_without_those_after_its_step(
    opened: Opened, tmp_path: Path
) -> None:
    report, recorder, _, _ = opened()
    for step in (4, 8, 12):
        recorder.progress.step = step
        report.add_sample(f"<text> {step}")
    again, _, _, said = opened(step=8)
    assert [line["step"] for line in again.samples] == [4, 8]
    again.add_sample("another 8")
    again.refresh()
    assert [(line["step"], line["text"]) for line in read_samples(tmp_path / SAMPLES)[0]] == [
        (4, "<text> 4"),
        (8, "another 8"),
    ]
    assert page(tmp_path).index("&lt;text&gt; 4") < page(tmp_path).index("another 8")
    assert said.warnings == []


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"step": 1}\n', "3\n", "\x00\n"])
def test_damaged_samples_are_said_and_left_out(
    content: str, opened: Opened, tmp_path: Path
) -> None:
    (tmp_path / SAMPLES).write_text(
        json.dumps({"step": 1, "tokens": 1, "text": ""}) + "\n" + content
    )
    report, _, _, said = opened()
    assert report.samples == []
    (warning,) = said.warnings
    assert warning.endswith(
        "samples.jsonl is damaged, so report.html does not show texts that were sampled before."
    )


def test_samples_take_a_share_of_the_time(opened: Opened) -> None:
    report, _, clock, _ = opened()
    assert report.time_for_sample()
    report.add_sample("compiled", took_s=20.0)
    assert not report.time_for_sample()
    clock.now += 190
    assert not report.time_for_sample()
    clock.now += 10
    assert report.time_for_sample(), "a tenth of 20 s is 1 % of 200 s"
    report.add_sample("", took_s=1.0)
    clock.now += 1
    assert report.time_for_sample()
    report.add_sample("", took_s=1.0)
    assert not report.time_for_sample()
    clock.now += 100
    assert report.time_for_sample()
