"""Signals that end a run in good order."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """Notes SIGINT and SIGTERM instead of dying; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> Signals:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
        # Not through the console, whose state is unknown here: a handler runs between any two instructions.
        os.write(2, f"\n{self.received}: the run is saved after this step and ends; a second signal ends it at once, unsaved.\n".encode())
