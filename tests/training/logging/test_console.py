import errno
import io
import math
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest

from consyn_jax.training.logging.console import Console, show
from consyn_jax.training.logging.formats import typed
from consyn_jax.training.logging.live.live_line import LossTrend, details


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
                console.evaluation(
                    {
                        "step": 10,
                        "eval/loss": 3.21,
                        "eval/perplexity": 24.8,
                        "eval/bits_per_byte": 1.52,
                    },
                    True,
                )
                console.warn("careful [red]")
        console.sample("To be\n\x1b[2Jor not")
        console.finish(["eval loss 3.2", "go on: again", "Everything is in ./out"])


def test_without_a_terminal_it_prints_plain_lines_at_logging_steps() -> None:
    out = io.StringIO()
    play(Console(logging_steps=10, file=out))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert [
        line.split("  ")[0]
        for line in lines
        if line.startswith("step") and "/" in line.split("  ")[0]
    ] == ["step 1/20", "step 10/20", "step 20/20"]
    assert "step 10  best eval 3.2100  perplexity 24.80  bits/byte 1.520" in lines
    assert "warning: careful [red]" in lines
    assert "  model   haiku [bold]" in lines
    assert r"  \x1b[2Jor not" in lines
    assert lines[-1] == "Everything is in ./out"


def test_quiet_prints_warnings_and_the_final_line() -> None:
    out = io.StringIO()
    play(Console(quiet=True, file=out))
    assert out.getvalue().splitlines() == ["warning: careful [red]", "Everything is in ./out"]


def test_rich_is_not_imported_without_a_terminal() -> None:
    code = """if True:
        import sys
        from consyn_jax.training.logging.console import Console
        console = Console()
        console.header([("a", "b")])
        console.start(1)
        console.step(1, 1.0, 1.0)
        console.finish(["x"])
        assert "rich" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[Console], None], **environment: str
) -> str:
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
        if error.errno != errno.EIO:  # Linux's error for a terminal whose other side is closed
            raise
    os.close(ours)
    return b"".join(parts).decode()


def test_on_a_terminal_there_is_a_bar_and_the_cursor_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = on_a_terminal(monkeypatch, play)
    assert "step 20/20" in text
    assert "12.3k tokens/s" in text
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h")
    assert "\x1b[2J" not in text  # the model's text does not drive the terminal
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "haiku [bold]" in seen
    assert "step 10  best eval 3.2100" in seen
    assert seen.rstrip().endswith("Everything is in ./out")


def test_an_exception_restores_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_time_left_ignores_compilation_and_does_not_leap_at_an_evaluation() -> None:
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


def test_a_terminal_that_disappears_does_not_end_the_run() -> None:
    play(Console(file=Gone()))


def test_characters_missing_from_the_encoding_are_escaped() -> None:
    raw = io.BytesIO()
    with Console(file=io.TextIOWrapper(raw, encoding="ascii")) as console:
        console.sample("größe \ud800")
        assert raw.getvalue() == b"sample:\n  gr\\xf6\\xdfe \\ud800\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_for_a_stdout_that_lacks_characters_has_escapes(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(held, encoding, "strict"))
    show("läuf/文: ▁▂")
    assert held.getvalue().decode(encoding) in (
        "l\\xe4uf/\\u6587: \\u2581\\u2582\n",
        "läuf/\\u6587: \\u2581\\u2582\n",
    )


FULL = {
    "throughput/mfu": 0.41,
    "throughput/data_wait_fraction": 0.002,
    "memory/peak_bytes": 70 * 2**30,
}


def long_run(console: Console) -> None:
    with console:
        console.start(100_000, done=99_000)
        for step in range(99_001, 99_040):
            console.step(step, 3 + 1 / (step - 99_000), 1_234_567, FULL)
        values = {
            "step": 99_040,
            "eval/loss": 3.21,
            "eval/perplexity": 24.8,
            "eval/bits_per_byte": 1.52,
            "eval/accuracy": 0.4012,
        }
        console.evaluation(values, True)
        console.step(99_041, 3.0, 1_234_567)


def test_an_alert_stays_on_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def alerted(console: Console) -> None:
        with console:
            console.start(10)
            assert console.is_live
            console.alert = lambda: "SIGINT: the run will save."
            console.step(1, 2.0, 3.0)
            console.finish(["done"])
        assert not console.is_live

    text = on_a_terminal(monkeypatch, alerted)
    assert "SIGINT: the run will save." in text[text.rindex("step 1/10") :]


LONG = "/data/" + "a-directory-with-a-long-name/" * 5 + "run"


def test_paths_and_commands_at_the_end_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    command = typed(
        f"consyn-train --config {LONG}/config.yaml --max_steps 500 --overwrite_schedule"
    )

    def ended(console: Console) -> None:
        with console:
            console.start(1)
            console.finish(["Next:", command, f"Everything is in {LONG}: final/ (the model)."])

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_a_terminal(monkeypatch, ended, COLUMNS="80"))
    text = text.replace("\r\n", "\n")
    assert f"\n{command}\n" in text
    assert LONG + ":" in text
    pasted = text.partition("Next:\n")[2].partition("\nEverything")[0]
    assert shlex.split(pasted.replace("\\\n", "")) == [
        *("consyn-train", "--config", f"{LONG}/config.yaml"),
        *("--max_steps", "500", "--overwrite_schedule"),
    ]
    assert max(len(line) for line in text.splitlines() if LONG not in line) <= 80


def test_a_sample_is_indented_where_it_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_a_terminal(monkeypatch, lambda c: c.sample("to be " * 40), COLUMNS="80")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split("\r\n")[1:-1]
    assert len(lines) > 2
    assert all(re.match(r"  \S", line) and len(line.rstrip()) <= 80 for line in lines)


@pytest.mark.parametrize("columns", [60, 80, 132])
def test_nothing_wraps_on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_a_terminal(monkeypatch, long_run, COLUMNS=str(columns))
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = re.split(r"[\r\n]+", seen)
    assert max(map(len, lines)) <= columns
    assert "compiling since" in seen
    assert "step 99,041/100,000" in seen
    assert "1.23M tokens/s" in seen
    if columns >= 80:
        assert "MFU 41%  data wait 0%" in seen
        assert "eval loss 3.2100 at step 99,040  best eval loss 3.2100 at step 99,040" in seen


def test_without_a_terminal_a_line_of_a_step_has_at_most_80_columns() -> None:
    out = io.StringIO()
    long_run(Console(file=out))
    begin, *steps = (line for line in out.getvalue().splitlines() if "eval" not in line)
    assert re.fullmatch(r"Compiling since \d\d:\d\d:\d\d\.", begin)
    assert max(map(len, steps)) <= 80
    assert re.fullmatch(
        r"step 99,039/100,000  loss 3\.\d{4} \(-0\.\d{3}\)  1\.23M tokens/s  MFU 41%  left 0:\d\d:\d\d",
        steps[-2],
    )


def test_waiting_for_data_is_said_first_where_it_is_much() -> None:
    assert details(FULL) == ["MFU 41%", "data wait 0%", "70 GiB"]
    slow = FULL | {"throughput/data_wait_fraction": 0.3}
    assert details(slow) == ["data wait 30%", "MFU 41%", "70 GiB"]


def test_the_loss_is_smoothed_and_its_trend_is_that_of_a_hundred_steps() -> None:
    trend = LossTrend()
    for step in range(1000):
        trend.add(5 - 0.001 * step + (0.2 if step % 2 else -0.2))
    assert trend.text() == "loss 4.0251 (-0.100)"
    trend.add(math.nan)
    assert trend.text() == "loss nan"
    trend.add(4.0)
    assert trend.text().startswith("loss 4.02")
