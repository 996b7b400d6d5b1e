"""The resources of a run: what each is told, and what a signal means while they are closed."""

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest

from consyn_jax.errors import Interrupted, Unsaved
from consyn_jax.flags import flat
from consyn_jax.resolve import resolve
from consyn_jax.training import open_run as module
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.logging.console import Console
from consyn_jax.training.logging.tracking.callbacks import Callbacks
from consyn_jax.training.open_run import OpenRun, RunInputs, run_resources
from consyn_jax.training.run.directory import RunDirectory
from consyn_jax.training.runtime.watchdog import SAVING

RUN = resolve({"output": "runs/verse"})[0]


def stop() -> None:
    raise Unsaved(signal.SIGTERM)


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ({}, "the same command"),
        ({"overwrite": True}, "the same command without --overwrite"),
        ({"resume": "never"}, "the same command with --resume auto"),
    ],
)
def test_a_signal_after_the_end_of_a_run_does_not_say_that_nothing_is_saved(
    flags: dict[str, Any], command: str
) -> None:
    """The command that it names does not delete the run."""
    run = resolve({"output": "runs/verse"} | flags)[0]
    with pytest.raises(Interrupted) as stopped, run_resources(run) as stack:
        stack.callback(stop)
    assert str(stopped.value) == (
        "SIGTERM: the run in runs/verse is complete, but its last files may be incomplete. Run "
        f"{command} again to check them."
    )


def test_a_signal_before_the_end_of_a_run_stays_what_it_is() -> None:
    closed = []

    def work() -> None:
        with run_resources(RUN) as stack:
            stack.callback(lambda: closed.append(True))
            stop()

    with pytest.raises(Unsaved) as stopped:
        work()
    stopped.value.settle()
    assert closed == [True]


# ------------------------------------------------------------------------ what each part is told

RECORDS = ("MetricsLog", "ActivityClock", "RunView", "Recorder", "LiveReport")
PARTS = ("Watchdog", "Console", "RunMirror", "Profile", "Checkpoints", "Signals", "StopCoordinator")


CLASSES = {name: getattr(module, name) for name in (*PARTS, *RECORDS)}


def replaced(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Mock]:
    """Classes of the module that only record what they are told, by name."""
    parts = {}
    for name in names:
        instance = MagicMock(spec=CLASSES[name], name=name)
        if hasattr(instance, "__enter__"):
            instance.__enter__.return_value = instance
        parts[name] = Mock(return_value=instance)
        monkeypatch.setattr(module, name, parts[name])
    return parts


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Open a run with these flags; what its parts were told, by name."""

    def opened(*, writes: bool = True, **flags: Any) -> dict[str, Any]:
        parts: dict[str, Any] = replaced(monkeypatch, *PARTS)
        directory = Mock(spec=RunDirectory, path=Path("runs/verse"), is_adopted=False)
        directory.record, directory.checkpoints = "record", Path("runs/verse/checkpoints")
        parts["directory"] = Mock(return_value=directory)
        parts["remote"] = Mock(return_value=("copy", "fetch"))
        monkeypatch.setattr(module, "open_run_directory", parts["directory"])
        monkeypatch.setattr(module, "open_remote", parts["remote"])
        monkeypatch.setattr(module, "gather", lambda text: [text])
        monkeypatch.setattr(module, "current_process_group", lambda: "group")
        monkeypatch.setattr(module.jax, "process_index", lambda: 0 if writes else 1)
        run, _ = resolve({"output": "runs/verse"} | flags)
        parts["inputs"] = Mock(spec=RunInputs, run=run, derived={}, is_trial=True, signals=None)
        parts["inputs"].program = Mock()
        parts["stack"] = Mock(spec=ExitStack, enter_context=lambda part: part.__enter__())
        parts["run"] = module.open_run(parts["inputs"], parts["stack"])
        return parts

    return opened


def test_the_flags_of_a_run_reach_its_resources(opened: Callable[..., dict[str, Any]]) -> None:
    flags = {"keep_last": 4, "keep_every": 9, "save_minutes": 2.5, "logging_steps": 7}
    parts = opened(watchdog_minutes=3.0, profile_steps="2:5", quiet=True, **flags)
    inputs, path, stack = parts["inputs"], Path("runs/verse"), parts["stack"]
    directory, console, watchdog, signals = (
        parts[name].return_value for name in ("directory", "Console", "Watchdog", "Signals")
    )
    parts["remote"].assert_called_once_with(inputs.run, {}, stack)
    told = {"write": True, "fetch": "fetch", "is_trial": True}
    parts["directory"].assert_called_once_with(inputs.run, {}, **told)
    parts["Watchdog"].assert_called_once_with(path, 3.0, "group", directory.beat)
    parts["Console"].assert_called_once_with(quiet=True, logging_steps=7)
    say = console.warn, console.note
    mirrored = "copy", directory, inputs.run.saving
    parts["RunMirror"].assert_called_once_with(*mirrored, *say, watchdog.moved)
    parts["Profile"].assert_called_once_with((2, 5), path / "profile", *reversed(say))
    parts["Checkpoints"].assert_called_once_with(
        directory.checkpoints, 4, 9, console.warn, owner="record"
    )
    parts["StopCoordinator"].assert_called_once_with(signals, inputs.program.mesh, 2.5)
    assert console.alert == signals.message
    assert signals.is_shown() is console.is_live
    closed = {call.args[0] for call in stack.callback.call_args_list}
    profile, checkpoints = parts["Profile"].return_value, parts["Checkpoints"].return_value
    assert closed == {directory.close, profile.close, checkpoints.close}


def test_a_copy_is_complete_only_if_nothing_was_raised(
    opened: Callable[..., dict[str, Any]],
) -> None:
    parts = opened()
    (close,) = parts["stack"].push.call_args.args
    for kind, is_complete in ((None, True), (KeyError, False)):
        close(kind, None, None)
        parts["RunMirror"].return_value.close.assert_called_with(is_complete=is_complete)


def test_a_process_that_does_not_write_shows_and_traces_nothing(
    opened: Callable[..., dict[str, Any]],
) -> None:
    parts = opened(writes=False, profile_steps="2:5")
    parts["remote"].assert_not_called()
    assert parts["directory"].call_args.kwargs["write"] is False
    assert parts["Console"].call_args.kwargs["quiet"] is True
    assert parts["Profile"].call_args.args[0] is None
    assert parts["run"].writes is False
    assert opened()["Console"].call_args.kwargs["quiet"] is False


@pytest.mark.parametrize("resumed", [None, 8])
def test_the_records_of_a_run_begin_at_its_step(
    resumed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time before the first line counts as "other", so that all activities add up."""
    parts = replaced(monkeypatch, *RECORDS)
    beginning = Mock(rewind=Mock(return_value={"lost": 3}))
    beginning.open_callbacks.return_value = Mock(spec=Callbacks, run=Mock())
    monkeypatch.setattr(module, "beginning", beginning)
    earlier = {} if resumed is None else {"steps": 30.0, "other": 4.0}
    monkeypatch.setattr(module, "earlier_activities", lambda _: earlier)
    monkeypatch.setattr(module, "read_metrics", lambda _: [])
    log, clock = parts["MetricsLog"].return_value, parts["ActivityClock"].return_value
    log.time_s, log.path = 50.0, Path("metrics.jsonl")
    parts["LiveReport"].return_value.samples = []
    run, origins = resolve({})
    inputs = Mock(spec=RunInputs, run=run, origins=origins, header=[], began=12.5, eval_source=None)
    inputs.lengths, inputs.program = Mock(total_steps=10), Mock()
    opened = Mock(spec=OpenRun, writes=True, directory=Mock(), watchdog=Mock())
    opened.console = Mock(spec=Console)
    opened.coordinator, opened.checkpoints = Mock(), Mock()
    progress, stack = Progress(step=8, tokens=64), Mock(spec=ExitStack)
    found = module.open_records(inputs, opened, progress, resumed, None, stack, 7.0)
    assert found[2] == {"lost": 3}
    warn, directory = opened.console.warn, opened.directory
    parts["MetricsLog"].assert_called_once_with(
        directory.path, directory.check_for_line, warn, 12.5
    )
    beginning.rewind.assert_called_once_with(log, directory, -1 if resumed is None else 8, warn)
    beginning.forget_missing_best.assert_called_once_with(progress, directory.path)
    other = 50.0 - 7.0 - earlier.get("steps", 0.0)
    clock.begin.assert_called_once_with(earlier | {"other": other, "compiling": 7.0})
    assert parts["Recorder"].call_args.kwargs["activities"] is clock
    view = parts["RunView"].call_args
    assert view.args == (directory.path, directory.record.run, flat(run), 10, resumed)
    assert view.kwargs["place"]() == (8, 64)
    assert view.kwargs["ask_to_stop"] is opened.coordinator.ask_to_end
    stack.callback.assert_called_with(parts["LiveReport"].return_value.close)
    opened.watchdog.entered(SAVING)
    clock.enter.assert_called_once_with(SAVING)
    opened.console.enter.assert_called_once_with(SAVING, is_told=False)
