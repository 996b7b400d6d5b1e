"""Write and read `metrics.jsonl`, the log of a run; trackers only have copies of it.

Every line is a JSON object that begins with `step`, `tokens` (trained so far) and `time_s` (seconds
that the run has taken, summed over its starts). JSON has no NaN or infinity, so such a value is
written as null, and `nonfinite` in the same line maps its key to "nan", "inf" or "-inf".
`read_metrics` converts these values back to floats.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NoReturn

from consyn_jax.errors import CONTINUES, UserError, remedy
from consyn_jax.files import make_directory, open_regular, read_whole, write_whole

FILE_NAME = "metrics.jsonl"
LARGEST_LOG = 1 << 32  # bytes, about ten million lines
LARGEST_NUMBER = 1e300  # larger values count as infinite, so that sums stay finite

_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# Events written after the checkpoint of their step. A run that resumes from that checkpoint drops
# them, because it may continue differently.
_AFTER_STATE = frozenset({"resume", "early_stop", "signal", "end_of_data", "finish"})


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """The append-only `metrics.jsonl` of a run directory, and the run's clock.

    Every line is passed to the operating system immediately; `flush` forces all lines to disk. An
    incomplete last line, left by a killed process, is removed when the file is opened. Only one
    process writes; other processes may read at any time. If the file is deleted or replaced during
    the run, all lines are written to a new file. If another program changes its content, the next
    write raises an error.

    Args:
        check: called before every line; it may raise if the directory is gone.
        warn: called with a sentence after a deleted or replaced file was written again.
        began: value of `time.perf_counter()` when this process started the run; by default, its
            current value.

    Raises:
        UserError: the file cannot be written, or a line before the last one is damaged.
    """

    def __init__(
        self,
        directory: Path,
        check: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = lambda text: None,
        began: float | None = None,
    ) -> None:
        self.path, self._check, self._warn = directory / FILE_NAME, check, warn
        self._start_began = began
        lines = _lines(self.path)
        _rewrite(self.path, lines)
        self._guard = threading.Lock()  # `flush` is called from another thread
        self._open()
        self._start_clock(_last_time(lines))

    def truncate_from(self, step: int) -> float:
        """Remove all lines written after the checkpoint of `step`, and continue the clock.

        These are the lines of later steps, and events at `step` that follow its checkpoint
        (`resume`, `early_stop`, `signal`, `end_of_data`, `finish`). With -1, all lines are removed.
        The change is atomic and may be repeated.

        Returns:
            The newest time in the log up to `step`, in seconds; the clock continues from this time.
        """
        lines = [line for line in _lines(self.path) if line["step"] <= step]
        kept = [
            line for line in lines if line["step"] < step or line.get("event") not in _AFTER_STATE
        ]
        with self._guard:
            self._file.close()
            _rewrite(self.path, kept)
            self._open()
        time_s = _last_time(lines)
        self._start_clock(time_s)
        return time_s

    def write(
        self,
        step: int,
        tokens: int,
        values: Mapping[str, Any] | None = None,
        *,
        event: str | None = None,
    ) -> dict[str, Any]:
        """Append one line: training or evaluation values, or an event with its details.

        Args:
            tokens: number of tokens trained on so far.
            values: Python numbers, arrays with one element, strings, booleans or None, by key.

        Returns:
            The line as `read_metrics` would return it.

        Raises:
            UserError: another program has changed the file, or the line cannot be written. A line
                that cannot be written is not in the file, not even in part.
        """
        self._check()
        with self._guard:
            self._write_anew_if_lost()
        line: dict[str, Any] = {
            "step": int(step),
            "tokens": int(tokens),
            "time_s": round(self.time_s, 3),
        }
        if event is not None:
            line["event"] = event
        line |= {key: plain(value) for key, value in (values or {}).items()}
        data = _encode(line)
        start = self._checked_size()
        try:
            with self._guard:
                written = self._file.write(data)
                self._size += len(data)
        except OSError as error:
            self._undo(start, error)
        if written != len(data):  # a disk that becomes full accepts a part without an error
            self._undo(start, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return line

    def flush(self) -> None:
        """Force all lines to disk; any thread may call this.

        Raises:
            OSError: the lines cannot be written.
            UserError: another program has changed the file.
        """
        with self._guard:
            if self._file.closed:
                return
            self._checked_size()
            descriptor = os.dup(self._file.fileno())
        try:  # without the lock, so that training can write lines during the flush
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @property
    def time_s(self) -> float:
        """Seconds that the run has taken, summed over its starts, without the time between them."""
        return self._earlier_s + time.perf_counter() - self._began

    def close(self) -> None:
        """Force all lines to disk, and close the file."""
        with suppress(OSError, UserError):  # the operating system already has the lines
            self.flush()
        with self._guard:
            self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        try:
            descriptor = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            self._file = os.fdopen(descriptor, "a+b", buffering=0)
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. Check the disk and the "
                "permissions."
            ) from error

    def _checked_size(self) -> int:
        size = os.fstat(self._file.fileno()).st_size
        if size != self._size:
            raise UserError(
                f"{self.path} was changed by another program while the run wrote to it: it has "
                f"{size:,} bytes, not {self._size:,}. Restore the run's own log or delete the "
                "file, and run the same command again."
            )
        return size

    def _write_anew_if_lost(self) -> None:
        own = os.fstat(self._file.fileno())
        with suppress(FileNotFoundError):
            if os.path.samestat(self.path.lstat(), own):
                return
        content = os.pread(self._file.fileno(), own.st_size, 0)  # of the deleted file
        self._file.close()
        _replace(self.path, content)
        self._open()
        self._warn(f"{self.path} was deleted or replaced. It was written again with all its lines.")

    def _start_clock(self, earlier_s: float) -> None:
        now = time.perf_counter() if self._start_began is None else self._start_began
        self._earlier_s, self._began = earlier_s, now

    def _undo(self, size: int, error: OSError) -> NoReturn:
        self._size = size
        with suppress(OSError):  # the disk may now be read-only; report only the first error
            os.ftruncate(self._file.fileno(), size)
        raise UserError(
            f"{self.path} cannot be written: {error.strerror}. {remedy(error)}; then the same "
            f"command {CONTINUES}."
        ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`, with NaN and infinities as floats.

    An incomplete last line, left by a killed process, is ignored.

    Raises:
        UserError: the file does not exist, or a line before the last one is damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist. A run writes it at its first logged step.")
    return _lines(path)


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """Read the `metrics.jsonl` in a run directory; an empty list if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / FILE_NAME
    return read_metrics(path) if path.exists() else []


def ending(events: Sequence[Mapping[str, Any]]) -> str:
    """Describe how a run with these events ended, such as "complete" or "stopped by SIGTERM"."""
    match events[-1] if events else {}:
        case {"event": "finish"}:
            return "complete"
        case {"event": "signal", "signal": name}:
            return f"stopped by {name}"
        case {"event": "nonfinite", "action": "halt"}:
            return "diverged"
    return "ended without a record"


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        raw = read_whole(path, LARGEST_LOG)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Check the disk and the permissions."
        ) from error
    rows = raw.split(b"\n")
    rows.pop()  # empty, or an incomplete last line
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            lines.append(_decode(row))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # A power cut can leave a last line of the right length with the wrong content.
            if number == len(rows):
                break
            raise UserError(
                f"{path}:{number} is damaged ({error}). Remove that line to continue."
            ) from error
    return lines


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replace the file's content atomically, if it differs."""
    data = b"".join(map(_encode, lines))
    is_own = path.exists() and not path.is_symlink() and path.stat().st_nlink == 1
    if not is_own or path.read_bytes() != data:
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    try:
        make_directory(path.parent)
        write_whole(path, data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Check the disk and the permissions."
        ) from error


def _encode(line: Mapping[str, Any]) -> bytes:
    lost = {
        key: str(value)
        for key, value in line.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if lost:
        line = {**line, **dict.fromkeys(lost), "nonfinite": lost}
    return json.dumps(line, allow_nan=False).encode("ascii") + b"\n"


def _decode(row: bytes) -> dict[str, Any]:
    line = json.loads(row, parse_constant=_refuse)
    lost = line.pop("nonfinite", {}) if isinstance(line, dict) else None
    if not isinstance(lost, dict) or not all(
        isinstance(line.get(key), (int, float)) and 0 <= line[key] < LARGEST_NUMBER
        for key in ("step", "tokens", "time_s")
    ):
        raise ValueError("not a JSON object with the positive numbers step, tokens and time_s")
    return line | {key: _NONFINITE[value] for key, value in lost.items()}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def plain(value: Any) -> Any:
    """Convert a value for JSON: an array of any library with one element becomes a number."""
    return value.item() if hasattr(value, "item") else value


def _last_time(lines: Iterable[Mapping[str, Any]]) -> float:
    return max((float(line["time_s"]) for line in lines), default=0.0)
