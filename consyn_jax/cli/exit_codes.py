"""Turn known errors of a command into one line and an exit code, without a traceback."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from consyn_jax.cli.text_encoding import escape_unprintable
from consyn_jax.errors import (
    Differs,
    Diverged,
    Interrupted,
    ProcessMissing,
    Repeats,
    Unsaved,
    UserError,
    advised,
    leave_out_overwrite,
    remedy,
    unsaved,
    visible,
)

KNOWN = (UserError, Diverged, Differs, Interrupted, ProcessMissing)
EXIT_CODES = {UserError: 2, Diverged: 3, Differs: 4, Interrupted: 75, ProcessMissing: 76}
# Errors of the operating system about a file. They are not defects of this program, so no traceback
# is printed.
OF_THE_SYSTEM = {
    errno.ENAMETOOLONG,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
}
DEFERRED_S = 0.05  # seconds until a signal that came during an import is sent again
LONGEST_NAME = 120  # characters of a file name in a message


def exit_code(prog: str, work: Callable[[], None]) -> int:
    """Do `work` and return the exit code.

    Returns:
        0 for success, even if the reader of a pipe has closed it. 2 for the user's mistake or a
        file that cannot be read or written. 3 for divergence. 4 for a difference from a run's
        record. 75 for a signal after which the state was saved. 76 if another process of the run
        did not start. If a signal ends the command with nothing saved: 130 for SIGINT, 143 for
        SIGTERM, a closed terminal or Slurm's warning.
    """
    escape_unprintable()
    leave_out_overwrite(False)  # an earlier command of this process may have set it
    os.umask(os.umask(0o022) | 0o002)  # no new file may be writable by everyone
    try:
        return _outcome(prog, work)
    finally:
        _drop_lost_output()


def _outcome(prog: str, work: Callable[[], None]) -> int:
    try:
        with _unwinding_on_sigterm():
            work()
    except KNOWN as known:
        _say(f"{prog}: {advised(str(known))}")
        return next(code for kind, code in EXIT_CODES.items() if isinstance(known, kind))
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 0
    except OSError as refused:
        if refused.errno not in OF_THE_SYSTEM or not refused.filename:
            raise
        _say(f"{prog}: {_refusal(refused)}")
        return EXIT_CODES[UserError]
    except KeyboardInterrupt as stopped:
        code, sentence = unsaved(stopped)
        _say(f"{prog}: {sentence}")
        return code
    return 0


def _reader_is_gone() -> bool:
    """Whether the program that reads our standard output, such as `head`, has ended."""
    ready = select.poll()
    ready.register(1, 0)
    return any(events & select.POLLERR for _, events in ready.poll(0))


def _refusal(error: OSError) -> str:
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    shown = str(name)
    if len(shown) > LONGEST_NAME:
        shown = f"{shown[:80]} ... {shown[-30:]}"
    if error.errno == errno.ENAMETOOLONG:
        return (
            f"{shown}: file names have at most 255 bytes, and this one is longer. Give a "
            "shorter name."
        )
    return f"{shown} cannot be used: {error.strerror}. {remedy(error)}."


def _say(message: str) -> None:
    """Print to stderr with control characters escaped; ignore a closed terminal."""
    with suppress(OSError):
        print(visible(message), file=sys.stderr, flush=True)


def _drop_lost_output() -> None:
    """Discard buffered output if the terminal is closed; otherwise Python would exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only it can set handlers
        yield
        return
    unwind = _Unwinding()
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell ignores it
        numbers.remove(signal.SIGINT)
    before = {number: signal.signal(number, unwind) for number in numbers}
    report = sys.unraisablehook
    sys.unraisablehook = hook = _without_signals(report)
    try:
        yield
    finally:
        unwind.is_over = True
        if sys.unraisablehook is hook:
            sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_signals(report: Callable[[Any], None]) -> Callable[[Any], None]:
    """Make a `sys.unraisablehook` that reports all errors except the exceptions of signals.

    They need no report: a signal whose exception is swallowed is sent again.
    """

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Unsaved):
            report(unraisable)

    return hook


class _Unwinding:
    """Signal handler that raises an exception, but not in the middle of an import.

    Some C++ libraries run Python during their import and abort on an exception. During an import
    the handler therefore waits: it sends the signal to its own process again until the import is
    over. If another signal comes from outside during this wait, the process ends at once. Some
    launchers send a signal twice in quick succession. Such a repeat is ignored, so that it does not
    interrupt the unwinding.

    The signal is also sent again if its exception is swallowed. Python ignores exceptions in
    callbacks of the garbage collector, and JAX has such a callback.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._repeats = Repeats()
        self._deferred: int | None = None
        self._is_own = False  # whether `_again` sent the signal being handled

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise `Unsaved` now, or after the import that the signal interrupted."""
        if self._is_own:
            self._is_own, number = False, self._deferred or number
        else:
            match self._repeats.place():
                case "repeat":
                    return
                case "second" if self._deferred is not None:
                    os._exit(128 + number)
        if not _is_importing(frame):
            self._deferred = None
            raise Unsaved(number, self._defer)
        self._defer(number)

    def _defer(self, number: int) -> None:
        """Send the signal again after `DEFERRED_S` seconds, unless the command ends earlier."""
        if not self.is_over:
            self._deferred = number
            threading.Thread(target=self._again, args=(number,), daemon=True).start()

    def _again(self, number: int) -> None:
        threading.Event().wait(DEFERRED_S)
        if not self.is_over:
            self._is_own = True
            signal.pthread_kill(threading.main_thread().ident or 0, number)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether an import is anywhere on the stack of the interrupted code."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
