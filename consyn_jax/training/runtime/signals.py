"""Signals and the save clock; all processes of a run stop, or save, after the same step."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from time import monotonic
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from consyn_jax.data.loader import prefetch
from consyn_jax.distributed.process_group import current_process_group
from consyn_jax.errors import REPEAT_S, Repeats
from consyn_jax.training.step import Batch, Metrics, Step, TrainState

ENDING = (signal.SIGINT, signal.SIGTERM)
WARNING = signal.SIGUSR1  # Slurm sends it some time before the end: sbatch --signal=USR1@120
HANGUP = signal.SIGHUP  # a terminal that closes sends it, often several times; nohup ignores it
SAVE, END = 1, 2  # requests of process 0
SIGNALS = "signals"  # the array in a batch that carries each process's message, see `with_signals`


class Signals:
    """Records SIGINT, SIGTERM, SIGUSR1 and SIGHUP, which would otherwise end the process.

    A second SIGINT or SIGTERM ends the process at once, unless it follows so soon that it is an
    automatic repeat of the first (`Repeats`). SIGUSR1 and SIGHUP never end the process at once:
    SIGUSR1 is only a warning, and a closing terminal may send SIGHUP several times. If SIGHUP is
    ignored, as under `nohup`, it stays ignored.

    Attributes:
        received: Name of the first signal; None if there was none.
        is_shown: Function that returns whether the console's live line shows `message`. If it does,
            the message is not written to stderr, where the live line would overwrite it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.is_shown: Callable[[], bool] = lambda: False
        self._repeats = Repeats()

    def __enter__(self) -> Signals:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [*ENDING, WARNING]
            if signal.getsignal(HANGUP) is not signal.SIG_IGN:
                numbers.append(HANGUP)
            self._before = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number in ENDING and self._repeats.place() == "second":
            os._exit(128 + number)
        if self.received is not None:
            return
        self.received = signal.Signals(number).name
        # Not through the console, which may be in the middle of a line: a signal handler can run
        # between any two instructions.
        if not self.is_shown():
            with suppress(OSError):  # the terminal may be closed
                os.write(2, f"\n{self.message()}\n".encode())

    def message(self) -> str:
        """Say what the run does after the first signal; "" if there was none."""
        if self.received is None:
            return ""
        return (
            f"{self.received}: the run will save after this step and stop. A second signal at "
            f"least {REPEAT_S:.0f} seconds later stops it at once, without saving."
        )


# ---------------------------------------------------------------------------- inside the train step


def is_shared(mesh: Mesh) -> bool:
    """Whether the devices of `mesh` belong to more than one process."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def signals_like(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Return the shape of the messages in a batch: int32 [devices, 3], one row per device.

    All devices of a process have the same row.
    """
    return jax.ShapeDtypeStruct(
        (mesh.size, 3), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    )


def with_signals(step: Step) -> Step:
    """Wrap `step` so that it also sends one message from each process to all processes.

    The batch gets an array `signals` [devices, 3]. A row has three numbers from the device's
    process: the number of the signal that it received (or 0); 1 if it has no data; and its request,
    1 for a checkpoint or 2 for the end of the run. The metrics `signalled`, `idle` and `requested`
    are the maxima over all devices.

    If any process has no data, the step is idle: it leaves the state unchanged. A process that must
    stop while it waits for data runs an idle step, because the other processes have already started
    this step.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        signalled, idle, requested = jnp.max(batch[SIGNALS], axis=0)
        after, metrics = step(
            state, {name: values for name, values in batch.items() if name != SIGNALS}
        )
        kept = jax.tree.map(lambda new, old: jnp.where(idle > 0, old, new), after, state)
        return kept, metrics | {"signalled": signalled, "idle": idle, "requested": requested}

    return train_step


class StopCoordinator:
    """Decides after which step all processes stop, or save because `save_minutes` have passed.

    A run stops after a signal, or when a callback asks for its end. A single process acts on its
    own signals, clock and callbacks. Several processes exchange messages in every step
    (`with_signals`). They act only on messages from the step's metrics, so all of them act after
    the same step. Only the save clock and the callbacks of process 0 count.

    Args:
        save_minutes: Minutes between two checkpoints; None for no save clock.
    """

    def __init__(self, signals: Signals, mesh: Mesh, save_minutes: float | None = None) -> None:
        self._signals, self._mesh = signals, mesh
        self._save_s = math.inf if save_minutes is None else 60 * save_minutes
        self._shared, self._process_group = is_shared(mesh), current_process_group()
        self._agreed_signal: str | None = None
        self._idle = self._asked_to_end = self._agreed_to_end = False
        self._messages: dict[tuple[int, bool, int], jax.Array] = {}
        self.restart_save_clock()

    @property
    def received(self) -> str | None:
        """Name of the signal that this process has received; None if there was none."""
        return self._signals.received

    @property
    def stop_signal(self) -> str | None:
        """Name of the signal for which all processes stop now; None if there is none."""
        return self._agreed_signal if self._shared else self._signals.received

    @property
    def save_now(self) -> bool:
        """Whether all processes save now because `save_minutes` have passed."""
        return self._agreed_to_save if self._shared else self._save_due

    @property
    def ends_now(self) -> bool:
        """Whether all processes end the run now because a callback has asked for it."""
        return self._agreed_to_end if self._shared else self._asked_to_end

    def ask_to_end(self) -> None:
        """Request the end of the run; called in process 0."""
        self._asked_to_end = True

    def restart_save_clock(self) -> None:
        """Restart the clock that makes a checkpoint due after `save_minutes`."""
        self._saved_at, self._agreed_to_save = monotonic(), False

    @property
    def _save_due(self) -> bool:
        return monotonic() - self._saved_at >= self._save_s

    def stops_waiting(self) -> bool:
        """Whether to stop waiting for the next batch; called while the process waits.

        Once one process has received a signal, the result becomes true in all processes, because
        any process may be waiting for data.
        """
        received = self._signals.received
        if self._process_group is not None:
            if received is not None and self._process_group.noted is None:
                self._process_group.note(received)
            received = received or self._process_group.noted
        self._idle = received is not None
        return self._idle

    def batches(self, ready: prefetch[Batch], like: Mapping[str, Any]) -> Iterator[Batch]:
        """Yield the batches of `ready`; if this process stops waiting, yield zeros for idle steps.

        Args:
            ready: Iterator over batches that calls `stops_waiting` while it waits.
            like: Shapes, dtypes and shardings of a batch.
        """
        yield from ready
        while self._shared and self._idle:
            yield {name: _zeros(values) for name, values in like.items()}

    def message(self) -> Batch:
        """Return this process's message, to be added to the batch that was just read."""
        if not self._shared:
            return {}
        group = self._process_group
        noted = group.noted if group is not None and self._idle else None
        received = self._signals.received or noted
        content = (
            signal.Signals[received].value if received else 0,
            self._idle,
            0 if jax.process_index() else END if self._asked_to_end else int(self._save_due) * SAVE,
        )
        if content not in self._messages:
            like = signals_like(self._mesh)
            row = np.array(content, np.int32)
            self._messages[content] = jax.make_array_from_callback(
                like.shape, like.sharding, lambda index: np.broadcast_to(row, like.shape)[index]
            )
        return {SIGNALS: self._messages[content]}

    def read(self, metrics: Mapping[str, float]) -> bool:
        """Read all processes' messages from a step's metrics; return False for an idle step."""
        if number := int(metrics.get("signalled", 0)):
            self._agreed_signal = signal.Signals(number).name
        self._agreed_to_save |= metrics.get("requested") == SAVE
        self._agreed_to_end |= metrics.get("requested") == END
        return not metrics.get("idle")


def _zeros(like: Any) -> jax.Array:
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: np.zeros(like.shape, like.dtype)[index]
    )
