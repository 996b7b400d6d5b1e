"""Callbacks of a run: their interface, their view of the run, and calls that never raise."""

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
    """The interface of a callback. Any class with at least one of these methods is a callback.

    The methods are called between two steps, in the process that writes the run directory; training
    waits for them. After its first error, a callback is switched off with a warning. Then only its
    `on_end` is called, so that it can close its files.
    """

    def on_step(self, run: RunView, values: dict[str, Any]) -> None:
        """Receive a line of training metrics.

        This is called at the first step, the last step, and every `logging_steps` steps.

        Args:
            values: the line of `metrics.jsonl`: `step`, `tokens`, `time_s`, `train/loss`, ...
        """

    def on_evaluate(self, run: RunView, values: dict[str, Any]) -> None:
        """Receive an evaluation. A text generated at the evaluation is in `run.samples`.

        Args:
            values: the line of `metrics.jsonl`: `step`, `tokens`, `time_s`, `eval/loss`, ...
        """

    def on_save(self, run: RunView, path: Path) -> None:
        """Receive the path of a checkpoint or model that was written completely.

        Args:
            path: in the run directory: `best`, `final` or `checkpoints/STEP`. The run may later
                delete this checkpoint.
        """

    def on_end(self, run: RunView, ending: str) -> None:
        """Receive the end of the run, once, unless the process is killed.

        `report.html` is final by then.

        Args:
            ending: "complete" (also after early stopping), "stopped by SIGTERM" or another signal,
                "diverged", or "ended without a record" after an error.
        """


class RunView:
    """A callback's view of the run.

    Args:
        place: returns the numbers of steps and tokens so far.
        ask_to_stop: requests the end of the run.

    Attributes:
        directory: the run directory.
        run_id: the identity of the run, the same for all its starts.
        config: every setting by flag name.
        total_steps: number of steps of the whole run.
        resumed_from: the step from which this start resumed; None for a new run.
        histograms: the histograms of the newest evaluation, by name (`weights/q/0`); empty without
            `--histograms`. Each has `counts`, `edges`, `total` and `squares`.
        samples: the texts generated so far, as `{"step", "tokens", "text"}`.
        stop_request: the first request of a callback to end the run, as `{"by", "reason"}`, where
            `by` is the callback's name; empty without a request.
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
        self._called = ""  # name of the callback that is running

    @property
    def step(self) -> int:
        """Number of steps whose metrics were read so far."""
        return self._place()[0]

    @property
    def tokens(self) -> int:
        """Number of tokens in the steps whose metrics were read so far."""
        return self._place()[1]

    @property
    def history(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl` so far, read from the file."""
        return metrics_of(self.directory)

    def stop(self, reason: str = "") -> None:
        """End the run at most three steps later, at the same step in all processes.

        As after early stopping, the run writes a checkpoint, `final/` and the report, and exits
        with code 0. Running the same command again then finds the run complete.

        Args:
            reason: text to print, and to log in the event `stop` of `metrics.jsonl`.
        """
        self.stop_request = self.stop_request or {"by": self._called, "reason": str(reason)}
        self._ask_to_stop()


class Callbacks:
    """Calls several callbacks, and never raises their errors.

    Args:
        makers: name and constructor of each callback.
        warn: called with one sentence about each callback that fails.
        saved: returns the checkpoints that were completed in the background since the last call.
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
        """Pass each newly completed checkpoint to `on_save`; call this method every step."""
        for path in self._saved() if self._active else ():
            self.save(path)

    def step(self, line: Mapping[str, Any]) -> None:
        """Pass a line of training metrics to `on_step`."""
        self._call("on_step", lambda: dict(line))

    def evaluate(self, line: Mapping[str, Any]) -> None:
        """Pass the line of an evaluation to `on_evaluate`."""
        self._call("on_evaluate", lambda: dict(line))

    def save(self, path: Path) -> None:
        """Pass the path of a complete checkpoint or model to `on_save`."""
        self._call("on_save", lambda: path)

    def end(self, ending: str) -> None:
        """Pass the end of the run to `on_end`; safe to call twice."""
        self.tick()
        self._call("on_end", lambda: ending)
        failed, self._active, self._failed = self._failed, [], []
        for _, callback in failed:
            if (method := getattr(callback, "on_end", None)) is not None:
                with suppress(Exception, SystemExit):  # its first error was already reported
                    method(self.run, ending)

    def _call(self, name: str, value: Callable[[], object]) -> None:
        for entry in list(self._active):
            who, callback = entry
            if (method := getattr(callback, name, None)) is None:
                continue
            self.run._called = who
            try:
                method(self.run, value())
            # A callback may raise any exception, and must not end the run.
            except (Exception, SystemExit) as error:  # noqa: BLE001
                self._active = [other for other in self._active if other is not entry]
                self._failed += [entry] if name != "on_end" else []
                self._report(f"{who}.{name}", method, error)

    def _report(self, what: str, called: Any, error: BaseException) -> None:
        text = " ".join(str(error).split()).rstrip(".!")[:LONGEST_REASON]
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        self._warn(
            f"{what} raised {reason} ({_place_of(called, error)}). This callback is switched off; "
            f"the run and {FILE_NAME} are not affected."
        )


def checked_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """Check the keyword `callbacks`, a list of callback objects.

    Raises:
        UserError: it is not a list, or an item is a class or not a valid callback.
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
        UserError: the callback has no `on_` method, an unknown `on_` method, or a method with wrong
            arguments.
    """
    found = [method for method in dir(callback) if method.startswith("on_")]
    if other := next((method for method in found if method not in METHODS), None):
        raise UserError(
            f"{name} has a method {other}, which is never called{nearest(other, METHODS)} The "
            f"methods of a callback are {', '.join(METHODS)}."
        )
    if not found:
        raise UserError(f"{name} has none of the methods {', '.join(METHODS)}. Add one of them.")
    for method in found:
        called = getattr(callback, method)
        takes_self = isinstance(callback, type) and inspect.isfunction(called)
        try:
            inspect.signature(called).bind(*([None] * (3 if takes_self else 2)))
        except TypeError as error:
            takes = ", ".join([*inspect.signature(getattr(Callback, method)).parameters])
            raise UserError(
                f"{name}: {method} must take ({takes}), but a call with these fails: {error}. "
                "Correct its arguments."
            ) from error


def _place_of(called: Any, error: BaseException) -> str:
    """The line in the callback's code at which an error arose, as file:line."""
    function = vars(called).get("__init__") if isinstance(called, type) else called
    code = getattr(function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without the call in this file
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    if own or frames:
        return shown_place(frames[-1] if not own else own[-1])
    return "?" if code is None else f"{_short(code.co_filename)}:{code.co_firstlineno}"


def shown_place(frame: traceback.FrameSummary) -> str:
    """Format a frame as file:line; files below the working directory get a relative path."""
    return f"{_short(frame.filename)}:{frame.lineno}"


def _short(file_name: str) -> str:
    path = Path(file_name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
