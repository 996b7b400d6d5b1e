"""Touch a file every few seconds to show an orchestrator that this process is alive."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from consyn_jax.errors import UserError, brief

VARIABLE = "CONSYN_HEARTBEAT"
BEAT_S = 5.0


@contextmanager
def heartbeat() -> Iterator[None]:
    """Touch the file named by the environment variable `CONSYN_HEARTBEAT`, from a thread.

    The thread touches the file every 5 seconds. The file stays untouched if the process is frozen
    or its interpreter is blocked. It is still touched if the run makes no progress; the watchdog
    ends such a run. The name is not a flag, because it belongs to the container and not to the run.

    Raises:
        UserError: the file cannot be written at the start.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        yield
        return
    file = Path(name)
    try:
        file.touch()
    except OSError as error:
        raise UserError(
            f"The heartbeat file {name} ({VARIABLE}) cannot be written: {brief(error)}. Set the "
            "variable to a file that can be written."
        ) from None
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(file, stop), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _beat(file: Path, stop: threading.Event) -> None:
    is_warned = False
    while not stop.wait(BEAT_S):
        try:
            file.touch()
        except OSError as error:
            if not is_warned:
                said = f"consyn-train: the heartbeat file {file} cannot be written: {brief(error)}."
                print(said, file=sys.stderr, flush=True)
            is_warned = True
