"""What a command's end looks like from outside."""

import os
import signal
import threading

import pytest

from consyn_jax.cli.run import exit_code
from consyn_jax.config import Diverged, Interrupted, UserError


def fail(error: BaseException) -> int:
    def work() -> None:
        raise error

    return exit_code("consyn-x", work)


@pytest.mark.parametrize(("error", "code"), [(UserError("no."), 2), (Diverged("up."), 3), (Interrupted("saved."), 75)])
def test_what_has_a_name_is_one_line(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(error) == code
    assert capsys.readouterr().err == f"consyn-x: {error}\n"


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_what_is_under_way(number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned, before = [], signal.getsignal(signal.SIGTERM)

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
        finally:
            cleaned.append(True)

    assert exit_code("consyn-x", work) == code
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "consyn-x: interrupted before there was anything to save.\n"


def test_in_a_thread_there_are_no_handlers_to_set() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(exit_code("consyn-x", lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]
