"""`metrics.jsonl`, the record of a run's numbers; trackers only have copies of it.

Every line of `metrics.jsonl` is one JSON object that begins with `step`, `tokens` (trained so far)
and `time_s` (since the run began, over all its starts). JSON has no NaN and no infinities, so such
a value is written as null, and `nonfinite` in the same line maps its key to "nan", "inf" or "-inf".
`read_metrics` turns them back into floats.
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
LARGEST_LOG = 1 << 32  # bytes; ten million lines
LARGEST_NUMBER = 1e300  # a log has none near it, and sums of a few such are still finite

_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# Events written after the checkpoint of their step. A run that resumes from that checkpoint drops
# them, because it may continue differently.
_AFTER_STATE = frozenset({"resume", "early_stop", "signal", "end_of_data", "finish"})


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """The append-only `metrics.jsonl` of a run directory, and the run's clock.

    Every line is handed to the system at once, and `flush` brings them to the disk. A last line
    that a kill has torn is cut off on opening. One process writes; others may read at any time. If
    the file is deleted or replaced meanwhile, it is written anew with all of its lines. If another
    program changes its content, the next write is refused.

    Args:
        check: called before every line; it may raise if the directory is gone.
        warn: called with a sentence if the file was written anew.
        began: `time.perf_counter()` at the beginning of this start of the run; None for now.

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
        """Drop everything after the state of `step`, and continue the clock from there.

        Dropped are lines with a later step, and events at `step` that came after its state
        (`resume`, `early_stop`, `signal`, `end_of_data`, `finish`). -1 drops everything. The change
        is atomic and may be repeated.

        Returns:
            The seconds until the end of the start that reached `step`, to which the clock adds.
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
            tokens: trained so far.
            values: numbers (Python's, or arrays with one element), strings, booleans or None, by
                key.

        Returns:
            The line as `read_metrics` gives it back.

        Raises:
            UserError: the line cannot be written, and the file is left without it; or another
                program has changed the file.
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
        if written != len(data):  # a disk that fills up takes a part without an error
            self._undo(start, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return line

    def flush(self) -> None:
        """Bring all lines to the disk; may be called from any thread.

        Raises:
            OSError: the lines cannot be written.
            UserError: another program has changed the file.
        """
        with self._guard:
            if self._file.closed:
                return
            self._checked_size()
            descriptor = os.dup(self._file.fileno())
        try:  # without the guard: training writes its next lines meanwhile
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @property
    def time_s(self) -> float:
        """Seconds since the run began, over all its starts."""
        return self._earlier_s + time.perf_counter() - self._began

    def close(self) -> None:
        """Bring all lines to the disk, and close the file."""
        with suppress(OSError, UserError):  # the system already has the lines
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
            raise UserError(f"{self.path} cannot be written: {error.strerror}.") from error

    def _checked_size(self) -> int:
        size = os.fstat(self._file.fileno()).st_size
        if size != self._size:
            raise UserError(
                f"{self.path} was changed by another program while the run wrote to it: it has "
                f"{size:,} bytes and not {self._size:,}. Put the run's own log back, or delete "
                "the file, and run the same command again."
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
        self._warn(f"{self.path} was deleted or replaced, and is written anew with all its lines.")

    def _start_clock(self, earlier_s: float) -> None:
        now = time.perf_counter() if self._start_began is None else self._start_began
        self._earlier_s, self._began = earlier_s, now

    def _undo(self, size: int, error: OSError) -> NoReturn:
        self._size = size
        with suppress(OSError):  # the disk may be read-only now; report the first error
            os.ftruncate(self._file.fileno(), size)
        raise UserError(
            f"{self.path} cannot be written: {error.strerror}. {remedy(error)}; then the same "
            f"command {CONTINUES}."
        ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, with NaN and infinities as floats.

    A last line that a kill has torn is left out.

    Raises:
        UserError: the file does not exist, or a line before the last one is damaged.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist. A run directory has one after its first logged step."
        )
    return _lines(path)


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of the `metrics.jsonl` in a run directory; none if it has no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / FILE_NAME
    return read_metrics(path) if path.exists() else []


def ending(events: Sequence[Mapping[str, Any]]) -> str:
    """The end of a run in words, by its events: complete, stopped by a signal, or diverged."""
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
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    rows = raw.split(b"\n")
    rows.pop()  # after the last newline there is nothing, or a torn line
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
    """Replace the file's content atomically, unless it is the same."""
    data = b"".join(map(_encode, lines))
    is_own = path.exists() and not path.is_symlink() and path.stat().st_nlink == 1
    if not is_own or path.read_bytes() != data:
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    try:
        make_directory(path.parent)
        write_whole(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


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
    """Convert a value for JSON: an array with one element, of any library, becomes a number."""
    return value.item() if hasattr(value, "item") else value


def _last_time(lines: Iterable[Mapping[str, Any]]) -> float:
    return max((float(line["time_s"]) for line in lines), default=0.0)
