"""Orbax's writes beside training: where they run, at which priority, and what is heard of those that fail."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

TASKS = Path("/proc/self/task")  # the threads of this process
LOW, LOOK_S = 15, 0.1  # priority of a thread, as `nice` counts: 1/28 of a normal one; and how often it is seen to

ORBAX = f"{os.sep}orbax{os.sep}"
SYSTEM_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")  # in what TensorStore says


def _is_of_others(record: logging.LogRecord) -> bool:
    """False for what Orbax logs: all that it does, and errors with a traceback, which it raises, too, and which are answered here."""
    _, error, trace = record.exc_info or (None, None, None)
    places = (record.pathname, *(frame.filename for frame in traceback.extract_tb(trace)))
    return not (SYSTEM_ERROR.search(str(error)) or any(ORBAX in place for place in places))


# When one write fails, Orbax leaves the others to themselves, and asyncio complains of what becomes of them.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_of_others)
warnings.filterwarnings("ignore", r"coroutine '_?async_serialize.*' was never awaited", RuntimeWarning)


def refusal(error: BaseException | None) -> str | None:
    """What the operating system said when it refused something; None for an error that is a defect.

    TensorStore raises ValueError and KeyError for all, with the number of the system's error in the text.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = SYSTEM_ERROR.search(str(error))
    return os.strerror(int(code[1])) if code else None


def lower_priority(thread: int | None = None) -> None:
    """Leave a thread, by default the calling one, the processor time that no other wants. Only Linux gives each a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, thread or threading.get_native_id(), LOW)


def write_at_low_priority(futures: list[Any]) -> None:
    """Wait for Orbax to write; its threads get what processor time training leaves, for on a CPU there is no other to take.

    TensorStore makes and ends these threads as it needs them, and a priority once lowered stays, so new ones are looked for again and again.
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


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, whether or not the caller's thread has an event loop, as in a notebook."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def without_abandoned_work(report: Callable[[Any], None]) -> Callable[[Any], None]:
    """A `sys.unraisablehook` that is silent about the reads and writes which Orbax had begun when one of them failed.

    They end at any later time, each with a traceback on stderr, and the loop that would hear of them is closed by then.
    """

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" and "_read_array_index" not in repr(unraisable.object):
            report(unraisable)

    return hook
