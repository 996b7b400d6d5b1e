"""Callbacks of a run: the interface, what they see of the run, and the calls, which never raise."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from consyn_jax.errors import UserError, nearest
from consyn_jax.training.logging.metrics import FILE_NAME, metrics_of

METHODS = ("on_step", "on_evaluate", "on_save", "on_end")
LONGEST_REASON = 300  # characters of an error in a warning

Maker = tuple[
    str, Callable[[], Any]
]  # a callback's name in messages, and the callable that makes it


class Callback(Protocol):
    """The methods of a callback. A plain class with any of the four will do, without a base class.

    They are called in the process that writes the run directory, between two steps: the run waits
    for them. The first error is reported in one sentence and switches the callback off. After it
    only `on_end` is called, so that the callback can close what it has opened.
    """

    def on_step(self, run: RunView, values: dict[str, Any]) -> None:
        """Take in a line of training metrics.

        It is called at the steps that are logged: every `logging_steps`, the first and the last.

        Args:
            values: the line of `metrics.jsonl`: `step`, `tokens`, `time_s`, `train/loss`, ...
        """

    def on_evaluate(self, run: RunView, values: dict[str, Any]) -> None:
        """Take in an evaluation. If a sample was drawn with it, `run.samples` has it.

        Args:
            values: the line of `metrics.jsonl`: `step`, `tokens`, `time_s`, `eval/loss`, ...
        """

    def on_save(self, run: RunView, path: Path) -> None:
        """Take in a directory that is complete on the disk.

        Args:
            path: `checkpoints/STEP`, which a later checkpoint may replace, `best` or `final`, in
                the run directory.
        """

    def on_end(self, run: RunView, ending: str) -> None:
        """Close what is open; called once, however the run ends, unless its process is killed.

        `report.html` is final by then.

        Args:
            ending: "complete" (early stopping included), "stopped by SIGTERM" or another signal,
                "diverged", or "ended without a record" for an error.
        """


class RunView:
    """The run as a callback sees it.

    Args:
        place: returns the steps and tokens so far.
        ask_to_stop: asks for the end of the run.

    Attributes:
        directory: the run directory.
        run_id: the identity of the run, which all of its starts share.
        config: every setting by flag name.
        total_steps: the steps of the whole run.
        resumed_from: the step that this start resumed from; None for a new run.
        histograms: with `--histograms`, those of the newest evaluation by name (`weights/q/0`),
            each with `counts`, `edges`, `total` and `squares`; otherwise empty.
        samples: the texts that the model wrote so far, as `{"step", "tokens", "text"}`.
        stop_request: the callback that asked first for the end of the run (`by`) and its `reason`;
            empty if none did.
    """

    def __init__(
        self,
        directory: Path,
        run_id: str = "",
        config: Mapping[str, Any] | None = None,
        total_steps: int = 0,
        resumed_from: int | None = None,
        *,
        place: Callable[[], tuple[int, int]] = lambda: (0, 0),
        ask_to_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory, self.run_id, self.config = directory, run_id, config or {}
        self.total_steps, self.resumed_from = total_steps, resumed_from
        self.histograms: Mapping[str, Any] = {}
        self.samples: Sequence[Mapping[str, Any]] = ()
        self.stop_request: Mapping[str, str] = {}
        self._place, self._ask_to_stop = place, ask_to_stop
        self._called = ""  # the callback that is called now

    @property
    def step(self) -> int:
        """The steps that were taken and read so far."""
        return self._place()[0]

    @property
    def tokens(self) -> int:
        """The tokens of these steps."""
        return self._place()[1]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` so far, read from the file."""
        return metrics_of(self.directory)

    def stop(self, reason: str = "") -> None:
        """End the run after this step or one of the next three, the same in all processes.

        The run ends as with early stopping: with a checkpoint, `final/`, the report and the exit
        code 0. The same command then finds it complete.

        Args:
            reason: printed, and kept in the event `stop` of `metrics.jsonl`.
        """
        self.stop_request = self.stop_request or {"by": self._called, "reason": str(reason)}
        self._ask_to_stop()


class Callbacks:
    """Several callbacks as one that never raises.

    Args:
        makers: each makes a callback.
        warn: called with one sentence about each callback that fails.
        saved: takes the directories that were completed in the background since the last call.
    """

    def __init__(
        self,
        makers: Iterable[Maker] = (),
        run: RunView | None = None,
        warn: Callable[[str], None] = lambda text: None,
        saved: Callable[[], Iterable[Path]] = tuple,
    ) -> None:
        self.run = run or RunView(Path())
        self._warn, self._saved = warn, saved
        self._active: list[tuple[str, Any]] = []
        self._failed: list[tuple[str, Any]] = []
        for name, make in makers:
            try:
                self._active.append((name, make()))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - as in `_call`
                self._report(name, make, error)

    def tick(self) -> None:
        """Tell of checkpoints that were completed meanwhile; call it after every step."""
        for path in self._saved() if self._active else ():
            self.save(path)

    def step(self, line: Mapping[str, Any]) -> None:
        """Tell of a line of training metrics."""
        self._call("on_step", lambda: dict(line))

    def evaluate(self, line: Mapping[str, Any]) -> None:
        """Tell of an evaluation."""
        self._call("on_evaluate", lambda: dict(line))

    def save(self, path: Path) -> None:
        """Tell of a complete directory."""
        self._call("on_save", lambda: path)

    def end(self, ending: str) -> None:
        """Tell of the end of the run; safe to call twice."""
        self.tick()
        self._call("on_end", lambda: ending)
        failed, self._active, self._failed = self._failed, [], []
        for _, callback in failed:
            if (method := getattr(callback, "on_end", None)) is not None:
                with suppress(Exception, SystemExit):  # its first error was reported
                    method(self.run, ending)

    def _call(self, name: str, value: Callable[[], object]) -> None:
        for entry in list(self._active):
            who, callback = entry
            if (method := getattr(callback, name, None)) is None:
                continue
            self.run._called = who
            try:
                method(self.run, value())
            # Code of others may raise anything, and none of it may end a run.
            except (Exception, SystemExit) as error:  # noqa: BLE001
                self._active = [other for other in self._active if other is not entry]
                self._failed += [entry] if name != "on_end" else []
                self._report(f"{who}.{name}", method, error)

    def _report(self, what: str, called: Any, error: BaseException) -> None:
        text = " ".join(str(error).split()).rstrip(".!")[:LONGEST_REASON]
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        self._warn(
            f"{what} raised {reason} ({_place_of(called, error)}), so it is switched off; the run "
            f"and {FILE_NAME} go on."
        )


def checked_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """Check the keyword `callbacks`: objects whose methods are called.

    Raises:
        UserError: it is no list, or one of them is a class, or has methods that are not called.
    """
    if not isinstance(callbacks, (list, tuple)):
        raise UserError(f"callbacks is a {type(callbacks).__name__}. Pass a list of callbacks.")
    for i, callback in enumerate(callbacks):
        if isinstance(callback, type):
            raise UserError(
                f"callbacks[{i}] is the class {callback.__name__}. Pass {callback.__name__}()."
            )
        check_methods(callback, f"callbacks[{i}]")
    return tuple(callbacks)


def check_methods(callback: Any, name: str) -> None:
    """Check the methods of a callback, or of a class of callbacks.

    Args:
        name: the callback's name in messages.

    Raises:
        UserError: it has no method that is called, one of another name that begins with `on_`, or
            one that takes other arguments.
    """
    found = [method for method in dir(callback) if method.startswith("on_")]
    if other := next((method for method in found if method not in METHODS), None):
        raise UserError(
            f"{name} has a method {other}, which is never called{nearest(other, METHODS)} Those of "
            f"a callback are {', '.join(METHODS)}."
        )
    if not found:
        raise UserError(f"{name} has none of the methods {', '.join(METHODS)}. Add one.")
    for method in found:
        called = getattr(callback, method)
        takes_self = isinstance(callback, type) and inspect.isfunction(called)
        try:
            inspect.signature(called).bind(*([None] * (3 if takes_self else 2)))
        except TypeError as error:
            takes = ", ".join([*inspect.signature(getattr(Callback, method)).parameters])
            raise UserError(
                f"{name}: {method} must take ({takes}), and here it has {error}."
            ) from error


def _place_of(called: Any, error: BaseException) -> str:
    """The line of the called code that failed, as file:line."""
    function = vars(called).get("__init__") if isinstance(called, type) else called
    code = getattr(function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without the call in this file
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    if own or frames:
        return shown_place(frames[-1] if not own else own[-1])
    return "?" if code is None else f"{_short(code.co_filename)}:{code.co_firstlineno}"


def shown_place(frame: traceback.FrameSummary) -> str:
    """A frame as file:line, the file relative to the working directory if it is below it."""
    return f"{_short(frame.filename)}:{frame.lineno}"


def _short(file_name: str) -> str:
    path = Path(file_name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
