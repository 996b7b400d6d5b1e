"""Threads for uploads; they do not keep the process alive when a server stops answering."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any


class DaemonThreads(Executor):
    """An executor like `ThreadPoolExecutor`, but the interpreter does not wait for its threads.

    Args:
        max_workers: Maximum number of threads. Each of the first `max_workers` tasks starts one.
    """

    def __init__(self, max_workers: int) -> None:
        self._max_workers, self._threads = max_workers, list[threading.Thread]()
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function in one of the threads."""
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - raised by `future.result`
                future.set_exception(error)
            else:
                future.set_result(result)

        self._tasks.put(work)
        if len(self._threads) < self._max_workers:
            thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after all submitted tasks."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join()
