"""What every command does around its work: mistakes become one line and an exit code, and never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from consyn_jax.config import Diverged, Interrupted, UserError

EXIT_CODES = {UserError: 2, Diverged: 3, Interrupted: 75}


def exit_code(prog: str, work: Callable[[], None]) -> int:
    """Do `work` and return the exit code: 0, 2 (the user's mistake), 3 (diverged), 75 (interrupted and saved), 130 (interrupted)."""
    try:
        work()
    except (UserError, Diverged, Interrupted) as known:
        print(f"{prog}: {known}", file=sys.stderr)
        return EXIT_CODES[type(known)]
    except KeyboardInterrupt:
        print(f"{prog}: interrupted before there was anything to save.", file=sys.stderr)
        return 130
    return 0
