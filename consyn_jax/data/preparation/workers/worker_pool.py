"""Worker processes of this machine.

Each worker is a new interpreter that runs this module, not a fork: a fork of a process with threads
(such as JAX's) may hang, and `multiprocessing` would run the user's script again. Workers exchange
JSON and arrays with the main process over pipes. A worker ends when its input ends, so no worker
outlives the main process.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, cast

import numpy as np

from consyn_jax.data.preparation.workers.messages import (
    WorkerSettings,
    block_from,
    block_head,
    result_from,
    result_head,
)
from consyn_jax.data.preparation.workers.ordered_results import Workers, in_order
from consyn_jax.data.preparation.workers.worker import Result, Worker
from consyn_jax.data.sources.reader import Block
from consyn_jax.errors import AGAIN, UserError

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from consyn_jax.data.preparation.workers.worker_pool import main; main()"
)
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class WorkerPool(Workers):
    """`count` worker processes; with a count of 0, this process does the work.

    Raises:
        UserError: the processes cannot be started, or one was killed.
    """

    def __init__(self, count: int, settings: WorkerSettings) -> None:
        self._here = settings.worker() if count == 0 else None
        self._processes: list[_Process] = []
        try:
            for _ in range(count):
                self._processes.append(_Process(settings))
        except OSError as error:
            for process in self._processes:
                process.close()
            raise UserError(
                f"{count} worker processes cannot be started: {error.strerror}. Lower "
                "--num_workers."
            ) from error
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(max(count, 1), "data worker")

    def results(self, blocks: Iterable[tuple[Any, Block]]) -> Iterator[tuple[Any, Block, Result]]:
        """Process (tag, block) pairs; yield (tag, block, result) in the same order.

        About two blocks per process are in progress at a time.
        """
        if self._here is not None:
            for tag, block in blocks:
                yield tag, block, self._here.work(block)
            return
        most = 2 * len(self._processes) + 1
        # A block has about a megabyte, and at most 64 MiB, if it is one long row.
        yield from in_order(blocks, self._submit, lambda: most, sys.maxsize)

    def _submit(self, block: Block) -> Future[Result]:
        return self._threads.submit(self._work, block)

    def _work(self, block: Block) -> Result:
        process = self._idle.get()
        try:
            return process.work(block)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes; blocks in progress are lost."""
        for process in self._processes:
            process.close()
        self._threads.shutdown(cancel_futures=True)


class _Process:
    """One worker process.

    Args:
        settings: settings of the worker, sent with the first block.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        package = str(Path(__file__).parents[4])
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        # -P: a file json.py in the user's directory must not be imported.
        command = [sys.executable, "-P", "-c", _BOOT, package]
        # Ctrl-C reaches the whole process group, but only the main process may react to it. So the
        # child starts with these signals blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._settings: WorkerSettings | None = settings

    def work(self, block: Block) -> Result:
        """Send `block` to the process, and return the result of its `Worker.work`."""
        settings = None if self._settings is None else self._settings.to_json()
        sent = {"block": block_head(block), "settings": settings}
        self._settings = None
        try:
            _write(cast(BinaryIO, self._child.stdin), sent, [block.data])
            head, buffers = _read(cast(BinaryIO, self._child.stdout))
        except (EOFError, BrokenPipeError) as error:
            code = self._child.wait()
            if code >= 0:
                raise RuntimeError(
                    f"A data worker exited with {code}; its traceback is above."
                ) from error
            raise UserError(
                f"A worker process was killed by signal {-code}; running out of memory is the "
                f"usual cause. Lower --num_workers, and {AGAIN}."
            ) from error
        arrays = [
            np.frombuffer(data, kind).reshape(shape)
            for data, (kind, shape) in zip(buffers, head["arrays"], strict=True)
        ]
        return result_from(head["result"], arrays)

    def close(self) -> None:
        """Kill the process."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # some input was not flushed
                    pipe.close()


def main() -> None:
    """Run a worker: read blocks and write results until the input ends."""
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    worker: Worker | None = None
    while True:
        try:
            head, (data,) = _read(incoming)
        except EOFError:
            return
        if head["settings"] is not None:
            worker = WorkerSettings.from_json(head["settings"]).worker()
        assert worker is not None
        result, arrays = result_head(worker.work(block_from(head["block"], data)))
        answer = {"result": result, "arrays": [(array.dtype.str, array.shape) for array in arrays]}
        try:
            _write(outgoing, answer, [array.tobytes() for array in arrays])
        except BrokenPipeError:
            os._exit(0)  # the main process is gone, and a normal exit would complain of the buffer


def _write(pipe: BinaryIO, head: dict[str, Any], buffers: Sequence[bytes]) -> None:
    text = json.dumps(head).encode()
    pipe.write(struct.pack(f"<QQ{len(buffers)}Q", len(text), len(buffers), *map(len, buffers)))
    for data in (text, *buffers):
        pipe.write(data)
    pipe.flush()


def _read(pipe: BinaryIO) -> tuple[dict[str, Any], list[bytes]]:
    """Read a message: its JSON object, and its buffers.

    Raises:
        EOFError: the other process has closed the pipe.
    """
    length, count = struct.unpack("<QQ", _exactly(pipe, 16))
    sizes = struct.unpack(f"<{count}Q", _exactly(pipe, 8 * count))
    head = json.loads(_exactly(pipe, length))
    return head, [_exactly(pipe, size) for size in sizes]


def _exactly(pipe: BinaryIO, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data
