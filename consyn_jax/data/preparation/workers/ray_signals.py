"""Signals that come while Ray starts or ends."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from consyn_jax.errors import Repeats

ALARM_S = 3.0  # from a SIGTERM to the alarm with which Ray aborts the process
HELD_S = 60.0  # longest time from the first signal to the end of the command
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # they end a command
INTERRUPTED = 75  # the exit code of a command that can be run again to continue


@contextmanager
def holding_signals(end: Callable[[], object]) -> Iterator[None]:
    """Note signals while Ray starts or ends, and send the first one again afterwards.

    An exception in the middle of `ray.init` would leave Ray half started, and crash the process at
    its exit. Ray also changes what SIGTERM does. `ray.init` replaces the Python handler by
    `sys.exit`, and `ray.shutdown` leaves no handler. A C++ handler of Ray sets an alarm, which
    aborts the process three seconds after the signal.

    Ray may wait in C++ code for minutes. During this wait, Python handles no signal. So a thread
    ends the process at the second signal, or `HELD_S` seconds after the first one.

    Args:
        end: function that ends the processes of Ray; called before this process is ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: ours for number, ours in handlers.items() if callable(ours)}
    install, came = signal.signal, list[int]()
    with ExitStack() as stack:  # undoes each step, even if a signal raises an exception halfway
        stack.callback(lambda: signal.raise_signal(came[0]) if came else None)
        stack.enter_context(_watching(handlers, end))
        for number, ours in handlers.items():
            stack.callback(install, number, ours)
            install(number, lambda number, _: came.append(number))
        stack.callback(setattr, signal, "signal", install)
        signal.signal = _except_for(handlers, install)
        yield


def _except_for(numbers: Container[int], install: Callable[..., Any]) -> Callable[..., Any]:
    """Make a `signal.signal` that does nothing for the signals `numbers`."""
    return lambda number, handler: None if number in numbers else install(number, handler)


@contextmanager
def _watching(numbers: Container[int], end: Callable[[], object]) -> Iterator[None]:
    """Run `_watch` in a thread inside a `with` block, then restart the caller's timer."""
    since, (left_s, every_s) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, 0)
    read, write = os.pipe()
    os.set_blocking(write, False)
    watch = threading.Thread(target=_watch, args=(read, numbers, end), daemon=True)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)  # ends the thread
        watch.join()
        os.close(read)
        if left_s:
            left_s -= time.monotonic() - since
            signal.setitimer(signal.ITIMER_REAL, max(left_s, 0.001), every_s)


def _watch(read: int, numbers: Container[int], end: Callable[[], object]) -> None:
    """Cancel Ray's alarms; end the process at the second signal, or `HELD_S` after the first.

    Args:
        read: pipe with a byte for each signal. The function returns when the pipe is closed.
    """
    repeats, until = Repeats(), float("inf")
    while time.monotonic() < until:
        is_ready = select.select([read], [], [], ALARM_S / 10)[0]
        signal.alarm(0)
        came = os.read(read, 1) if is_ready else b"\0"
        if not came:
            return
        if came[0] in numbers:
            if repeats.place() == "second":
                break
            until = min(until, time.monotonic() + HELD_S)
    end()
    os.write(
        2,
        b"\nThe command was interrupted while Ray was starting or ending, and did not wait "
        b"for it. Run the same command again without --overwrite to continue.\n",
    )
    os._exit(INTERRUPTED)
