"""The processes of a run, and messages between them that do not use JAX.

The processes exchange short texts and their progress. If one of them fails, it sends the reason to
the others, and all of them end. JAX's own runtime would end a process with a stack trace if another
process is missing, starts twice or dies. So process 0 listens on the coordinator's address, and
every other process keeps one connection to process 0. Messages are lines of JSON. JAX is
initialised afterwards, on a different port. `gather` waits without a time limit, because heartbeats
show that the other processes are alive.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from consyn_jax.errors import CONTINUES, advised, visible

BEAT_S = 2.0  # between two heartbeats
LOST_S = 40.0  # a process without a heartbeat for this long counts as dead
PARTING_S = 5.0  # time for the other processes to receive the reason for the end
# srun ends a step as soon as its last task has exited, and may drop output that the task wrote just
# before.
OUTPUT_S = 1.0
LONGEST = 1 << 24  # bytes of a message
LOST = 76  # exit code of the surviving processes: EX_PROTOCOL of sysexits.h
CONTINUE_ADVICE = f"The same command {CONTINUES}."


class Connection:
    """A connection that carries JSON arrays, whose first element is the kind of message.

    Attributes:
        silent_s: Seconds since the last message arrived.
        left: Whether the other process has finished, so that closing the connection is not a
            failure.
        closed: Whether no more messages can arrive.
        progress: Progress of the other process in its last heartbeat.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.silent_s = 0.0
        self.left = self.closed = False
        self.progress: dict[str, Any] = {}
        self._rest = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """File descriptor of the socket, for `selectors`."""
        return self.socket.fileno()

    def send(self, *message: Any) -> None:
        """Send a message; failures are ignored, because `receive` reports a lost connection."""
        with self._sending, suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[list[Any]] | None:
        """Return the messages that have arrived; None if the connection or a message is broken."""
        try:
            data = self.socket.recv(1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        if not data or len(self._rest) > LONGEST:
            return None
        return messages if all(isinstance(message, list) for message in messages) else None

    def first_message(self, timeout_s: float) -> list[Any] | None:
        """Return the first message; None if none arrives in time."""
        self.socket.settimeout(timeout_s)
        while (messages := self.receive()) is not None:
            if messages:
                return messages[0]
        return None


_current: ProcessGroup | None = None


def current_process_group() -> ProcessGroup | None:
    """The process group that `launch.runtime` has set; None in a run of one process."""
    return _current


def is_first() -> bool:
    """Whether this is process 0, which writes what only one process should write."""
    return _current is None or _current.process_id == 0


def gather(own: str) -> list[str]:
    """Collect one text from every process of this run, in the order of the process numbers.

    All processes must make the same calls in the same order. The call waits for the slowest
    process. In a run of one process it returns `[own]`.
    """
    return [own] if _current is None else _current.gather(own)


def set_current_process_group(process_group: ProcessGroup | None) -> None:
    """Set the result of `current_process_group`; called by `launch.runtime`."""
    global _current
    _current = process_group


class ProcessGroup:
    """The processes of this run, with a thread that listens to the other processes.

    If another process dies or ends with an error, the thread prints the reason on stderr and ends
    this process.

    Args:
        names: Number, pid and host of every process, as text.
        connections: In process 0, connections to all other processes; elsewhere, the connection to
            process 0.
        prog: Name of the command, for messages.

    Attributes:
        process_id: Number of this process.
        progress: Progress of this process as JSON, which heartbeats send to process 0.
        noted: The latest text that any process has sent with `note`.
        describe: Function that names the process that is late, given the progress of all processes.
            It is called in process 0.
        before_end: Function that is called before the thread ends this process. Its argument is
            True if the run is stuck.
    """

    def __init__(
        self, process_id: int, names: list[str], connections: dict[int, Connection], prog: str
    ) -> None:
        self.process_id, self.names, self.prog = process_id, names, prog
        self.progress: dict[str, Any] = {}
        self.noted: str | None = None
        self.describe: Callable[[list[dict[str, Any]]], str] = str
        self.before_end: Callable[[bool], None] = lambda stuck: None
        self._connections = connections
        self._gathers = 0
        self._texts: dict[int, dict[int, str]] = {}  # gather -> process -> text, in process 0
        self._gathered: dict[int, list[str]] = {}
        self._news = threading.Condition()
        self._end_lock, self._ending = threading.Lock(), False
        self._closing = threading.Event()
        for connection in connections.values():
            connection.socket.settimeout(LOST_S)
        self._thread = threading.Thread(target=self._listen, name="process_group", daemon=True)
        self._thread.start()

    def gather(self, own: str) -> list[str]:
        """Collect one text from every process, in the order of the process numbers.

        All processes must make the same calls in the same order. The call waits for the slowest
        process.
        """
        with self._news:
            number, self._gathers = self._gathers, self._gathers + 1
        if self.process_id:
            self._connections[0].send("say", number, own)
        else:
            self._collect(0, number, own)
        with self._news:
            self._news.wait_for(lambda: number in self._gathered)
            return self._gathered.pop(number)

    def note(self, text: str) -> None:
        """Send `text` to all processes, which store it in `noted`; may be called at any time."""
        if self.process_id:
            self._connections[0].send("note", text)
        else:
            self._spread_note(text)

    # ------------------------------------------------------------------------------ ending the run

    def leave(self) -> None:
        """Announce that this process has finished; closing its connection is then no failure."""
        for connection in self._connections.values():
            connection.send("leave")

    def close(self) -> None:
        """Stop the thread, and close the connections."""
        self._closing.set()
        self._thread.join()
        for connection in self._connections.values():
            connection.socket.close()

    def fail(self, code: int, sentence: str) -> None:
        """End the other processes with exit code `code`, because this process is about to fail.

        The call returns when the other processes have ended, or after a few seconds.
        """
        if not self._begin_end():
            self.await_end(LOST_S)
        if self.process_id:
            self._connections[0].send("fail", code, sentence)
            self._await_closed([self._connections[0]])
        else:
            self._end_others(code, f"{self.names[0]}: {sentence}", stuck=False)

    def stuck(self) -> None:
        """End all processes because this process makes no progress; this call does not return."""
        if self.process_id:
            self._connections[0].send("stuck")
            self.await_end(2 * PARTING_S)
            self.before_end(True)
            silence = f"No progress, and {self.names[0]} does not answer."
            self._exit(LOST, f"{silence} {CONTINUE_ADVICE}")
        else:
            self._end_stuck()
            self.await_end(LOST_S)  # the run was already ending for another reason

    def await_end(self, seconds: float) -> None:
        """Wait up to `seconds` for the thread to end this process.

        The thread does so when it learns that another process has died.
        """
        self._thread.join(seconds)

    def _begin_end(self) -> bool:
        with self._end_lock:
            first, self._ending = not self._ending, True
        return first

    def _end_stuck(self) -> None:
        others = (connection.progress for _, connection in sorted(self._connections.items()))
        self._end_all(LOST, self.describe([self.progress, *others]), stuck=True)

    def _end_all(
        self, code: int, sentence: str, *, stuck: bool = False, origin: int | None = None
    ) -> None:
        if self._begin_end():
            # Call this before the other processes end, because collectives of this process fail
            # without them.
            self.before_end(stuck)
            self._end_others(code, sentence, stuck, origin)
            self._exit(code, sentence)

    def _end_others(self, code: int, sentence: str, stuck: bool, origin: int | None = None) -> None:
        """In process 0, end the other processes and wait for their exit.

        If process 0 exited first, the other processes would report process 0 as the cause.
        """
        connections = [
            connection
            for number, connection in self._connections.items()
            if number != origin and not connection.closed and self.process_id == 0
        ]
        for connection in connections:
            connection.send("end", code, sentence, stuck)
        self._await_closed(connections)

    def _await_closed(self, connections: list[Connection]) -> None:
        deadline = time.monotonic() + PARTING_S
        for connection in connections:
            while not connection.closed and time.monotonic() < deadline:
                if threading.current_thread() is self._thread:
                    connection.socket.settimeout(PARTING_S)
                    connection.closed = connection.receive() is None
                else:
                    time.sleep(0.01)

    def _exit(self, code: int, sentence: str) -> None:
        with suppress(OSError, ValueError):  # the output may be closed
            sys.stdout.flush()
            os.write(2, f"\n{self.prog}: {visible(advised(sentence))}\n".encode())
        if "SLURM_STEP_ID" in os.environ:
            time.sleep(OUTPUT_S)
        os._exit(code)

    # --------------------------------------------------------------------------------------- thread

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, number)
            last = time.monotonic()
            while not self._closing.is_set():
                for key, _ in selector.select(min(BEAT_S, 0.5)):
                    connection = self._connections[key.data]
                    messages = connection.receive()
                    if messages is None:
                        connection.closed = True
                        selector.unregister(connection)
                        if not connection.left:
                            self._end_all(LOST, self._lost(key.data, "is gone"))
                    for message in messages or []:
                        connection.silent_s = 0.0
                        self._handle(key.data, connection, message)
                if (passed := time.monotonic() - last) >= BEAT_S:
                    last = time.monotonic()
                    # A longer time means that this process itself was frozen and could not receive
                    # heartbeats.
                    self._beat(min(passed, 2 * BEAT_S))

    def _handle(self, number: int, connection: Connection, message: list[Any]) -> None:
        match message:
            case ["beat", progress]:
                connection.progress = progress
            case ["say", gather, text]:
                self._collect(number, gather, text)
            case ["all", gather, texts]:
                self._finish_gather(gather, texts)
            case ["note", text]:
                self._spread_note(text)
            case ["leave"]:
                connection.left = True
            case ["stuck"]:
                self._end_stuck()
            case ["fail", code, sentence]:
                self._end_all(code, f"{self.names[number]}: {sentence}", origin=number)
            case ["end", code, sentence, stuck]:
                connection.closed = True  # process 0 waits for this process
                if self._begin_end():
                    self.before_end(stuck)
                    self._exit(code, sentence)

    def _beat(self, passed: float) -> None:
        for number, connection in self._connections.items():
            if connection.closed or connection.left:
                continue
            connection.send("beat", self.progress)
            connection.silent_s += passed
            if connection.silent_s > LOST_S:
                silence = f"has sent no heartbeat for {connection.silent_s:.0f} s"
                self._end_all(LOST, self._lost(number, silence), origin=number)

    def _lost(self, number: int, what: str) -> str:
        return f"{self.names[number]} {what}, so the run ends. {CONTINUE_ADVICE}"

    def _collect(self, number: int, gather: int, text: str) -> None:
        """In process 0, store a process's text; after the last text, send all texts to everyone."""
        with self._news:
            texts = self._texts.setdefault(gather, {})
            texts[number] = text
            complete = len(texts) == len(self.names)
        if complete:
            in_order = [texts[n] for n in range(len(self.names))]
            for connection in self._connections.values():
                connection.send("all", gather, in_order)
            self._finish_gather(gather, in_order)

    def _finish_gather(self, gather: int, texts: list[str]) -> None:
        with self._news:
            self._texts.pop(gather, None)
            self._gathered[gather] = texts
            self._news.notify_all()

    def _spread_note(self, text: str) -> None:
        self.noted = text
        if self.process_id == 0:
            for connection in self._connections.values():
                connection.send("note", text)
