"""What every command does around its work: mistakes become one line and an exit code, and never a traceback."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from consyn_jax.config import Diverged, Interrupted, UserError

EXIT_CODES = {UserError: 2, Diverged: 3, Interrupted: 75}


class _Terminated(KeyboardInterrupt):
    """SIGTERM, or Slurm's warning SIGUSR1, where there is nothing to save yet: unwound like Ctrl-C, so that half-made files are removed."""

    number = signal.SIGTERM


def exit_code(prog: str, work: Callable[[], None]) -> int:
    """Do `work` and return the exit code: 0, 2 (the user's mistake), 3 (diverged), 75 (interrupted and saved), or 130 and 143
    (interrupted by SIGINT and SIGTERM with nothing to save)."""
    try:
        with _unwinding_on_sigterm():
            work()
    except (UserError, Diverged, Interrupted) as known:
        print(f"{prog}: {known}", file=sys.stderr)
        return EXIT_CODES[type(known)]
    except KeyboardInterrupt as stopped:
        print(f"{prog}: interrupted before there was anything to save.", file=sys.stderr)
        return 128 + getattr(stopped, "number", signal.SIGINT)
    return 0


def shown(names: Sequence[str]) -> str:
    """The first three names, and how many there are besides."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return

    def unwind(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
