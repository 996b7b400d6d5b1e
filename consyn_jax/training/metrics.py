"""What a run leaves behind in numbers: `metrics.jsonl`, the truth, and trackers (TensorBoard, Weights & Biases), copies for looking at.

Every line of `metrics.jsonl` is one JSON object that begins with `step`, `tokens` (trained so far) and `time_s` (since the run
began, resumes added up). JSON has no word for NaN and infinities: such a value is written as null, and `nonfinite` in the same
line maps its key to "nan", "inf" or "-inf". `read_metrics` turns them back into floats.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from consyn_jax.config import UserError
from consyn_jax.training.checkpoint_files import flush

FILE_NAME = "metrics.jsonl"

_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# Events that tell how a run went on from a state. A run that resumes at that state takes another way, so they go.
_AFTER_STATE = frozenset({"resume", "early_stop", "signal", "end_of_data", "finish"})


# ---------------------------------------------------------------------------------------------------------------- metrics.jsonl


class MetricsLog:
    """The append-only `metrics.jsonl` of one run directory and the run's clock. Every line is handed to the system at once.

    A last line torn by a kill is cut off on opening. One process writes; readers may read at any time.

    Raises:
        UserError: the file cannot be written, or a line before the last one is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        lines = _lines(self.path)
        _rewrite(self.path, lines)
        self._open()
        self._start_clock(_last_time(lines))

    def truncate_from(self, step: int) -> float:
        """Drop what lies after the state resumed at, and let time go on from there; atomic, and safe to repeat.

        Dropped are lines with a step above `step`, and events at `step` that tell how the run went on (`resume`,
        `early_stop`, `signal`, `end_of_data`, `finish`). A step of -1 drops everything: the run begins anew.

        Returns:
            The seconds that the kept part of the run took: `time_s` of the lines to come is added to it.
        """
        kept = [line for line in _lines(self.path) if line["step"] < step or (line["step"] == step and line.get("event") not in _AFTER_STATE)]
        self._file.close()
        _rewrite(self.path, kept)
        self._open()
        time_s = _last_time(kept)
        self._start_clock(time_s)
        return time_s

    def write(self, step: int, tokens: int, values: Mapping[str, Any] | None = None, *, event: str | None = None) -> dict[str, Any]:
        """Append one line: training or evaluation values, or an event with its details.

        Args:
            tokens: trained so far.
            values: numbers (Python's, or arrays with one element), strings, booleans or None by key.

        Returns:
            The line as `read_metrics` gives it back.

        Raises:
            UserError: the disk refuses the line. The file is left as it was before it.
        """
        line: dict[str, Any] = {"step": int(step), "tokens": int(tokens), "time_s": round(self.time_s, 3)}
        if event is not None:
            line["event"] = event
        line |= {key: _plain(value) for key, value in (values or {}).items()}
        data = _encode(line)
        start = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(data)
        except OSError as error:
            self._undo(start, error)
        if written != len(data):  # a disk that fills up takes a part and says nothing
            self._undo(start, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return line

    @property
    def time_s(self) -> float:
        """Seconds since the run began, resumes added up."""
        return self._earlier_s + time.perf_counter() - self._began

    def close(self) -> None:
        """Close the file; every line is in it already."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}.") from error

    def _start_clock(self, earlier_s: float) -> None:
        self._earlier_s, self._began = earlier_s, time.perf_counter()

    def _undo(self, size: int, error: OSError) -> NoReturn:
        os.ftruncate(self._file.fileno(), size)
        raise UserError(f"{self.path} cannot be written: {error.strerror}. Make room and run the same command again to go on.") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, with NaN and infinities as floats. A last line that a kill has torn is left out.

    Raises:
        UserError: no such file, or a line before the last one is damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; a run directory has one after its first logged step.")
    return _lines(path)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    rows = raw.split(b"\n")
    rows.pop()  # what follows the last newline: nothing, or a torn line
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            lines.append(_decode(row))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(rows):  # a power cut can leave a last line of the right length and the wrong content
                break
            raise UserError(f"{path}:{number} is damaged ({error}). Remove that line to go on.") from error
    return lines


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replace the file's content, whole or not at all; a file that has it already is left alone."""
    data = b"".join(map(_encode, lines))
    if path.exists() and path.read_bytes() == data:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush(path.parent)  # the new name is durable once its directory is
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def _encode(line: Mapping[str, Any]) -> bytes:
    lost = {key: str(value) for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
    if lost:
        line = {**line, **dict.fromkeys(lost), "nonfinite": lost}
    return json.dumps(line, allow_nan=False).encode("ascii") + b"\n"


def _decode(row: bytes) -> dict[str, Any]:
    line = json.loads(row, parse_constant=_refuse)
    lost = line.pop("nonfinite", {}) if isinstance(line, dict) else None
    if not isinstance(lost, dict) or not all(isinstance(line.get(key), (int, float)) for key in ("step", "tokens", "time_s")):
        raise ValueError("not a JSON object with the numbers step, tokens and time_s")
    return line | {key: _NONFINITE[value] for key, value in lost.items()}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _plain(value: Any) -> Any:
    """A JSON value; arrays with one element, of whichever library, become numbers."""
    return value.item() if hasattr(value, "item") else value


def _last_time(lines: Iterable[Mapping[str, Any]]) -> float:
    return max((float(line["time_s"]) for line in lines), default=0.0)


# --------------------------------------------------------------------------------------------------------------------- trackers


class Tracker(Protocol):
    """Where metrics are copied to for people to look at. Methods may raise anything; `Trackers` stands between."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""

    def sample(self, step: int, text: str) -> None:
        """Record a text that the model wrote."""

    def close(self) -> None:
        """Hand over what is still held back."""


class TensorBoardTracker:
    """Events for TensorBoard in `logs_dir`, one new file a start of the run, begun with its first event.

    Args:
        purge_step: TensorBoard forgets points of earlier files from this step on: the step after the one resumed at.
    """

    def __init__(self, logs_dir: Path, purge_step: int | None = None) -> None:
        self._logs_dir, self._purge_step = logs_dir, purge_step
        self._writer: Any = None

    def _open(self) -> Any:
        # Its import takes seconds where torch is installed, which it imports. By the first event, the second step is under way.
        # SummaryWriter queues events for a thread: once that thread has died of a full disk, the queue fills and training hangs.
        # The writer below it does its work at once and raises where it fails.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._logs_dir.mkdir(parents=True, exist_ok=True)
        self._event = event_pb2.Event
        # Two starts within a second would share a name, and the second would overwrite the first.
        writer = EventsWriter(str(self._logs_dir / "events"), f".{os.getpid()}.{time.time_ns() % 10**9:09d}")
        if self._purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.Value("START"))
            writer.write_event(event_pb2.Event(wall_time=time.time(), step=self._purge_step, session_log=start))
        return writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all the values."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._write(step, Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in values.items()]))

    def sample(self, step: int, text: str) -> None:
        """The text as it is; TensorBoard would otherwise read it as Markdown."""
        from tensorboardX.summary import text as text_summary

        self._write(step, text_summary("sample", "\n".join("    " + line for line in text.splitlines())))

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, summary: Any) -> None:
        if self._writer is None:
            self._writer = self._open()
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


class WandbTracker:
    """A Weights & Biases run; its files lie in `directory`/wandb.

    WANDB_MODE=offline needs neither network nor key. Without that, where there is no key or no network, the run is kept
    offline all the same and `warn` says how to upload it.

    Args:
        run_id: the run to go on with, from `Trackers.run_id` of the run that is resumed.
    """

    def __init__(
        self,
        project: str,
        run_name: str | None,
        directory: Path,
        config: Mapping[str, Any],
        run_id: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        # At the end wandb waits for its uploads, by default without limit: a dead network would keep the job, and its GPUs, alive.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")
        # console off: wandb would wrap stdout and stderr, and with them the progress bar. A prompt for a key that nobody answers ends.
        settings = wandb.Settings(console="off", quiet=True, login_timeout=60)

        def start(mode: Any) -> Any:
            return wandb.init(
                project=project,
                name=run_name,
                dir=str(directory),
                config=dict(config),
                id=run_id,
                resume="allow" if run_id else None,
                mode=mode,
                settings=settings,
            )

        try:
            self._run = start(None)
        except (wandb.errors.Error, TimeoutError) as error:
            self._run = start("offline")
            warn(f"Weights & Biases: {_sentence(error)} The run is kept offline in {directory / 'wandb'}; `wandb sync` uploads it.")
        # wandb drops values whose step lies before its newest, which after a resume they do: the step is a value of its own.
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """Names the run at Weights & Biases."""
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the history."""
        self._run.log({"step": step, **values})

    def sample(self, step: int, text: str) -> None:
        """The text as HTML, escaped."""
        import html

        import wandb

        self._run.log({"step": step, "sample": wandb.Html(f"<pre style='white-space:pre-wrap'>{html.escape(text)}</pre>", inject=False)})

    def close(self) -> None:
        """Upload what is left (at most WANDB_FINISH_TIMEOUT seconds) and end the run."""
        self._run.finish()


class Trackers:
    """Several trackers as one that never raises: one that fails is reported once and switched off, and training goes on.

    Args:
        starts: by name, what starts each tracker; importing its library belongs to it.
        warn: told about a failure, in one sentence.
    """

    def __init__(self, starts: Mapping[str, Callable[[], Tracker]], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._active: dict[str, Tracker] = {}
        for name, start in starts.items():
            self._guard(name, functools.partial(self._start, name, start))

    @property
    def run_id(self) -> str | None:
        """Weights & Biases' name of the run, to be saved and given to `build_trackers` on resuming; None without it."""
        return next((tracker.run_id for tracker in self._active.values() if isinstance(tracker, WandbTracker)), None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers among the values; texts, booleans and None stay in `metrics.jsonl`."""
        plain = {key: _plain(value) for key, value in values.items()}
        numbers = {key: float(value) for key, value in plain.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        if numbers:
            self._each(lambda tracker: tracker.log(step, numbers))

    def sample(self, step: int, text: str) -> None:
        """Send a text that the model wrote."""
        self._each(lambda tracker: tracker.sample(step, text))

    def close(self) -> None:
        """Close all; safe to call twice."""
        self._each(lambda tracker: tracker.close())
        self._active.clear()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._active.items()):
            self._guard(name, functools.partial(do, tracker))

    def _start(self, name: str, start: Callable[[], Tracker]) -> None:
        self._active[name] = start()

    def _guard(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - third-party sinks: their libraries may raise anything, and none of it may end a run
            self._active.pop(name, None)
            self._warn(f"{name} failed and is switched off; training and {FILE_NAME} go on. {type(error).__name__}: {_sentence(error)}")


def build_trackers(
    backend: str,
    *,
    directory: Path,
    project: str,
    run_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
    run_id: str | None = None,
    warn: Callable[[str], None],
) -> Trackers:
    """The trackers of `--logging_backend` for the run in `directory`.

    Args:
        backend: tensorboard, wandb, both or none.
        resume_step: the step of the state that the run goes on from; None for a new run.
        run_id: `Trackers.run_id` of the run that is resumed.
        warn: told, in one sentence, when a tracker fails.

    Raises:
        UserError: there is no such backend.
    """
    if backend not in ("tensorboard", "wandb", "both", "none"):
        raise UserError(f"--logging_backend {backend!r} is not known. Known: tensorboard, wandb, both, none.")
    starts: dict[str, Callable[[], Tracker]] = {}
    if backend in ("tensorboard", "both"):
        starts["TensorBoard"] = lambda: TensorBoardTracker(directory / "logs", None if resume_step is None else resume_step + 1)
    if backend in ("wandb", "both"):
        starts["Weights & Biases"] = lambda: WandbTracker(project, run_name, directory, config or {}, run_id, warn)
    return Trackers(starts, warn)


def _sentence(error: BaseException) -> str:
    """An error's message as one line that ends like a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
