"""Real processes of our commands, without the seconds that each would take to import JAX: one
process imports it, and forks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest
from free_ports import free_port

MODEL = [
    "--model",
    "haiku",
    "--hidden_dim",
    "32",
    "--num_heads",
    "2",
    "--num_layers",
    "1",
    "--tokenizer",
    "bytes",
]
# One program for all: to compile it takes longer than to run it, and does once for each number of
# processes.
FLAGS = [
    *MODEL,
    "--max_steps",
    "16",
    "--max_tokens",
    "32",
    "--batch_size",
    "8",
    "--validation_fraction",
    "0.2",
    "--quiet",
]
FLAGS += ["--logging_steps", "1"]
TRACKED, FLAGS = FLAGS, [*FLAGS, "--logging_backend", "none"]  # a second one would add to the first
DEVICES = 4  # of all processes of a run


def slow(seconds: float, after: int = 5) -> str:
    """Python for a run whose batches after that of a step take so long."""
    return f"""
import time
from consyn_jax.data import loader
inner = loader.BatchLoader.batch
def batch(self, step):
    time.sleep({seconds} if step > {after} else 0)
    return inner(self, step)
loader.BatchLoader.batch = batch
"""


SLOW = slow(1)

# For the thread that reads: wait until the main thread waits for data, and has done so for so long,
# or waits for the end of this thread.
MAIN_WAITS = """
import sys, threading, time
def main_waits(seconds):
    since = time.monotonic()
    while time.monotonic() < since + seconds:
        frame, names = sys._current_frames()[threading.main_thread().ident], set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        if "_end_thread" in names:
            return
        if "_next_item" not in names:
            since = time.monotonic()
        time.sleep(0.01)
"""

# No batch after that of a step, counted from 0, before there is a file.
HELD = """
import os, time
from consyn_jax.data import loader
read = loader.BatchLoader.batch
def held(self, step):
    while step > {step} and not os.path.exists({until!r}):
        time.sleep(0.02)
    return read(self, step)
loader.BatchLoader.batch = held
"""

ONE = """
from consyn_jax.distributed import launch
def and_then(place, *more, meet=launch.meet):
    if place.process_id == {number}: exec({before!r}, {{}})
    return meet(place, *more)
launch.meet = and_then
"""

SOURCE = r"""
import gc, importlib, json, os, sys, types
import jax
import jax._src.cache_key, jax._src.compiler
import consyn_jax.distributed.launch, consyn_jax.model.pretrained.weights, consyn_jax.training.trainer, consyn_jax.training.runtime.watchdog
import consyn_jax.data.preparation.cached_store, consyn_jax.model.causal_lm, safetensors.numpy, jax.experimental.multihost_utils
import orbax.checkpoint, matplotlib.backends.backend_agg, matplotlib.figure, PIL.Image
PIL.Image.init()
import consyn_jax.cli.train, consyn_jax.training.run.ending
consyn_jax.training.run.ending.sample = lambda *_: "A sample that no model generated."

# Compiled programs are shared between processes, and between different numbers of them: the program is the same, and what JAX adds to its
# key on CPUs, and not on GPUs, are the devices. JAX writes to its cache in process 0 only.
key, options = jax._src.cache_key, jax._src.cache_key._hash_serialized_compile_options
key._hash_serialized_compile_options = lambda *args, **more: options(*args, **{**more, "strip_device_assignment": True})
key._hash_accelerator_config = lambda *args: None
jax._src.compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0, client=None))

def child(order):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    jax.config.update("jax_num_cpu_devices", order["devices"])
    os.chdir(order["directory"])
    command = importlib.import_module("consyn_jax.cli." + order["command"])
    exec(order["before"], {})
    sys.exit(command.main(order["argv"]))

# Children do not search all that is imported for unused cycles.
gc.collect()
gc.freeze()

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        pid, status = os.waitpid(order["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    elif (pid := os.fork()) == 0:
        child(order)
    else:
        print(pid, flush=True)
"""


def runs(thread: Path) -> bool:
    """Whether a thread, a directory in /proc, is neither stopped nor ended."""
    try:
        state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "TZX"


@dataclass
class Child:
    """A process, and where its output goes."""

    pid: int
    output: Path
    poll: Callable[[int], int | None]
    code: int | None = None

    @property
    def alive(self) -> bool:
        if self.code is None:
            self.code = self.poll(self.pid)
        return self.code is None

    @property
    def said(self) -> str:
        return self.output.read_text()

    def wait(self, seconds: float = 240) -> int:
        """The exit code; killed, and an error, where it takes longer."""
        deadline = time.monotonic() + seconds
        while self.alive:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} has not ended in {seconds} s: {self.said}")
            time.sleep(0.02)
        assert self.code is not None
        return self.code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def stop(self) -> None:
        """Send SIGSTOP, and wait until no thread runs: on a busy machine that takes a while."""
        self.signal(signal.SIGSTOP)
        with suppress(FileNotFoundError):  # it has ended
            while self.alive and any(map(runs, Path(f"/proc/{self.pid}/task").iterdir())):
                time.sleep(0.001)


class Nursery:
    """Starts processes.

    Args:
        place: where their output goes.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.children = place, list[Child]()
        self._process = subprocess.Popen(
            [sys.executable, "-c", SOURCE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._answer() == "ready"

    def start(
        self,
        *flags: object,
        devices: int = DEVICES,
        before: str = "",
        command: str = "train",
        directory: Path | None = None,
    ) -> Child:
        """`consyn-train` or another command with these flags.

        Args:
            before: Python code that runs first.
            directory: the current directory of the command; by default that of the tests.
        """
        output = self.place / f"output-{len(self.children)}"
        order = {
            "argv": [*map(str, flags)],
            "output": str(output),
            "devices": devices,
            "before": before,
            "command": command,
            "directory": str(directory or Path.cwd()),
        }
        self.children.append(
            Child(int(self._ask(order)), output, lambda pid: json.loads(self._ask({"poll": pid})))
        )
        return self.children[-1]

    def together(self, *flags: object, processes: int = 2, before: str = "") -> list[Child]:
        """The processes of one run."""
        run = [
            *flags,
            "--distributed",
            "--coordinator_address",
            f"localhost:{free_port()}",
            "--num_processes",
            processes,
        ]
        return [
            self.start(*run, "--process_id", number, devices=DEVICES // processes, before=before)
            for number in range(processes)
        ]

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self.children:
            if child.alive:
                child.signal(signal.SIGKILL)
                child.wait()
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _ask(self, order: dict[str, object]) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


_ONE: list[Nursery] = []


@pytest.fixture(scope="session")
def nursery(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """The same one for every module that imports this."""
    if _ONE:
        yield _ONE[0]
        return
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        _ONE.append(nursery)
        yield nursery
    _ONE.clear()


def of_process(number: int, before: str) -> str:
    """`before` for one of several processes."""
    return ONE.format(number=number, before=before)


def held(step: int, until: Path) -> str:
    """Python for a run that gets no batch after that of `step`, counted from 0, without a file."""
    return HELD.format(step=step, until=str(until))


def trained(path: Path, steps: int, child: Child) -> None:
    """Wait until the run in `path`, which `child` writes, has logged so many steps."""
    metrics, deadline = path / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count('"train/loss"') < steps:
        assert child.alive, f"ended with {child.code}: {child.said}"
        assert time.monotonic() < deadline, child.said
        time.sleep(0.01)
