"""Signals that end a run in good order, and the clock that has it saved: at the same step in all of its processes."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from time import monotonic
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from consyn_jax.data.loader import prefetch
from consyn_jax.distributed.peers import current_peers
from consyn_jax.training.step import Batch, Metrics, Step, TrainState

ENDING = (signal.SIGINT, signal.SIGTERM)
WARNING = signal.SIGUSR1  # Slurm's, some time ahead of the end: sbatch --signal=USR1@120
SIGNALS = "signals"  # in a batch: what each process has to say, see `with_signals`


class Signals:
    """Notes SIGINT, SIGTERM and SIGUSR1 instead of dying. A second SIGINT or SIGTERM ends the process at once; SIGUSR1 is a warning, and does not count."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._ends = False

    def __enter__(self) -> Signals:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (*ENDING, WARNING)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._ends and number != WARNING:
            os._exit(128 + number)
        self._ends |= number != WARNING
        if self.received is not None:
            return
        self.received = signal.Signals(number).name
        # Not through the console, whose state is unknown here: a handler runs between any two instructions.
        os.write(2, f"\n{self.received}: the run is saved after this step and ends; a second signal ends it at once, unsaved.\n".encode())


# ----------------------------------------------------------------------------------------------------------- in all processes alike


def is_shared(mesh: Mesh) -> bool:
    """Whether the devices of `mesh` belong to several processes."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def signals_like(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What the processes say in a batch: int32 [devices, 3], each device's row the same within a process."""
    return jax.ShapeDtypeStruct((mesh.size, 3), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def with_signals(step: Step) -> Step:
    """`step`, whose batch has `signals` [devices, 3]: the number of the signal that came to a device's process, 1 where it has no data, and 1
    where its clock wants a checkpoint.

    They are told to all by the metrics `signalled`, `idle` and `due`, the largest of each. An idle step leaves the state as it is: a process that waits for
    data while it shall end takes part in the step that the others have begun, and nothing comes of it.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        signalled, idle, due = jnp.max(batch[SIGNALS], axis=0)
        after, metrics = step(state, {name: values for name, values in batch.items() if name != SIGNALS})
        kept = jax.tree.map(lambda new, old: jnp.where(idle > 0, old, new), after, state)
        return kept, metrics | {"signalled": signalled, "idle": idle, "due": due}

    return train_step


class Agreement:
    """When to end for a signal, and when to save by the clock, so that all processes of a run do at the same step.

    One process acts on its own signals and clock. Several say in each step what came to them, and read what all said with the step's
    metrics: all read the same, at the same place of the same loop. The clock is that of process 0.

    Args:
        save_minutes: between two checkpoints; None for no such clock.
    """

    def __init__(self, signals: Signals, mesh: Mesh, save_minutes: float | None = None) -> None:
        self._signals, self._mesh = signals, mesh
        self._save_s = math.inf if save_minutes is None else 60 * save_minutes
        self._shared, self._peers = is_shared(mesh), current_peers()
        self._agreed: str | None = None
        self._idle = False
        self._arrays: dict[tuple[int, bool, bool], jax.Array] = {}
        self.saved()

    @property
    def stop(self) -> str | None:
        """The signal for which all end now."""
        return self._agreed if self._shared else self._signals.received

    @property
    def saves(self) -> bool:
        """Whether all save now, as the time has come."""
        return self._agreed_to_save if self._shared else self._due

    def saved(self) -> None:
        """The time to the next checkpoint counts from here."""
        self._saved_at, self._agreed_to_save = monotonic(), False

    @property
    def _due(self) -> bool:
        return monotonic() - self._saved_at >= self._save_s

    def waits_in_vain(self) -> bool:
        """Asked while data is waited for: whether to give up. In all processes, as any of them may be the one that has none."""
        received = self._signals.received
        if self._peers is not None:
            if received is not None and self._peers.noted is None:
                self._peers.note(received)
            received = received or self._peers.noted
        self._idle = received is not None
        return self._idle

    def batches(self, ready: prefetch[Batch], like: Mapping[str, Any]) -> Iterator[Batch]:
        """The batches of `ready`, which asks `waits_in_vain`; behind them, where this process waits in vain, empty ones.

        Args:
            like: a batch as shapes, dtypes and shardings.
        """
        yield from ready
        while self._shared and self._idle:
            yield {name: _zeros(values) for name, values in like.items()}

    def counts(self, metrics: Mapping[str, float]) -> bool:
        """Read what all said in a step. False for one that was idle: it does not count."""
        if number := int(metrics.get("signalled", 0)):
            self._agreed = signal.Signals(number).name
        self._agreed_to_save |= bool(metrics.get("due"))
        return not metrics.get("idle")

    def said(self) -> Batch:
        """What this process says in the step with the batch that it has just taken, to be added to the batch."""
        if not self._shared:
            return {}
        noted = self._peers.noted if self._peers is not None and self._idle else None
        received = self._signals.received or noted
        said = signal.Signals[received].value if received else 0, self._idle, jax.process_index() == 0 and self._due
        if said not in self._arrays:
            like = signals_like(self._mesh)
            row = np.array(said, np.int32)
            self._arrays[said] = jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.broadcast_to(row, like.shape)[index])
        return {SIGNALS: self._arrays[said]}


def _zeros(like: Any) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.zeros(like.shape, like.dtype)[index])
