"""Calls of callbacks, which never raise, and classes of `--logging_backend`, which are imported."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.errors import UserError
from consyn_jax.training.logging.tracking.backends import load_classes
from consyn_jax.training.logging.tracking.callbacks import (
    METHODS,
    Callback,
    Callbacks,
    RunView,
    checked_callbacks,
)

LINE = {"step": 1, "tokens": 8, "time_s": 0.5, "train/loss": 2.0}


class Recorder:
    def __init__(self, fail_on: str = "", error: BaseException | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail_on, self.error = fail_on, error or RuntimeError("no host\ntoday")

    def _note(self, name: str, value: Any) -> None:
        self.calls.append((name, value))
        if name == self.fail_on:
            raise self.error

    def on_step(self, run: RunView, values: dict[str, Any]) -> None:
        self._note("on_step", dict(values))
        values.clear()  # its own copy

    def on_evaluate(self, run: RunView, values: dict[str, Any]) -> None:
        self._note("on_evaluate", values)

    def on_save(self, run: RunView, path: Path) -> None:
        self._note("on_save", path)

    def on_end(self, run: RunView, ending: str) -> None:
        self._note("on_end", ending)


def call_all(callbacks: Callbacks, times: int = 2) -> None:
    for _ in range(times):
        callbacks.step(LINE)
        callbacks.evaluate({"step": 1, "eval/loss": 1.0})
        callbacks.save(Path("best"))
    callbacks.end("complete")
    callbacks.end("complete")


def makers(*callbacks: Any) -> list[Any]:
    return [(type(callback).__name__, lambda made=callback: made) for callback in callbacks]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [None, SystemExit(1), KeyError("train/lossy")], ids=repr)
def test_a_failing_callback_is_reported_once_and_the_others_continue(
    method: str, error: BaseException | None
) -> None:
    good, bad, warnings = Recorder(), Recorder(method, error), []
    call_all(Callbacks(makers(bad, good), warn=warnings.append))
    once = [
        ("on_step", LINE),
        ("on_evaluate", {"step": 1, "eval/loss": 1.0}),
        ("on_save", Path("best")),
    ]
    assert good.calls == [*once, *once, ("on_end", "complete")]
    failed_at = next(i for i, (name, _) in enumerate(good.calls) if name == method)
    closes = [] if method == "on_end" else [("on_end", "complete")]
    assert bad.calls == good.calls[: failed_at + 1] + closes
    (said,) = warnings
    reason = (
        repr(error).replace("('", ": '").rstrip(")") if error else "RuntimeError: no host today"
    )
    reason = "SystemExit: 1" if isinstance(error, SystemExit) else reason
    line = next(
        number
        for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if text.strip() == "raise self.error"
    )
    assert said.startswith(f"Recorder.{method} raised {reason} (")
    assert f"{Path(__file__).name}:{line}). This callback is switched off; the run and" in said


def test_one_that_cannot_be_made_is_reported_and_an_interrupt_is_not_swallowed() -> None:
    class Missing(Recorder):
        def __init__(self) -> None:
            raise ImportError("no such library")

    class Interrupting(Recorder):
        def on_step(self, run: RunView, values: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    warnings: list[str] = []
    call_all(Callbacks([("Missing", Missing)], warn=warnings.append))
    (said,) = warnings
    assert said.startswith("Missing raised ImportError: no such library (")
    with pytest.raises(KeyboardInterrupt):
        call_all(Callbacks(makers(Interrupting()), warn=pytest.fail))


def test_an_error_in_a_library_is_named_at_the_users_own_line() -> None:
    class Calls:
        def on_step(self, run: RunView, values: dict[str, Any]) -> None:
            Path("/nowhere/at/all").read_text()

    warnings: list[str] = []
    callbacks = Callbacks(makers(Calls()), warn=warnings.append)
    callbacks.step(LINE)
    assert f"{Path(__file__).name}:" in warnings[0]
    assert "pathlib" not in warnings[0]


def test_a_callback_has_the_methods_that_it_wants() -> None:
    class OnlyEnd:
        ending = ""

        def on_end(self, run: RunView, ending: str) -> None:
            self.ending = ending

    (one,) = checked_callbacks([OnlyEnd()])
    call_all(Callbacks(makers(one), warn=pytest.fail))
    assert one.ending == "complete"
    assert [name for name in vars(Callback) if name.startswith("on_")] == list(METHODS)


def test_checkpoints_are_told_after_they_were_finished() -> None:
    finished: list[Path] = []
    recorder = Recorder()

    def saved() -> list[Path]:
        taken = finished.copy()
        finished.clear()
        return taken

    callbacks = Callbacks(makers(recorder), saved=saved)
    callbacks.tick()
    finished.append(Path("checkpoints/3"))
    callbacks.tick()
    callbacks.tick()
    finished.append(Path("checkpoints/6"))
    callbacks.end("complete")
    assert recorder.calls == [
        ("on_save", Path("checkpoints/3")),
        ("on_save", Path("checkpoints/6")),
        ("on_end", "complete"),
    ]


def test_the_first_that_asks_for_the_end_is_named() -> None:
    class Stops:
        def __init__(self, reason: str) -> None:
            self.reason = reason

        def on_step(self, run: RunView, values: dict[str, Any]) -> None:
            run.stop(self.reason)

    class AlsoStops(Stops):
        pass

    asked: list[str] = []
    run = RunView(Path(), ask_to_stop=lambda: asked.append("stop"))
    assert run.stop_request == {}
    Callbacks(makers(Stops("low enough"), AlsoStops("too")), run).step(LINE)
    assert run.stop_request == {"by": "Stops", "reason": "low enough"}
    assert asked == ["stop", "stop"]


class Wrong:
    def on_log(self, run: RunView, values: dict[str, Any]) -> None: ...


class FewArguments:
    def on_step(self, values: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (Recorder(), "callbacks is a Recorder. Pass a list of callbacks."),
        ([Recorder], r"callbacks\[0\] is the class Recorder. Pass Recorder\(\)."),
        ([Recorder(), Wrong()], r"callbacks\[1\] has a method on_log, which is never called"),
        ([object()], r"callbacks\[0\] has none of the methods on_step, on_evaluate, on_save"),
        ([FewArguments()], r"callbacks\[0\]: on_step must take \(self, run, values\), but"),
    ],
)
def test_what_would_never_be_called_is_refused(callbacks: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        checked_callbacks(callbacks)


# ---------------------------------------------------------------------- classes that a flag names

MODULE = """
import helper_of_tracker
class Tracker:
    def on_step(self, run, values): ...
class Needs:
    def __init__(self, url): ...
    def on_step(self, run, values): ...
class Other:
    def on_epoch_end(self, run, values): ...
function = len
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with modules, from which nothing stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "own_tracker.py").write_text(MODULE)
    (tmp_path / "helper_of_tracker.py").write_text("")
    (tmp_path / "broken_tracker.py").write_text("\n\nimport no_such_library\n")
    (tmp_path / "torn_tracker.py").write_text("def f(:\n")
    (tmp_path / "exits_tracker.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('an installed module was hidden')")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_class_of_the_working_directory_is_imported(here: Path) -> None:
    loaded = load_classes(["tensorboard", "own_tracker:Tracker"], "flag")
    assert {name: kind.__name__ for name, kind in loaded.items()} == {
        "own_tracker:Tracker": "Tracker"
    }
    assert load_classes(["tensorboard", "both"], "file x.yaml") == {}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_tracker:Trakcer", r"own_tracker.py has no class Trakcer; did you mean Tracker\?"),
        ("own_tracker:function", r"own_tracker.py has no class function"),
        (
            "own_tracker:Needs",
            "must work without arguments, but missing a required argument: 'url'",
        ),
        ("own_tracker:Other", "has a method on_epoch_end, which is never called"),
        ("own_trackers:Tracker", "there is no module own_trackers, neither installed nor in"),
        ("own_tracker.deep:Tracker", "there is no module own_tracker.deep"),
        (
            "broken_tracker:Tracker",
            r"cannot be imported: ModuleNotFoundError: No module named 'no_such_library' "
            r"\(broken_tracker.py:3\)",
        ),
        ("torn_tracker:Tracker", r"cannot be imported: SyntaxError: .*torn_tracker.py, line 1"),
        ("exits_tracker:Tracker", r"cannot be imported: SystemExit: 3 \(exits_tracker.py:2\)"),
        ("a b:Tracker", "must be module:Class, as in my_trackers:Mlflow"),
        ("own_tracker:", "must be module:Class"),
        ("/tmp/x.py:Tracker", "must be module:Class"),
        ("json:JSONDecoder", "has none of the methods on_step"),
    ],
)
def test_a_wrong_name_is_refused_in_one_sentence(name: str, said: str, here: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_classes([name], "flag")


@pytest.mark.parametrize("origin", ["file run/config.yaml", "default", "preset haiku"])
def test_code_that_a_file_names_is_not_imported(origin: str, here: Path) -> None:
    with pytest.raises(UserError, match="a class named only in a file is not imported"):
        load_classes(["exits_tracker:Tracker"], origin)
    assert "exits_tracker" not in sys.modules
