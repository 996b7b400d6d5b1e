"""Lanes: threads that train trials side by side, with compiled programs that all lanes share.

A lane is a thread that works on one trial after another, with the training loop of
`consyn-train`. Lanes take turns: only one lane runs at a time, until it calls a shared program.
When all lanes have called the program, it runs once, with the states and batches of all lanes. Then
the lanes take turns again. Evaluations, log, checkpoints, pruning and resuming therefore work as in
a single trial. Code in a lane need not be thread-safe, and trials end in a deterministic order.

A shared program stacks the states of all lanes; outside the program, each lane has its own state.
Stacking costs a copy of all states in each step. In return, a lane can start a new trial by passing
another state, lanes may be at different steps, and checkpoints and evaluations use a lane's state
directly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from consyn_jax.errors import CONTINUES, Interrupted
from consyn_jax.training.runtime.memory import explain_out_of_memory
from consyn_jax.training.runtime.signals import Signals


class LanesProgram(Protocol):
    """A compiled program that runs for all lanes at once.

    Attributes:
        waits: whether this program runs last if lanes have called several programs.
    """

    waits: bool

    def __call__(self, calls: Mapping[int, tuple[Any, ...]]) -> Mapping[int, Any]:
        """Run once for all calls.

        Args:
            calls: arguments of each call, by number of the lane.

        Returns:
            The result of each call, by number of the lane.
        """


class _Closed(BaseException):
    """Exception that ends the trial of a lane because another lane has failed."""


class Lane:
    """A thread that works on trials. It runs only during calls of `go_on`.

    Args:
        signals: record of the signals that the process received, which the trials read.

    Attributes:
        program: the shared program that the lane has called, until it gets the result; None if the
            lane has ended.
        arguments: arguments of the call of `program`.
        error: the error that has ended the lane; None if there is none.
    """

    def __init__(self, number: int, signals: Signals, work: Callable[[Lane], None]) -> None:
        self.number, self.signals = number, signals
        self.program: LanesProgram | None = None
        self.arguments: tuple[Any, ...] = ()
        self.error: BaseException | None = None
        self._result: Any = None
        self._closes = False
        self._turn, self._turn_over = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), name=f"lane {number}")

    def call(self, program: LanesProgram, *arguments: Any) -> Any:
        """Call a shared program from this lane's thread, and wait for the result."""
        self.program, self.arguments = program, arguments
        del arguments  # the state is donated
        self._turn_over.release()
        self._turn.acquire()
        if self._closes:
            raise _Closed
        result, self._result = self._result, None
        return result

    def go_on(self, result: Any = None) -> None:
        """Start or resume the lane, and wait for the end of its turn.

        Args:
            result: result of the lane's call of a program; None for the first turn.
        """
        self.program, self.arguments, self._result = None, (), result
        del result
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        self._turn_over.acquire()

    def close(self) -> None:
        """End the lane; its trial can later continue from its newest checkpoint."""
        self._closes = True
        while self.program is not None:
            self.go_on()

    def _run(self, work: Callable[[Lane], None]) -> None:
        try:
            work(self)
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            self.error = error
        finally:
            self._turn_over.release()


def run_lanes(number: int, work: Callable[[Lane], None]) -> None:
    """Run `work` in a number of lanes until all lanes have ended.

    Raises:
        Interrupted: a signal came and ended the trials.
        BaseException: the error of the first lane that failed; the other lanes are closed.
    """
    with Signals() as signals:
        lanes = [Lane(i, signals, work) for i in range(number)]
        try:
            for lane in lanes:
                lane.go_on()
                _raise_failure(lane)
            while waiting := [lane for lane in lanes if lane.program is not None]:
                _run_program(waiting)
        finally:
            for lane in lanes:
                lane.close()
        if signals.received is not None:
            raise _interruption(signals.received, lanes)


def _run_program(waiting: Sequence[Lane]) -> None:
    """Run a program for the lanes that have called it, then give each of them its turn."""
    first = next((lane for lane in waiting if not _waits(lane)), waiting[0])
    program, called = first.program, [lane for lane in waiting if lane.program is first.program]
    assert program is not None
    with explain_out_of_memory("a smaller number for --vectorize"):
        results = dict(program({lane.number: lane.arguments for lane in called}))
    for lane in called:
        lane.go_on(results.pop(lane.number))
        _raise_failure(lane)


def _waits(lane: Lane) -> bool:
    return lane.program is not None and lane.program.waits


def _raise_failure(lane: Lane) -> None:
    if lane.error is not None and not isinstance(lane.error, Interrupted):
        raise lane.error


def _interruption(signal: str, lanes: Sequence[Lane]) -> BaseException:
    """Build the error after a signal; its message has the number of interrupted trials."""
    stopped = [lane.error for lane in lanes if lane.error is not None]
    if len(stopped) == 1:
        return stopped[0]
    if not stopped:
        return Interrupted(f"{signal}: no trial was running. The same command continues the study.")
    return Interrupted(
        f"{signal}: {len(stopped)} trials were running. With the same command, each {CONTINUES}."
    )
