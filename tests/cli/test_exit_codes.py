"""Exit codes and messages at the end of a command."""

import errno
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from consyn_jax.cli.exit_codes import DEFERRED_S, exit_code, keeping_what_is_saved
from consyn_jax.errors import Diverged, Interrupted, ProcessMissing, Unsaved, UserError


def fail(error: BaseException) -> int:
    def work() -> None:
        raise error

    return exit_code("consyn-x", work)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no."), 2),
        (Diverged("up."), 3),
        (Interrupted("saved."), 75),
        (ProcessMissing("late."), 76),
    ],
)
def test_known_errors_print_one_line(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(error) == code
    assert capsys.readouterr().err == f"consyn-x: {error}\n"


@pytest.mark.parametrize(
    ("advice", "shown"),
    [
        ("Free space, and run the same command again.", "again without --overwrite."),
        ("The same command continues from step 9.", "The same command without --overwrite cont"),
        ("With the same command, each continues.", "the same command without --overwrite, each"),
        ("Run the same command without --overwrite again.", "without --overwrite again."),
        ("Nothing is saved. The same command starts anew.", "The same command starts anew."),
        ("Run the same command again to start anew.", "the same command again to start anew."),
    ],
)
def test_advice_to_continue_does_not_delete_what_is_saved(advice: str, shown: str) -> None:
    for error in (UserError(advice), Interrupted(advice), ProcessMissing(advice)):
        with pytest.raises(type(error), match=re.escape(shown)), keeping_what_is_saved(True):
            raise error
        same = f"^{re.escape(advice)}$"
        with pytest.raises(type(error), match=same), keeping_what_is_saved(False):
            raise type(error)(advice)


def test_no_text_of_a_message_drives_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(UserError("No file \x1b[2J\x9b31m\u202e\rname.")) == 2
    assert capsys.readouterr().err == "consyn-x: No file \\x1b[2J\\x9b31m\\u202e\\rname.\n"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENAMETOOLONG, "file names have at most 255 bytes"),
        (errno.EROFS, "cannot be used: Read-only file system"),
    ],
)
def test_what_the_system_refuses_about_a_file_is_a_sentence(
    number: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(OSError(number, os.strerror(number), "/x/" + "a" * 300)) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown) < 250
    with pytest.raises(OSError, match="Bad address"):
        fail(OSError(errno.EFAULT, os.strerror(errno.EFAULT), "/x"))


def test_a_signal_during_an_import_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "interrupted_import.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "for _ in range(20):\n    time.sleep(0.01)\n"
        "done = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    def work() -> None:
        import interrupted_import  # type: ignore[import-not-found]

        seen.append(interrupted_import.done)
        threading.Event().wait(10)

    assert exit_code("consyn-x", work) == 130
    assert seen == [True]


def in_a_callback_of_the_collector() -> None:
    def callback(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            os.kill(os.getpid(), signal.SIGTERM)

    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)


def in_a_finalizer() -> None:
    class Ends:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    Ends()


def in_code_that_goes_on() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10)
    except:  # noqa: E722 - as libraries have it
        pass


@pytest.mark.parametrize(
    "swallow", [in_a_callback_of_the_collector, in_a_finalizer, in_code_that_goes_on]
)
def test_a_signal_whose_exception_is_swallowed_comes_again(
    swallow: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def work() -> None:
        swallow()
        seen.append(True)
        threading.Event().wait(10)
        seen.append(False)

    assert exit_code("consyn-x", work) == 143
    assert seen == [True]
    assert capsys.readouterr().err == (
        "consyn-x: SIGTERM came before there was anything to save.\n"
    )


def test_a_signal_that_was_acted_on_does_not_come_again() -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(10)
        except Unsaved as stopped:
            stopped.settle()
        threading.Event().wait(3 * DEFERRED_S)

    assert exit_code("consyn-x", work) == 0


def test_an_unknown_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


@pytest.fixture(autouse=True)
def a_terminal_that_is_not_under_nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 143),
        (signal.SIGUSR1, 143),  # Slurm's warning
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_unwinds_the_work_and_its_repeat_does_not_break_that_off(
    number: signal.Signals, code: int, times: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned, before = [], signal.getsignal(signal.SIGTERM)

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
        finally:
            for _ in range(times - 1):
                os.kill(os.getpid(), number)
            cleaned.append(True)

    assert exit_code("consyn-x", work) == code
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == (
        f"consyn-x: {number.name} came before there was anything to save.\n"
    )


def test_under_nohup_a_closed_terminal_is_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert exit_code("consyn-x", lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0


CLOSED = """
import fcntl, os, signal, sys, termios
from consyn_jax.cli.exit_codes import exit_code
from consyn_jax.errors import Interrupted

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def work():
    try:
        print("a line")
        open(sys.argv[1], "w").close()
        while True:
            signal.pause()
    except KeyboardInterrupt:
        raise Interrupted("saved.")

sys.exit(exit_code("consyn-x", work))
"""


def test_a_closed_terminal_changes_no_exit_code(tmp_path: Path) -> None:
    """All that is printed after it is refused with an error, also at the exit."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", CLOSED, str(tmp_path / "ready")]
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    while not (tmp_path / "ready").exists():
        assert child.poll() is None, os.read(ours, 10_000)
        time.sleep(0.02)
    os.close(ours)
    assert child.wait(240) == 75


PIPED = """
import sys
from consyn_jax.cli.exit_codes import exit_code
sys.exit(exit_code("consyn-x", lambda: [print("line") for _ in range(100_000)]))
"""


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-c", PIPED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"line\n"
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(240) == 0


def test_in_a_thread_no_handlers_are_set() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(exit_code("consyn-x", lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]
