"""Processes that work on blocks, and their results in the order of the blocks.

They are interpreters of their own that run this module, and not forks: a fork of a process with threads (JAX's, say) may hang, and
`multiprocessing` would run the user's script again. What goes over the pipes is JSON and arrays. A worker ends when its input does,
so none outlives the main process, however that ended.
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

from consyn_jax.config import CorpusOptions, UserError
from consyn_jax.data.reading import Block
from consyn_jax.data.work import Kept, Result, Worker
from consyn_jax.tokenization import BPETokenizer

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from consyn_jax.data.workers import main; main()"
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Workers:
    """`count` processes, or with a count of 0 this one.

    Raises:
        UserError: a process was killed.
    """

    def __init__(self, count: int, options: CorpusOptions, tokenizer: BPETokenizer, test_fraction: float, single: bool) -> None:
        self._here = Worker(options, tokenizer, test_fraction, single) if count == 0 else None
        text, bos, eos, pad = tokenizer.__reduce__()[1]
        recipe = {"options": dataclasses.asdict(options), "tokenizer": [text, bos, eos, pad], "test_fraction": test_fraction, "single": single}
        self._processes: list[_Process] = []
        try:
            for _ in range(count):
                self._processes.append(_Process(recipe))
        except OSError as error:
            for process in self._processes:
                process.close()
            raise UserError(f"{count} processes cannot be started: {error.strerror}. Lower --num_workers.") from error
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(max(count, 1), "data worker")

    def results(self, blocks: Iterable[tuple[Any, Block]]) -> Iterator[tuple[Any, Block, Result]]:
        """(tag, block, result) for each (tag, block), in order. About two blocks a process are under way."""
        if self._here is not None:
            for tag, block in blocks:
                yield tag, block, self._here.work(block)
            return
        under_way: deque[tuple[Any, Block, Future[Result]]] = deque()
        for tag, block in blocks:
            under_way.append((tag, block, self._threads.submit(self._work, block)))
            while under_way and (len(under_way) > 2 * len(self._processes) + 1 or under_way[0][2].done()):
                tag, block, future = under_way.popleft()
                yield tag, block, future.result()
        while under_way:
            tag, block, future = under_way.popleft()
            yield tag, block, future.result()

    def _work(self, block: Block) -> Result:
        process = self._idle.get()
        try:
            return process.work(block)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes; what they are at is lost."""
        for process in self._processes:
            process.close()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    def __init__(self, recipe: dict[str, Any]) -> None:
        package = str(Path(__file__).parents[2])
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # -P: a file json.py in the user's directory is none of ours
        command = [sys.executable, "-P", "-c", _BOOT, package]
        # Ctrl-C and the like reach the whole group. Which blocks get done is for the main process to decide, and from the child's first
        # moment on, so it is born with these signals blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._recipe: dict[str, Any] | None = recipe

    def work(self, block: Block) -> Result:
        sent = {**dataclasses.asdict(block), "data": None, "recipe": self._recipe}
        self._recipe = None
        try:
            _write(cast(BinaryIO, self._child.stdin), sent, [block.data])
            head, buffers = _read(cast(BinaryIO, self._child.stdout))
        except (EOFError, BrokenPipeError) as error:
            code = self._child.wait()
            if code >= 0:
                raise RuntimeError(f"A data worker ended with {code}; its traceback is above.") from error
            raise UserError(
                f"A process that tokenises was killed by signal {-code}, as happens when memory runs out. Lower --num_workers, and run the command again."
            ) from error
        arrays = [np.frombuffer(data, kind).reshape(shape) for data, (kind, shape) in zip(buffers, head["arrays"], strict=True)]
        dropped = [(rule, place, text) for rule, place, text in head.pop("dropped")]
        return Result(Kept(*arrays), dropped, **{name: value for name, value in head.items() if name != "arrays"})

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # something was left to flush
                    pipe.close()


def main() -> None:
    """A worker: blocks in, results out, until the input ends. The first block brings what all are worked on with."""
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    worker: Worker | None = None
    while True:
        try:
            head, (data,) = _read(incoming)
        except EOFError:
            return
        recipe = head.pop("recipe")
        if recipe is not None:
            worker = Worker(_options(recipe["options"]), BPETokenizer(*recipe["tokenizer"]), recipe["test_fraction"], recipe["single"])
        assert worker is not None
        result = worker.work(Block(**{**head, "data": data, "end": tuple(head["end"]) if head["end"] else None, "numbers": tuple(head["numbers"])}))
        arrays = result.kept.arrays()
        answer = {**vars(result), "arrays": [(array.dtype.str, array.shape) for array in arrays]}
        del answer["kept"]
        try:
            _write(outgoing, answer, [np.ascontiguousarray(array).tobytes() for array in arrays])
        except BrokenPipeError:
            os._exit(0)  # nobody is there to whom the rest in the buffer, or a complaint about it, could be of use


def _options(values: dict[str, Any]) -> CorpusOptions:
    names = {f.name for f in dataclasses.fields(CorpusOptions)}
    chosen: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in names}
    return CorpusOptions(**chosen)


def _write(pipe: BinaryIO, head: dict[str, Any], buffers: Sequence[bytes]) -> None:
    text = json.dumps(head).encode()
    pipe.write(struct.pack(f"<QQ{len(buffers)}Q", len(text), len(buffers), *map(len, buffers)))
    for data in (text, *buffers):
        pipe.write(data)
    pipe.flush()


def _read(pipe: BinaryIO) -> tuple[dict[str, Any], list[bytes]]:
    """EOFError: the other side is gone."""
    length, count = struct.unpack("<QQ", _exactly(pipe, 16))
    sizes = struct.unpack(f"<{count}Q", _exactly(pipe, 8 * count))
    head = json.loads(_exactly(pipe, length))
    return head, [_exactly(pipe, size) for size in sizes]


def _exactly(pipe: BinaryIO, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data
