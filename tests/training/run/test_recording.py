"""What a step leaves in the log, on the screen and with the adviser."""

import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest

from consyn_jax.data.mixture import Mixture
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.logging.advice import Advice, Adviser, ProcessUsage, RunSettings, Usage
from consyn_jax.training.logging.clock_watch import ClockWatch
from consyn_jax.training.logging.console import Console
from consyn_jax.training.logging.live.activities import ACTIVITIES, key
from consyn_jax.training.logging.loss_spikes import LossSpikeDetector
from consyn_jax.training.logging.metrics import MetricsLog, read_metrics
from consyn_jax.training.logging.stopwatch import Stopwatch
from consyn_jax.training.logging.tracking.callbacks import Callbacks
from consyn_jax.training.optim.schedules import Plateau
from consyn_jax.training.run import recording
from consyn_jax.training.run.recording import Lengths, Recorder, memory_stats
from consyn_jax.training.step import TrainState

SETTINGS = RunSettings(10, 0, 0.1, 1.0, 4, 1, "none", None, None)
Made = Callable[..., Recorder]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Made]:
    """Make the recorder of a run of 10 steps of 4 sequences, with a line of metrics each 4 steps."""
    with MetricsLog(tmp_path) as log:

        def made(order: Any = None, **progress: Any) -> Recorder:
            adviser = Mock(spec=Adviser)
            for rule in ("line", "evaluation", "processes", "spike"):
                getattr(adviser, rule).return_value = []
            return Recorder(
                Progress(**{"adviser": adviser} | progress),
                Lengths(10, 4, 4, 16, order),
                Mock(spec=Console),
                log,
                Mock(spec=Callbacks),
                {},
                lambda updates: 0.25 * updates,
                SETTINGS,
            )

        yield made


def values(**changes: float) -> dict[str, float]:
    step = {"tokens": 8.0, "loss": 2.0, "grad_norm": 0.5, "updates": 3.0, "clipped": 0.0}
    return step | changes


def lines(path: Path, *keys: str) -> list[list[Any]]:
    return [
        [line[name] for name in keys] for line in read_metrics(path / "metrics.jsonl")
        if keys[-1] in line
    ]  # fmt: skip


def test_a_line_counts_the_steps_since_the_last_one(make: Made, tmp_path: Path) -> None:
    """At the first step, at each fourth, and at the last."""
    recorder = make()
    for clipped in (1, 0, 1, 1, 1, 1, 1, 0, 0, 1):
        step = values(clipped=float(clipped))
        recorder.count(step)
        recorder.step(step, 0.0)
    names = ("step", "tokens", "train/epoch", "train/clipped_fraction")
    assert lines(tmp_path, *names) == [
        [1, 8, 0.25, 1.0],
        [4, 32, 1.0, 2 / 3],
        [8, 64, 2.0, 0.75],
        [10, 80, 2.5, 0.5],
    ]
    console, callbacks = recorder.console, recorder.callbacks
    assert isinstance(console, Mock)
    assert isinstance(callbacks, Mock)
    calls = [call.args for call in console.step.call_args_list]
    assert [call[:2] for call in calls] == [(step, 2.0) for step in range(1, 11)]
    assert all(tokens_per_s > 0 for _, _, tokens_per_s, *_ in calls)
    shown = [call[3:] for call in calls]
    assert [bool(line) for line in shown] == [step in (1, 4, 8, 10) for step in range(1, 11)]
    advice = recorder.progress.adviser.line
    assert isinstance(advice, Mock)
    judged = [call.args for call in advice.call_args_list]
    losses = recorder.progress.recent.losses
    assert [call[:2] for call in judged] == [(1, 1.0), (4, 2 / 3), (8, 0.75), (10, 0.5)]
    assert judged[-1][2:] == (losses, recorder._usage(shown[-1][0]), SETTINGS)
    told = [call.args[0] for call in callbacks.step.call_args_list]
    assert told == read_metrics(tmp_path / "metrics.jsonl")
    assert callbacks.tick.call_count == 10
    assert recorder.summary() == {**shown[-1][0], "step": 10, "tokens": 80}


@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_values_of_a_step_are_logged_if_they_are_finite(
    scale: float | None, make: Made, tmp_path: Path
) -> None:
    plateau = None if scale is None else Mock(spec=Plateau, scale=scale)
    recorder = make(plateau=plateau)
    more = {"part/loss": 7.0, "skipped": 1.0, "loss_scale": 128.0, "skipped_steps": 3.0}
    step = values(grad_norm=float("inf"), other=5.0, **more)
    recorder.count(step)
    recorder.stopwatch = Stopwatch(step_flops=1e6, peak_flops=1e12)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recorder.step(step, 0.0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["train/learning_rate"] == 0.25 * 3 * (scale or 1.0)
    assert line["throughput/mfu"] * line["throughput/step_time_s"] == pytest.approx(1e-6)
    assert 1024 * before <= line["memory/peak_bytes"] <= 1024 * after
    assert {name: value for name, value in line.items() if name.startswith("train/")} == {
        "train/loss": 2.0,
        "train/learning_rate": line["train/learning_rate"],
        "train/clipped_fraction": 0.0,
        "train/part/loss": 7.0,
        "train/loss_scale": 128.0,
        "train/skipped_steps": 3.0,
        "train/epoch": 0.25,
    }
    assert {key(name) for name in ACTIVITIES} <= line.keys()


class Two:
    """Sources of 10 and of 6 sequences, of which the second is read half as often."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def at(self, positions: Any) -> Any:
        raise AssertionError

    def passes(self, position: int) -> dict[str, int]:
        return dict(zip(self.names, (position // 10, position // 12), strict=False))


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("names", [("",), ("a", "b")])
def test_each_epoch_of_each_source_is_recorded_at_the_step_in_which_it_ends(
    names: tuple[str, ...], resumed: bool, make: Made, tmp_path: Path
) -> None:
    recorder = make(Two(*names))
    recorder.ended_passes()  # before the first step
    for recorder.progress.step in range(1, 7):
        recorder.ended_passes(resumed=resumed)
    found = read_metrics(tmp_path / "metrics.jsonl")
    ends = [(line["step"], line.get("source", ""), line["epoch"]) for line in found]
    assert all(("source" in line) == (names != ("",)) for line in found)
    wanted = [(3, names[0], 1), (3, "b", 1), (5, names[0], 2), (6, "b", 2)]
    assert ends == [end for end in wanted if end[1] in names]
    assert isinstance(recorder.console, Mock)
    said = [call.args[0] for call in recorder.console.note.call_args_list]
    notes = [f"End of {n}: epoch {e}" if n else f"Epoch {e}" for s, n, e in ends]
    steps = [step for step, *_ in ends]
    wanted_notes = [f"{n} is over at step {s}." for n, s in zip(notes, steps, strict=True)]
    assert said == ([] if resumed else wanted_notes)


def test_several_epochs_may_end_in_one_step(make: Made, tmp_path: Path) -> None:
    recorder = make(Mock(spec=Two, passes=lambda position: {"": position // 2}))
    recorder.progress.step = 2
    recorder.ended_passes()
    assert lines(tmp_path, "step", "epoch") == [[2, 3], [2, 4]]


def test_a_checkpoint_and_the_end_have_the_sequences_of_each_source(
    make: Made, tmp_path: Path
) -> None:
    mixture = Mock(spec=Mixture)
    mixture.counts = lambda position: {"a": position}
    recorder = make(mixture)
    recorder.progress.step = 5
    recorder.save()
    assert lines(tmp_path, "event", "step", "sources") == [["save", 5, {"a": 20}]]
    assert make(Two("")).sources_taken() == {}


def test_a_step_without_a_target_is_said_once_and_is_no_spike(make: Made) -> None:
    recent = Mock(spec=LossSpikeDetector, losses=[], **{"update.return_value": None})
    recorder = make(recent=recent)
    for step in (values(), values(tokens=0.0), values(tokens=0.0), values(loss=float("nan"))):
        recorder.count(step)
        recorder.step(step, 0.0)
    assert isinstance(recorder.console, Mock)
    (said,) = recorder.console.warn.call_args_list
    assert said.args[0].startswith("Step 2 had no token to learn from.")
    assert [call.args for call in recent.update.call_args_list] == [(2.0,)]


def test_a_spike_is_recorded_with_what_is_usual(make: Made, tmp_path: Path) -> None:
    recorder = make(recent=Mock(spec=LossSpikeDetector, losses=[], **{"update.return_value": 1.5}))
    advice = recorder.progress.adviser.spike
    assert isinstance(advice, Mock)
    advice.return_value = [Advice("rate", "Lower it.")]
    recorder.count(values())
    recorder.step(values(), 0.0)
    assert lines(tmp_path, "event", "loss", "usual") == [["loss_spike", 2.0, 1.5]]
    advice.assert_called_once_with(1, SETTINGS)
    assert lines(tmp_path, "event", "about", "sentence") == [["advice", "rate", "Lower it."]]
    assert isinstance(recorder.console, Mock)
    assert recorder.console.note.call_args.args == ("Lower it.",)


def test_an_evaluation_is_recorded_and_judged_by_its_loss(make: Made, tmp_path: Path) -> None:
    recorder = make()
    advice = recorder.progress.adviser.evaluation
    assert isinstance(advice, Mock)
    line = recorder.evaluation({"eval/accuracy": 0.5})
    assert not advice.called
    recorder.evaluation({"eval/loss": 3.0})
    advice.assert_called_once_with(0, 3.0, [], SETTINGS)
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == line
    assert recorder.last == {"eval/accuracy": 0.5, "eval/loss": 3.0}


def test_advice_is_by_the_time_since_the_first_line(make: Made) -> None:
    recorder = make()
    spent = {name: float(1 << number) for number, name in enumerate(ACTIVITIES)}
    recorder.clocks = Mock(spec=ClockWatch, **{"throttled.return_value": "hot"})
    recorder.writes = lambda: [(5, 2.0)]
    first = {key(name): 1.0 for name in ACTIVITIES}
    recorder._usage(first)
    recorder._memory = {"bytes_limit": 100, "peak_bytes_in_use": 80}
    later = {key(name): 1.0 + seconds for name, seconds in spent.items()}
    usage = recorder._usage(later | {"throughput/mfu": 0.25})
    assert usage == Usage(63.0, 2.0, 4.0, 8.0, 0.8, 0.25, [(5, 2.0)], "hot")


def test_processes_are_compared(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = make()
    monkeypatch.setattr(recording, "gather", lambda text: [text, text.replace("7.0", "9.0")])
    recorder._compare_processes(Usage(7.0, 2.0, 0.0, 0.0, None, throttled="hot"))
    mine, theirs = (ProcessUsage(socket.gethostname(), s, 2.0, "hot") for s in (7.0, 9.0))
    advice = recorder.progress.adviser.processes
    assert isinstance(advice, Mock)
    advice.assert_called_once_with(0, [mine, theirs])


@pytest.mark.parametrize("processes", [1, 2])
def test_only_processes_are_compared_now_and_then(
    processes: int, make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(recording, "COMPARED", 2)
    compared = Mock()
    monkeypatch.setattr(Recorder, "_compare_processes", compared)
    recorder = make()
    for _ in range(10):
        recorder.count(values())
        recorder.step(values(), 0.0)
        assert compared.call_count == (processes == 2 and recorder.progress.step >= 8)


@pytest.mark.parametrize("is_wanted", [True, False])
def test_callbacks_get_an_evaluation_with_histograms_if_they_are_wanted(
    is_wanted: bool, make: Made
) -> None:
    recorder, line = make(), {"step": 1, "eval/loss": 2.0}
    state = TrainState(jnp.int32(1), {}, (), jnp.int32(0))
    told = recorder.callbacks = Mock(spec=Callbacks, run=Mock(histograms={"older": 1}))
    recorder.histograms = (lambda given: {"same": given is state}) if is_wanted else None
    recorder.tell_evaluation(line, state)
    assert told.run.histograms == ({"same": True} if is_wanted else {"older": 1})
    told.evaluate.assert_called_once_with(line)


def test_the_log_reaches_the_disk(make: Made) -> None:
    recorder = make()
    recorder.log = log = Mock(spec=MetricsLog)
    recorder.flush()
    assert log.flush.called
    recorder.log = None
    recorder.flush()


@pytest.mark.parametrize("found", [{"bytes_limit": 100}, None])
def test_the_memory_is_that_of_the_first_device(
    found: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [Mock(**{"memory_stats.return_value": each}) for each in (found, {"bytes_limit": 7})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_stats() == (found or {})


def test_a_new_run_has_counted_nothing() -> None:
    new = Progress()
    counted = (new.step, new.tokens, new.clipped, new.unlogged, new.left_out)
    assert counted == (0, 0, 0, 0, 0)
