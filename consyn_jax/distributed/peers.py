"""The processes of one run, and what they tell each other outside of JAX: who is there, how far each has come, and why all of them end.

JAX's own runtime ends a process with a stack trace when another one is missing, comes twice or dies. So process 0 listens on the
coordinator's address, each other process keeps one connection to it, and what goes over them are lines of JSON. JAX is opened behind
this, on a port of its own. What is waited for here may take as long as it likes: that the others are alive is known.
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

BEAT_S = 2.0  # between two signs of life
LOST_S = 40.0  # without one, a process counts as dead: it is frozen, or its host is gone
PARTING_S = 5.0  # for the others to hear why all end
LONGEST = 1 << 24  # bytes of a message
LOST = 76  # exit code of those that are left: EX_PROTOCOL of sysexits.h, "remote error in protocol"
AGAIN = "Run the same command again to go on from the last checkpoint."


class Line:
    """A connection. Messages are JSON arrays, their first element says what they are."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.silent_s = 0.0
        self.left = self.closed = False
        self.progress: dict[str, Any] = {}
        self._rest = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, *message: Any) -> None:
        """What cannot be sent is lost; that the other end is gone is noticed where it is read from."""
        with self._sending, suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[list[Any]] | None:
        """The messages that have come; None when the other end is gone, or is none of ours."""
        try:
            data = self.connection.recv(1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        if not data or len(self._rest) > LONGEST or not all(isinstance(message, list) for message in messages):
            return None
        return messages

    def first(self, wait_s: float) -> list[Any] | None:
        """The first message, or None when there is none in time."""
        self.connection.settimeout(wait_s)
        while (messages := self.receive()) is not None:
            if messages:
                return messages[0]
        return None


_current: Peers | None = None


def current_peers() -> Peers | None:
    """The processes of this run, where `launch.runtime` has brought several together."""
    return _current


def is_first() -> bool:
    """Whether this process is the one that writes what one should write."""
    return _current is None or _current.process_id == 0


def set_current_peers(peers: Peers | None) -> None:
    """For `launch.runtime`."""
    global _current
    _current = peers


class Peers:
    """The processes of this run, and a thread that hears from them.

    When another process is gone, or ends with an error, the thread says so on stderr and ends this one.

    Args:
        names: of every process: its number, pid and host.
        lines: to process 0, or from process 0 to each other one.
        prog: the name of the command, for messages.

    Attributes:
        process_id: of this process.
        progress: of this process, as JSON; process 0 is told.
        noted: what some process told all with `note`.
        describe: says, of the progress of every process, which is behind; called in process 0.
        before_end: called before the thread ends this process, with True where nothing moved.
    """

    def __init__(self, process_id: int, names: list[str], lines: dict[int, Line], prog: str) -> None:
        self.process_id, self.names, self.prog = process_id, names, prog
        self.progress: dict[str, Any] = {}
        self.noted: str | None = None
        self.describe: Callable[[list[dict[str, Any]]], str] = str
        self.before_end: Callable[[bool], None] = lambda stuck: None
        self._lines = lines
        self._asked = 0
        self._told: dict[int, dict[int, str]] = {}
        self._answers: dict[int, list[str]] = {}
        self._news = threading.Condition()
        self._end_lock, self._ends = threading.Lock(), False
        self._closing = threading.Event()
        for line in lines.values():
            line.connection.settimeout(LOST_S)
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._thread.start()

    def gather(self, own: str) -> list[str]:
        """What every process says, by process. All must ask, in the same order; the slowest is waited for."""
        with self._news:
            number, self._asked = self._asked, self._asked + 1
        if self.process_id:
            self._lines[0].send("say", number, own)
        else:
            self._said(0, number, own)
        with self._news:
            self._news.wait_for(lambda: number in self._answers)
            return self._answers.pop(number)

    def note(self, text: str) -> None:
        """Tell all, at any time."""
        if self.process_id:
            self._lines[0].send("note", text)
        else:
            self._noted(text)

    # --------------------------------------------------------------------------------------------------------------------- ends

    def leave(self) -> None:
        """This process has done its work: when its connection closes, nothing is wrong."""
        for line in self._lines.values():
            line.send("leave")

    def close(self) -> None:
        """Hear no more."""
        self._closing.set()
        self._thread.join()
        for line in self._lines.values():
            line.connection.close()

    def fail(self, code: int, sentence: str) -> None:
        """This process will end with `code`, and the others shall know why and end likewise. Returns when they do, or soon."""
        if not self._begin_end():
            self.await_end(LOST_S)
        if self.process_id:
            self._lines[0].send("fail", code, sentence)
            self._parted([self._lines[0]])
        else:
            self._tell_end(code, f"{self.names[0]}: {sentence}", stuck=False)

    def stuck(self) -> None:
        """Nothing moves here: all end, and the process that is behind is named. Does not return."""
        if self.process_id:
            self._lines[0].send("stuck")
            self.await_end(2 * PARTING_S)
            self.before_end(True)
            self._end_here(LOST, f"Nothing moves, and {self.names[0]} does not answer. {AGAIN}")
        else:
            self._all_stuck()
            self.await_end(LOST_S)  # another end was under way

    def await_end(self, seconds: float) -> None:
        """Give the thread the time to hear what another process died of, and to end this one."""
        self._thread.join(seconds)

    def _begin_end(self) -> bool:
        with self._end_lock:
            first, self._ends = not self._ends, True
        return first

    def _all_stuck(self) -> None:
        everyone = [self.progress, *(line.progress for _, line in sorted(self._lines.items()))]
        self._end_all(LOST, self.describe(everyone), stuck=True)

    def _end_all(self, code: int, sentence: str, *, stuck: bool = False, origin: int | None = None) -> None:
        if self._begin_end():
            self.before_end(stuck)  # while it still stands where it stood: what it waits for fails as soon as the others are gone
            self._tell_end(code, sentence, stuck, origin)
            self._end_here(code, sentence)

    def _tell_end(self, code: int, sentence: str, stuck: bool, origin: int | None = None) -> None:
        """The others of process 0 end before it does: else its end would be the cause that they name."""
        lines = [line for number, line in self._lines.items() if number != origin and not line.closed and self.process_id == 0]
        for line in lines:
            line.send("end", code, sentence, stuck)
        self._parted(lines)

    def _parted(self, lines: list[Line]) -> None:
        deadline = time.monotonic() + PARTING_S
        for line in lines:
            while not line.closed and time.monotonic() < deadline:
                if threading.current_thread() is self._thread:
                    line.connection.settimeout(PARTING_S)
                    line.closed = line.receive() is None
                else:
                    time.sleep(0.01)

    def _end_here(self, code: int, sentence: str) -> None:
        with suppress(OSError, ValueError):  # whoever read it is gone
            sys.stdout.flush()
            os.write(2, f"\n{self.prog}: {sentence}\n".encode())
        os._exit(code)

    # ------------------------------------------------------------------------------------------------------------------- thread

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, number)
            last = time.monotonic()
            while not self._closing.is_set():
                for key, _ in selector.select(min(BEAT_S, 0.5)):
                    line = self._lines[key.data]
                    messages = line.receive()
                    if messages is None:
                        line.closed = True
                        selector.unregister(line)
                        if not line.left:
                            self._end_all(LOST, self._gone(key.data, "is gone"))
                    for message in messages or []:
                        line.silent_s = 0.0
                        self._take(key.data, line, message)
                if (passed := time.monotonic() - last) >= BEAT_S:
                    last = time.monotonic()
                    self._beat(min(passed, 2 * BEAT_S))  # longer: this process itself stood still, and could hear nobody

    def _take(self, number: int, line: Line, message: list[Any]) -> None:
        match message:
            case ["beat", progress]:
                line.progress = progress
            case ["say", question, text]:
                self._said(number, question, text)
            case ["all", question, texts]:
                self._answered(question, texts)
            case ["note", text]:
                self._noted(text)
            case ["leave"]:
                line.left = True
            case ["stuck"]:
                self._all_stuck()
            case ["fail", code, sentence]:
                self._end_all(code, f"{self.names[number]}: {sentence}", origin=number)
            case ["end", code, sentence, stuck]:
                line.closed = True  # process 0 waits for this one
                if self._begin_end():
                    self.before_end(stuck)
                    self._end_here(code, sentence)

    def _beat(self, passed: float) -> None:
        for number, line in self._lines.items():
            if line.closed or line.left:
                continue
            line.send("beat", self.progress)
            line.silent_s += passed
            if line.silent_s > LOST_S:
                self._end_all(LOST, self._gone(number, f"has given no sign of life for {line.silent_s:.0f} s"), origin=number)

    def _gone(self, number: int, what: str) -> str:
        return f"{self.names[number]} {what}, so the run ends. {AGAIN}"

    def _said(self, number: int, question: int, text: str) -> None:
        """Process 0: what one process says; when all have said it, all are told."""
        with self._news:
            texts = self._told.setdefault(question, {})
            texts[number] = text
            complete = [texts[n] for n in range(len(self.names))] if len(texts) == len(self.names) else None
        if complete is not None:
            for line in self._lines.values():
                line.send("all", question, complete)
            self._answered(question, complete)

    def _answered(self, question: int, texts: list[str]) -> None:
        with self._news:
            self._told.pop(question, None)
            self._answers[question] = texts
            self._news.notify_all()

    def _noted(self, text: str) -> None:
        self.noted = text
        if self.process_id == 0:
            for line in self._lines.values():
                line.send("note", text)
