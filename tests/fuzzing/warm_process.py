"""Commands of this package run in forks: each in one of its own, or many in one that stays."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Command = Callable[[list[str]], int]
WALL_S = 300.0
ROOM = 64 << 30  # bytes of address space


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code; negative for a signal, as for one that took too long.
        cpu_s: seconds of processor time.
        said: its output.
    """

    code: int
    cpu_s: float
    said: str


def run_forked(call: Callable[[], int], output: Path, wall_s: float = WALL_S) -> Ended:
    """Run a command in a fork of this process."""
    if (pid := os.fork()) == 0:
        _begin()
        _write_to(output)
        code = _outcome(call)
        os._exit(code)  # without what the parent would do at its end
    deadline = time.monotonic() + wall_s
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return Ended(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, _text(output))


class WarmProcess:
    """A fork that runs one command after another.

    It keeps what JAX, Orbax and Arrow have started and traced, and nothing else: paths differ from
    command to command, so that what is remembered by path is read again. It is replaced by a new
    one after `most` commands, and after one that did not end or left a thread behind.
    """

    def __init__(
        self, commands: dict[str, Command], prepare: Callable[[], None], most: int
    ) -> None:
        self._commands, self._prepare, self._most = commands, prepare, most
        self._pid, self._left, self._used_s = 0, 0, 0.0
        self.known: set[str] = set()  # commands that this process has run before

    def run(self, verb: str, argv: list[str], output: Path) -> Ended:
        """Run a command."""
        if not self._pid:
            self._start()
        task = json.dumps([verb, argv, str(output)]) + "\n"
        os.write(self._tasks, task.encode())
        deadline = time.monotonic() + WALL_S
        ready: list[int] = []
        while not ready and time.monotonic() < deadline:
            ready, *_ = select.select([self._answers], [], [], 1.0)
        answer = os.read(self._answers, 1000) if ready else b""
        self._left -= 1
        if not answer:
            return self._end(output)
        code, cpu_s, is_clean = json.loads(answer)
        self._used_s += cpu_s
        self.known.add(verb)
        if not is_clean or not self._left:
            self.close()
        return Ended(code, cpu_s, _text(output))

    def close(self) -> None:
        """End the process."""
        if self._pid:
            self._end(None)

    def _end(self, output: Path | None) -> Ended:
        ended, status, usage = os.wait4(self._pid, os.WNOHANG)
        if not ended:
            os.killpg(self._pid, signal.SIGKILL)
            _, status, usage = os.wait4(self._pid, 0)
        for end in (self._tasks, self._answers):
            os.close(end)
        self._pid = 0
        used = usage.ru_utime + usage.ru_stime - self._used_s
        return Ended(os.waitstatus_to_exitcode(status), used, _text(output) if output else "")

    def _start(self) -> None:
        tasks, self._tasks = os.pipe()
        self._answers, answers = os.pipe()
        self._left, self._used_s, self.known = self._most, 0.0, set()
        if (pid := os.fork()) == 0:
            for end in (self._tasks, self._answers):
                os.close(end)
            _begin()
            self._prepare()
            with os.fdopen(tasks, "rb") as given:
                for line in given:
                    os.write(answers, self._answer(*json.loads(line)))
            os._exit(0)
        for end in (tasks, answers):
            os.close(end)
        self._pid = pid

    def _answer(self, verb: str, argv: list[str], output: str) -> bytes:
        _write_to(Path(output))
        before, began = threading.active_count(), time.process_time()
        code = _outcome(lambda: self._commands[verb](argv))
        cpu_s = time.process_time() - began
        is_clean = threading.active_count() <= before or verb not in self.known
        self.known.add(verb)
        return json.dumps([code, cpu_s, is_clean]).encode()


def _begin() -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))


def _write_to(output: Path) -> None:
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1), os.dup2(written, 2)
    os.close(written)


def _outcome(call: Callable[[], int]) -> int:
    code = 1
    try:
        code = call()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:  # noqa: BLE001 - what a process would end with
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    return code


def _text(output: Path) -> str:
    return output.read_text(errors="surrogateescape")
