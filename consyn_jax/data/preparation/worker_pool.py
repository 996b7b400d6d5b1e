"""Worker processes, and their results in the order of the blocks.

Each worker is a new interpreter that runs this module, not a fork: a fork of a process with threads
(such as JAX's) may hang, and `multiprocessing` would run the user's script again. Workers exchange
JSON and arrays with the main process over pipes. A worker ends when its input ends, so no worker
outlives the main process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, cast

import numpy as np

from consyn_jax.data.preparation.encoded_documents import EncodedDocuments
from consyn_jax.data.preparation.worker import Result, Worker
from consyn_jax.data.sources.reader import Block
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.chat.plain_template import PLAIN

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from consyn_jax.data.preparation.worker_pool import main; main()"
)
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class WorkerPool:
    """`count` worker processes; with a count of 0, this process does the work.

    Raises:
        UserError: the processes cannot be started, or one was killed.
    """

    def __init__(
        self,
        count: int,
        options: CorpusOptions,
        tokenizer: BPETokenizer,
        test_fraction: float,
        single: bool,
        chat_template: str = PLAIN,
        tool_template: str | None = None,
    ) -> None:
        self._here: Worker | None = None
        if count == 0:
            templates = chat_template, tool_template
            self._here = Worker(options, tokenizer, test_fraction, single, *templates)
        settings = {
            "options": dataclasses.asdict(options),
            "tokenizer": tokenizer.settings(),
            "test_fraction": test_fraction,
            "single": single,
            "templates": [chat_template, tool_template],
        }
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
        pending: deque[tuple[Any, Block, Future[Result]]] = deque()
        for tag, block in blocks:
            pending.append((tag, block, self._threads.submit(self._work, block)))
            most = 2 * len(self._processes) + 1
            while pending and (len(pending) > most or pending[0][2].done()):
                tag, block, future = pending.popleft()
                yield tag, block, future.result()
        while pending:
            tag, block, future = pending.popleft()
            yield tag, block, future.result()

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

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """One worker process.

    Args:
        settings: settings of the worker, sent with the first block.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        package = str(Path(__file__).parents[3])
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
        self._settings: dict[str, Any] | None = settings

    def work(self, block: Block) -> Result:
        """Send `block` to the process, and return the result of its `Worker.work`."""
        sent = {**dataclasses.asdict(block), "data": None, "settings": self._settings}
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
                "usual cause. Lower --num_workers, and run the command again."
            ) from error
        arrays = [
            np.frombuffer(data, kind).reshape(shape)
            for data, (kind, shape) in zip(buffers, head.pop("arrays"), strict=True)
        ]
        dropped = [(rule, place, text) for rule, place, text in head.pop("dropped")]
        return Result(EncodedDocuments(*arrays), dropped, **head)

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
        settings = head.pop("settings")
        if settings is not None:
            worker = Worker(
                _options(settings["options"]),
                BPETokenizer(**settings["tokenizer"]),
                settings["test_fraction"],
                settings["single"],
                *settings["templates"],
            )
        assert worker is not None
        end = tuple(head["end"]) if head["end"] else None
        lists = {name: tuple(head[name]) for name in ("numbers", "unread")}
        result = worker.work(Block(**{**head, **lists, "data": data, "end": end}))
        arrays = result.kept.arrays()
        answer = {**vars(result), "arrays": [(array.dtype.str, array.shape) for array in arrays]}
        del answer["kept"]
        try:
            _write(outgoing, answer, [np.ascontiguousarray(array).tobytes() for array in arrays])
        except BrokenPipeError:
            os._exit(0)  # the main process is gone, and a normal exit would complain of the buffer


def _options(values: dict[str, Any]) -> CorpusOptions:
    chosen: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(CorpusOptions)):
        chosen[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    return CorpusOptions(**chosen)


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
