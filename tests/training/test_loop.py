"""The order of side effects after a step, with a model, data and files that are not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax.numpy as jnp
import pytest

from consyn_jax.errors import Interrupted
from consyn_jax.training import loop
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.loop import Training
from consyn_jax.training.run.step_end import StepEnd
from consyn_jax.training.step import TrainState


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    """A run at step 5 of 10, whose clock goes on by a second each time it is read."""
    run = Training.__new__(Training)
    run.inputs, run.program, run.facts = Mock(), Mock(), Mock()
    run.recorder, run.report, run.console = Mock(), Mock(), Mock()
    run.watchdog, run.directory, run.checkpoints = Mock(), Mock(), Mock()
    run.coordinator = Mock(stop_signal=None, ends_now=False)
    run.progress, run.total_steps, run.writes = Progress(step=5), 10, True
    run.path, run.base, run.state = Path("run"), {}, None
    run.inputs.files.load.return_value = {}
    ticks = iter(range(100, 200))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    return run


STATE = TrainState(jnp.int32(5), {}, (), jnp.int32(0))
AT_END, SAVE, EVALUATE = {"save": True, "last": True}, {"save": True}, {"evaluate": True}


@pytest.mark.parametrize(
    ("due", "told", "happens"),
    [
        (EVALUATE, "", "evaluate"),
        (EVALUATE, "early", "evaluate, save, early stop, end"),
        (SAVE, "", "save"),
        (SAVE, "early", "save"),  # known only after an evaluation
        ({"stop": True}, "signal", "save, interrupt"),
        ({"stop": True}, "callback", "stop, save, end"),
        (EVALUATE, "signal", "evaluate, save, interrupt"),  # it came after the step was planned
        (EVALUATE, "early signal", "evaluate, save, early stop, end"),
        (AT_END, "", "save, end"),
        (AT_END, "signal", "save, end"),
        (AT_END, "callback", "save, end"),
        (AT_END | EVALUATE, "early", "evaluate, save, end"),
    ],
)
def test_what_happens_at_the_end_of_a_step(
    due: dict[str, bool],
    told: str,
    happens: str,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        return lambda *_: done.append(name)

    decisions = loop.after_evaluation
    monkeypatch.setattr(decisions, "stops_early", lambda *_: "early" in told)
    monkeypatch.setattr(decisions, "record_stop", note("stop"))
    monkeypatch.setattr(decisions, "record_early_stop", note("early stop"))
    monkeypatch.setattr(training, "_evaluate", lambda state: done.append("evaluate") or state)
    monkeypatch.setattr(training, "_save", note("save"))
    training.coordinator.ends_now = "callback" in told
    training.coordinator.stop_signal = "SIGTERM" if "signal" in told else None
    interrupted = Interrupted("SIGTERM")
    monkeypatch.setattr(loop.ending, "interruption", lambda *_: interrupted)
    try:
        found, is_over = training._end_step(STATE, StepEnd(**due))
        assert found is STATE
        done += ["end"] * is_over
    except Interrupted:
        done.append("interrupt")
    assert ", ".join(done) == happens
    # The clock is read when this begins and when it ends.
    training.recorder.stopwatch.pause.assert_called_once_with(1.0)


@pytest.mark.parametrize(
    ("step", "has_tokenizer", "has_time", "samples"),
    [
        (5, True, True, True),
        (10, True, True, False),
        (5, False, True, False),
        (5, True, False, False),
    ],
)
def test_a_sample_follows_an_evaluation_if_there_is_time(
    step: int,
    has_tokenizer: bool,
    has_time: bool,
    samples: bool,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end of the run makes the last one."""
    drawn: list[Any] = []
    monkeypatch.setattr(loop.ending, "sample", lambda *about: drawn.append(about) or "text")
    training.progress.step = step
    training.inputs.tokenizer = "tokenizer" if has_tokenizer else None
    training.inputs.run.budget.seed = 7
    training.report.time_for_sample = lambda: "yes" if has_time else ""
    training._sample_in_time({})
    program = training.program
    expected = [(program.config, program.whole.return_value, "tokenizer", 7)]
    assert drawn == (expected if samples else [])
    if samples:
        training.report.add_sample.assert_called_once_with("text", 1.0)


@pytest.mark.parametrize(("best_step", "step"), [(3, 3), (None, 5)])
def test_the_best_model_is_exported_with_its_own_step(
    best_step: int | None, step: int, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export of an older version does not say its step."""
    monkeypatch.setattr(loop.ending, "best_model", lambda *_: Path("run/best"))
    training.progress.selection.best_step = best_step
    params = training.inputs.files.load.return_value
    assert training._final_params(STATE) == (params, step)
    program = training.program
    training.inputs.files.load.assert_called_once_with(
        Path("run/best"), program.config, program.mesh
    )


@pytest.mark.parametrize("has_facts", [True, False])
def test_an_export_has_the_facts_of_its_step(
    has_facts: bool, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = Mock()
    monkeypatch.setattr(loop, "export_model", export)
    training.inputs.run.saving.save_dtype = "bfloat16"
    facts, training.facts = training.facts, training.facts if has_facts else None
    training._export("best", {}, 3)
    config = training.program.config.saved_as
    config.assert_called_once_with("bfloat16")
    *about, of_model, save = export.call_args.args
    parts = training.inputs.tokenizer, training.checkpoints.before_commit
    assert about == [Path("run/best"), config.return_value, {}, *parts]
    assert save is training.inputs.files.save
    assert (of_model is not None) == has_facts
    if has_facts:
        of_model("files")
        facts.of_model.assert_called_once_with(3, "files")


def test_the_newest_parameters_are_those_of_a_state_that_is_still_there(training: Training) -> None:
    """A step takes over the arrays of the state before it."""
    training.evaluation_params = lambda _, params: params
    assert training.newest_params() is None
    params = {"w": jnp.ones(2)}
    training.state = STATE._replace(params=params)
    assert training.newest_params() is params
    params["w"].delete()
    assert training.newest_params() is None
