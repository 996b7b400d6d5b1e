"""Orbax's background writes: their threads, their priority, and their errors."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from consyn_jax.errors import UserError

TASKS = Path("/proc/self/task")  # the threads of this process
LOW = 15  # priority of a thread, in units of `nice`: 1/28 of a normal one
LOOK_S = 0.1  # between two looks for new threads
ABANDONED_S = 0.5
ALONE_S = 10.0  # for a write that may be waiting for processes that wait for this one

ORBAX = f"{os.sep}orbax{os.sep}"
SYSTEM_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")  # in messages of TensorStore


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Drop log records of Orbax, such as tracebacks of errors that it raises anyway."""
    _, error, trace = record.exc_info or (None, None, None)
    places = (record.pathname, *(frame.filename for frame in traceback.extract_tb(trace)))
    return not (SYSTEM_ERROR.search(str(error)) or any(ORBAX in place for place in places))


# When one write fails, Orbax abandons the others, and asyncio complains about them.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_not_orbax)
NEVER_AWAITED = r"coroutine '_?async_serialize.*' was never awaited"
warnings.filterwarnings("ignore", NEVER_AWAITED, RuntimeWarning)


def writing_thread(write: Callable[[], None], name: str) -> threading.Thread:
    """A thread, not started yet; with several processes a daemon, as it may never end.

    Python's exit waits for all other threads, which would defeat `is_left_alone`.
    """
    return threading.Thread(target=write, name=name, daemon=jax.process_count() > 1)


def is_left_alone(write: threading.Thread | None) -> bool:
    """Whether to abandon a write because an error in this process alone ends the run.

    The other processes may be waiting for this one in a collective, and the write is waiting for
    them. If this process waited for the write, they would never learn of the error.
    """
    if write is None or jax.process_count() == 1 or type(sys.exc_info()[1]) is not UserError:
        return False
    write.join(ALONE_S)
    return write.is_alive()


def refusal(error: BaseException | None) -> str | None:
    """The operating system's reason for an error; None if the error is a defect.

    TensorStore raises ValueError or KeyError for every failure, with the errno in the text.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = SYSTEM_ERROR.search(str(error))
    return os.strerror(int(code[1])) if code else None


def lower_priority(thread: int | None = None) -> None:
    """Lower the priority of a thread, by default the calling one.

    Only Linux gives each thread a priority.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, thread or threading.get_native_id(), LOW)


def write_at_low_priority(futures: list[Any]) -> None:
    """Wait for Orbax to write, with its threads at low priority.

    On a CPU these threads compete with training for the cores. TensorStore starts and ends threads
    as needed, so look for new ones repeatedly. Lower only those: a priority cannot be raised again.
    """
    known: set[Path] = set()
    with ThreadPoolExecutor(1) as thread:
        written = thread.submit(lambda: [future.result() for future in futures])
        while not written.done():
            tasks = set(TASKS.iterdir()) if sys.platform == "linux" else set()
            for task in tasks - known:
                with suppress(OSError):  # it has just ended
                    if (task / "comm").read_text().startswith("ts_"):
                        lower_priority(int(task.name))
            known = tasks
            wait([written], LOOK_S)
        written.result()


def outlast_abandoned_work() -> None:
    """Give Orbax's threads time to finish abandoned work.

    An error during Python's shutdown bypasses all hooks, and prints a traceback after the run's
    last message. Nothing signals that they are done; after a failed write, they took 0.05 s.
    """
    time.sleep(ABANDONED_S)


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine, even if the caller's thread has a running event loop, as in a notebook."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


class WithoutAbandonedWork:
    """A `sys.unraisablehook` that ignores the reads and writes that Orbax abandoned.

    When one write fails, the others finish later, after their event loop has closed, and each
    prints a traceback. With warnings as errors, writes that never began are reported as well.

    Args:
        report: the hook for everything else.
    """

    def __init__(self, report: Callable[[Any], None]) -> None:
        self._report = report
        self._users = weakref.WeakSet[Any]()

    @classmethod
    def install(cls, user: object) -> WithoutAbandonedWork:
        """Install the hook, or share the one that runs beside this one have installed."""
        hook = sys.unraisablehook
        found = hook if isinstance(hook, cls) else cls(hook)
        found._users.add(user)
        sys.unraisablehook = found
        return found

    def remove(self, user: object) -> None:
        """Put the earlier hook back, unless there are other users."""
        self._users.discard(user)
        if not self._users and sys.unraisablehook is self:
            sys.unraisablehook = self._report

    def __call__(self, unraisable: Any) -> None:
        """Report an error that Python cannot raise."""
        message = str(unraisable.exc_value)
        is_abandoned = (
            message == "Event loop is closed"
            or re.match(NEVER_AWAITED, message)
            or "_read_array_index" in repr(unraisable.object)
        )
        if not is_abandoned:
            self._report(unraisable)
