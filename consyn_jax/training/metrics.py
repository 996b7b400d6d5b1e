"""What a run leaves behind in numbers: `metrics.jsonl`, of which `trackers` have copies for looking at.

Every line of `metrics.jsonl` is one JSON object that begins with `step`, `tokens` (trained so far) and `time_s` (since the run
began, resumes added up). JSON has no word for NaN and infinities: such a value is written as null, and `nonfinite` in the same
line maps its key to "nan", "inf" or "-inf". `read_metrics` turns them back into floats.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from consyn_jax.config import UserError
from consyn_jax.training.checkpoint_files import flush

FILE_NAME = "metrics.jsonl"

_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# Events that tell how a run went on from a state. A run that resumes at that state takes another way, so they go.
_AFTER_STATE = frozenset({"resume", "early_stop", "signal", "end_of_data", "finish"})


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
        line |= {key: plain(value) for key, value in (values or {}).items()}
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


def plain(value: Any) -> Any:
    """A JSON value; arrays with one element, of whichever library, become numbers."""
    return value.item() if hasattr(value, "item") else value


def _last_time(lines: Iterable[Mapping[str, Any]]) -> float:
    return max((float(line["time_s"]) for line in lines), default=0.0)
