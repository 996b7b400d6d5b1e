"""What Orbax abandons: which writes are waited for, and which errors are not shown."""

import logging
import sys
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import pytest

from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing import orbax_writes
from consyn_jax.training.checkpointing.orbax_writes import (
    WithoutAbandonedWork,
    is_left_alone,
    writing_thread,
)


class Narrower(UserError):
    """Raised in all processes of a run, as on a signal."""


@pytest.mark.parametrize(
    ("processes", "error", "is_writing", "is_left"),
    [
        (2, UserError, True, True),
        (2, UserError, False, False),
        (2, UserError, None, False),
        (1, UserError, True, False),
        (2, Narrower, True, False),
        (2, KeyError, True, False),
        (2, None, True, False),
    ],
)
def test_a_write_is_left_alone_after_an_error_of_one_process_only(
    processes: int,
    error: type[Exception] | None,
    is_writing: bool | None,
    is_left: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    write = None
    if is_writing is not None:
        write = Mock(spec=threading.Thread)
        write.is_alive.return_value = is_writing
    try:
        if error is not None:
            raise error("wrong")
        found = is_left_alone(write)
    except (UserError, KeyError):
        found = is_left_alone(write)
    assert found == is_left


@pytest.mark.parametrize(("processes", "may_be_abandoned"), [(1, False), (2, True)])
def test_python_waits_at_its_end_for_a_write_that_needs_no_other_process(
    processes: int, may_be_abandoned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert writing_thread(lambda: None, "checkpoint 3").daemon == may_be_abandoned


def raised(message: str, file: str) -> Any:
    """An error from a line of a file, with its traceback."""
    try:
        exec(compile("raise ValueError(message)", file, "exec"), {"message": message})
    except ValueError:
        return sys.exc_info()


@pytest.mark.parametrize(
    ("file", "error", "is_shown"),
    [
        ("/lib/asyncio/base.py", None, True),
        ("/lib/asyncio/base.py", raised("wrong", "/work/mine.py"), True),
        ("/lib/orbax/checkpoint.py", None, False),
        ("/lib/asyncio/base.py", raised("wrong", "/lib/orbax/checkpoint.py"), False),
        ("/lib/asyncio/base.py", raised("full [os_error_code='28']", "/work/mine.py"), False),
    ],
)
def test_only_records_of_orbax_are_left_out_of_the_log(
    file: str, error: Any, is_shown: bool
) -> None:
    record = logging.LogRecord("asyncio", logging.ERROR, file, 1, "message", (), error)
    for name in ("absl", "asyncio"):
        assert orbax_writes._is_not_orbax in logging.getLogger(name).filters
    assert orbax_writes._is_not_orbax(record) == is_shown


@pytest.mark.parametrize(
    ("message", "thing", "is_heard"),
    [
        ("Event loop is closed", None, False),
        ("coroutine 'async_serialize' was never awaited", None, False),
        ("coroutine '_async_serialize_shards' was never awaited", None, False),
        ("wrong", "<coroutine _read_array_index>", False),
        ("coroutine 'mine' was never awaited", None, True),
        ("wrong", "<coroutine mine>", True),
    ],
)
def test_only_errors_of_abandoned_work_are_not_heard(
    message: str, thing: str | None, is_heard: bool
) -> None:
    heard: list[Any] = []
    unraisable = SimpleNamespace(exc_value=RuntimeError(message), object=thing)
    WithoutAbandonedWork(heard.append)(unraisable)
    assert heard == [unraisable] * is_heard
