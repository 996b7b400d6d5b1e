"""Helpers for Orbax's background writes: threads, their priority, and errors."""

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
LOW = 15  # `nice` value of a thread; it then gets 1/28 of a normal thread's CPU time
LOOK_S = 0.1  # seconds between two checks for new threads
ABANDONED_S = 0.5
ALONE_S = 10.0  # seconds to wait for a write before `is_left_alone` abandons it

ORBAX = f"{os.sep}orbax{os.sep}"
SYSTEM_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")  # in messages of TensorStore


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Filter out log records of Orbax, which logs errors that it also raises."""
    _, error, trace = record.exc_info or (None, None, None)
    places = (record.pathname, *(frame.filename for frame in traceback.extract_tb(trace)))
    return not (SYSTEM_ERROR.search(str(error)) or any(ORBAX in place for place in places))


# When one write fails, Orbax abandons its other writes, and asyncio logs each of them.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_not_orbax)
NEVER_AWAITED = r"coroutine '_?async_serialize.*' was never awaited"
warnings.filterwarnings("ignore", NEVER_AWAITED, RuntimeWarning)


def writing_thread(write: Callable[[], None], name: str) -> threading.Thread:
    """Create the thread that calls `write`, without starting it.

    With several processes, it is a daemon thread, because its write may be abandoned and never end
    (see `is_left_alone`). At exit, Python does not wait for daemon threads.
    """
    return threading.Thread(target=write, name=name, daemon=jax.process_count() > 1)


def is_left_alone(write: threading.Thread | None) -> bool:
    """Whether to abandon an unfinished write after an error that only this process has.

    The write waits for the other processes, which may be waiting for this process in a collective.
    If this process waited for the write, the others would never learn of the error.
    """
    if write is None or jax.process_count() == 1 or type(sys.exc_info()[1]) is not UserError:
        return False
    write.join(ALONE_S)
    return write.is_alive()


def refusal(error: BaseException | None) -> str | None:
    """Return the operating system's reason for an error; None if the error has another cause.

    TensorStore raises ValueError or KeyError for every failure, with the errno in the message.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = SYSTEM_ERROR.search(str(error))
    return os.strerror(int(code[1])) if code else None


def lower_priority(thread: int | None = None) -> None:
    """Lower the priority of a thread, by default the current one; does nothing except on Linux."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, thread or threading.get_native_id(), LOW)


def write_at_low_priority(futures: list[Any]) -> None:
    """Wait for Orbax to write, with its threads at low priority.

    On a CPU, these threads compete with training for the cores. TensorStore starts and ends threads
    as needed, so this function checks for new threads repeatedly. It does not change other threads,
    because a lowered priority cannot be raised again.
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
    """Wait at exit until Orbax's threads have probably finished abandoned writes.

    An error in such a thread during Python's shutdown bypasses all hooks, and prints a traceback
    after the run's last message. Nothing signals that the threads have finished; after a failed
    write, they took 0.05 s to finish.
    """
    time.sleep(ABANDONED_S)


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine, even if the thread has a running event loop, as in a notebook."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


class WithoutAbandonedWork:
    """A `sys.unraisablehook` that ignores errors of reads and writes that Orbax has abandoned.

    When one write fails, Orbax abandons the others. They finish after their event loop has closed,
    and each of them prints a traceback. If warnings are errors, Python also prints a traceback for
    each abandoned write that was never started.

    Args:
        report: Hook for all other errors.
    """

    def __init__(self, report: Callable[[Any], None]) -> None:
        self._report = report
        self._users = weakref.WeakSet[Any]()

    @classmethod
    def install(cls, user: object) -> WithoutAbandonedWork:
        """Install the hook; if it is installed already, share it."""
        hook = sys.unraisablehook
        found = hook if isinstance(hook, cls) else cls(hook)
        found._users.add(user)
        sys.unraisablehook = found
        return found

    def remove(self, user: object) -> None:
        """Stop using the hook; when it has no other users, restore the earlier hook."""
        self._users.discard(user)
        if not self._users and sys.unraisablehook is self:
            sys.unraisablehook = self._report

    def __call__(self, unraisable: Any) -> None:
        """Ignore an unraisable error of abandoned work; pass any other to `report`."""
        message = str(unraisable.exc_value)
        is_abandoned = (
            message == "Event loop is closed"
            or re.match(NEVER_AWAITED, message)
            or "_read_array_index" in repr(unraisable.object)
        )
        if not is_abandoned:
            self._report(unraisable)
