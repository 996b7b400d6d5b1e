"""Texts between the processes of a run, through a store that all of them share."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import jax
import orbax.checkpoint as ocp
import pytest

from consyn_jax.training.checkpointing import exchange
from consyn_jax.training.checkpointing.exchange import TIMEOUT_MS, Exchange


class Store:
    """As JAX's: a key is written once, and reading waits for it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            assert key not in self.values
            self.values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        assert timeout_ms == TIMEOUT_MS
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.values, 60)
            return self.values[key]

    def key_value_delete(self, key: str) -> None:
        with self._changed:
            del self.values[key]


def test_every_process_gets_the_texts_of_all_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what all have read is deleted."""
    store, own, made = Store(), threading.local(), threading.Barrier(2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: own.number)
    monkeypatch.setattr(ocp.multihost, "get_jax_distributed_client", lambda: store)

    def refuse() -> None:
        assert own.number == 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def process(number: int) -> list[object]:
        own.number = number
        made.wait(60)
        told = Exchange()
        told._prefix = "first"
        found: list[object] = [told.gather(f"{turn} of {number}") for turn in range(3)]
        return [*found, told.on_first(refuse), told.on_first(lambda: None)]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(process, range(2)))
    texts = [[f"{turn} of {number}" for number in range(2)] for turn in range(3)]
    assert found == [[*texts, "No space left on device", None]] * 2
    assert sorted(store.values) == ["first/4/0", "first/4/1"]


def test_each_exchange_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_OBJECTS", count())
    assert [Exchange()._prefix for _ in range(2)] == [
        "consyn_jax/checkpoints/0",
        "consyn_jax/checkpoints/1",
    ]
