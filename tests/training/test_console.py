import errno
import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from consyn_jax.training import console as module
from consyn_jax.training.console import Console


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def play(console: Console) -> None:
    with console:
        console.header([("model", "haiku [bold]"), ("output", "./out")])
        console.start(20)
        for step in range(1, 21):
            console.step(step, 5 - step / 10, 12_345)
            if step == 10:
                console.evaluation({"step": 10, "eval/loss": 3.21, "eval/perplexity": 24.8, "eval/bits_per_byte": 1.52}, True)
                console.warn("careful [red]")
        console.sample("To be\n\x1b[2Jor not")
        console.finish(["eval loss 3.2", "go on: again", "Everything is in ./out"])


def test_without_a_terminal_it_is_plain_lines_at_logging_steps() -> None:
    out = io.StringIO()
    play(Console(logging_steps=10, file=out))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step") and "/" in line.split("  ")[0]] == ["step 1/20", "step 10/20", "step 20/20"]
    assert "step 10  eval loss 3.2100  perplexity 24.80  bits/byte 1.5200  (best)" in lines
    assert "warning: careful [red]" in lines
    assert "  model   haiku [bold]" in lines
    assert r"  \x1b[2Jor not" in lines
    assert lines[-1] == "Everything is in ./out"


def test_quiet_is_warnings_and_the_final_line() -> None:
    out = io.StringIO()
    play(Console(quiet=True, file=out))
    assert out.getvalue().splitlines() == ["warning: careful [red]", "Everything is in ./out"]


def test_rich_is_not_imported_without_a_terminal() -> None:
    # By its file: the package around it may import more.
    code = """if True:
        import runpy, sys
        console = runpy.run_path(sys.argv[1])["Console"]()
        console.header([("a", "b")])
        console.start(1)
        console.step(1, 1.0, 1.0)
        console.finish(["x"])
        assert "rich" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code, module.__file__], check=True, capture_output=True)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, use: Callable[[Console], None], **environment: str) -> str:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as file:
        use(Console(file=file))
    parts = []
    try:
        while part := os.read(ours, 1 << 16):
            parts.append(part)
    except OSError as error:
        if error.errno != errno.EIO:  # Linux's word for a terminal whose other side is closed
            raise
    os.close(ours)
    return b"".join(parts).decode()


def test_on_a_terminal_there_is_a_bar_and_the_cursor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_a_terminal(monkeypatch, play)
    assert "step 20/20" in text
    assert "12.3k tokens/s" in text
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h")
    assert "\x1b[2J" not in text  # the model's text does not drive the terminal
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "haiku [bold]" in seen
    assert "step 10  eval loss 3.2100" in seen
    assert seen.rstrip().endswith("Everything is in ./out")


def test_an_exception_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(console: Console) -> None:
        with console:
            console.start(10)
            console.step(1, 2.0, 3.0)
            raise ZeroDivisionError

    def fail(console: Console) -> None:
        with pytest.raises(ZeroDivisionError):
            broken(console)

    text = on_a_terminal(monkeypatch, fail)
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in on_a_terminal(monkeypatch, play, TERM="dumb")


def test_time_left_leaves_the_compilation_out_and_does_not_leap_at_an_evaluation() -> None:
    clock, out = Clock(), io.StringIO()
    with Console(file=out, clock=clock) as console:
        console.start(1100, done=100)
        clock.now += 300  # compiling
        console.step(101, 1.0, 1.0)
        assert out.getvalue().endswith("left -:--:--\n")
        for step in range(102, 602):
            clock.now += 1
            console.step(step, 1.0, 1.0)
        assert out.getvalue().endswith("left 0:08:19\n")
        clock.now += 30  # an evaluation
        console.step(602, 1.0, 1.0)
    left = re.findall(r"left 0:(\d\d):(\d\d)", out.getvalue())[-1]
    assert 499 < int(left[0]) * 60 + int(left[1]) < 650
    assert "elapsed 0:13:50" in out.getvalue()


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_goes_away_does_not_end_the_run() -> None:
    play(Console(file=Gone()))


def test_an_encoding_without_the_characters_escapes_them() -> None:
    raw = io.BytesIO()
    with Console(file=io.TextIOWrapper(raw, encoding="ascii")) as console:
        console.sample("größe \ud800")
        assert raw.getvalue() == b"sample:\n  gr\\xf6\\xdfe \\ud800\n"
