"""What a person sees of a run, on stderr: a header, a progress bar, evaluations, warnings, samples and where everything is.

On a terminal it is drawn with rich. Anywhere else (a file, CI) it is plain lines without control codes, and with `quiet` only
warnings and the final line.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID


@runtime_checkable
class TextStream(Protocol):
    """What is needed of a stream to print to: any text file, sys.stderr, io.StringIO."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...

    def isatty(self) -> bool: ...

    def fileno(self) -> int: ...


class Console:
    """The view of one run. A context manager: leaving it, by an exception too, gives the terminal back as it was.

    Args:
        quiet: only warnings and the final line.
        logging_steps: without a terminal, a step's line is printed at multiples of this, at the first and at the last step.
        file: where to print; stderr. A terminal or disk that goes away silences the view and does not end the run.
        clock: seconds, from any beginning.
    """

    def __init__(self, *, quiet: bool = False, logging_steps: int = 1, file: TextStream | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = _Stream(sys.stderr if file is None else file)
        self._quiet = quiet
        self._logging_steps = logging_steps
        self._clock = clock
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total = self._step = 0
        self._pace = _Pace(0, clock())
        self._lines_begun = False
        self._rich: RichConsole | None = None
        if not quiet and self._stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=self._stream, force_terminal=True, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]

    def header(self, rows: Sequence[tuple[str, object]], title: str = "consyn-train") -> None:
        """A table of names and values: what is about to run, on what, and why so."""
        if self._quiet:
            return
        cells = [(_visible(name), _visible(str(value))) for name, value in rows]
        if self._rich is None:
            width = max((len(name) for name, _ in cells), default=0)
            self._plain(title, *(f"  {name:<{width}}  {value}" for name, value in cells))
            return
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in cells:
            table.add_row(Text(name), Text(value))
        self._draw(Panel(table, title=Text(title, "bold"), title_align="left", border_style="dim", expand=False, padding=(0, 1)))

    def start(self, total_steps: int, done: int = 0) -> None:
        """Begin the progress line.

        Args:
            done: the step resumed at.
        """
        self._total, self._step = total_steps, done
        self._pace = _Pace(done, self._clock())
        self._lines_begun = False
        if self._rich is None:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("step {task.fields[count]}", style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", style="cyan"),
            TextColumn("{task.fields[clock]}", style="dim"),
            console=self._rich,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # else rich would send what belongs into a file or pipe to the terminal
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=done, count=f"{done:,}/{total_steps:,}", status="compiling", clock="")
        self._progress.start()

    def step(self, step: int, loss: float | int, tokens_per_s: float | int) -> None:
        """Show the state after a step. On a terminal every call moves the bar.

        Args:
            loss: nats per token.
        """
        first, self._step = not self._lines_begun, step
        self._lines_begun = True
        self._pace.note(step, self._clock())
        if self._quiet:
            return
        status = f"loss {loss:.4f}  {compact(tokens_per_s)} tokens/s"
        elapsed, left = duration(self._pace.elapsed_s), duration(self._pace.left_s(self._total))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, count=f"{step:,}/{self._total:,}", status=status, clock=f"{elapsed}, {left} left")
        elif self._rich is None and (first or step % self._logging_steps == 0 or step == self._total):
            self._plain(f"step {step:,}/{self._total:,}  {status}  elapsed {elapsed}  left {left}")

    def evaluation(self, values: Mapping[str, Any], best: bool) -> None:
        """One line for an evaluation, above the bar.

        Args:
            values: a line of `metrics.jsonl` with `eval/` keys; without `step` it belongs to the last step shown.
            best: the best so far.
        """
        if self._quiet:
            return
        parts = [f"step {values.get('step', self._step):,}"]
        names = {"eval/loss": "eval loss", "eval/perplexity": "perplexity", "eval/bits_per_byte": "bits/byte", "eval/accuracy": "accuracy"}
        parts += [f"{name} {_number(values[key])}" for key, name in names.items() if values.get(key) is not None]
        parts += ["(best)"] if best else []
        self._line("  ".join(parts), "bold green" if best else "green")

    def warn(self, text: str) -> None:
        """A warning that stands out; shown with `quiet` too."""
        self._line(f"warning: {_visible(text)}", "bold yellow")

    def note(self, text: str) -> None:
        """Something that happened as it should."""
        if not self._quiet:
            self._line(_visible(text), "dim")

    def sample(self, text: str, title: str = "sample") -> None:
        """A text that the model wrote. Control characters are made visible: a model may have learned any."""
        if self._quiet:
            return
        body = [f"  {line}" for line in _visible(text).split("\n")]
        if self._rich is None:
            self._plain(f"{title}:", *body)
            return
        from rich.text import Text

        self._draw(Text(f"{title}:", "bold"))
        self._draw(Text("\n".join(body), "italic"))

    def finish(self, lines: Sequence[str]) -> None:
        """End the progress line and print the outcome; the last line, where everything is, is all that `quiet` prints."""
        self._stop_progress()
        if self._quiet:
            self._plain(*lines[-1:])
            return
        for line in lines[:-1]:
            self._line(_visible(line), "")
        for line in lines[-1:]:
            self._line(_visible(line), "bold")

    def close(self) -> None:
        """Give the terminal back: no bar, a cursor. Safe to call twice."""
        self._stop_progress()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _stop_progress(self) -> None:
        progress, self._progress, self._task = self._progress, None, None
        if progress is not None:
            progress.stop()

    def _line(self, text: str, style: str) -> None:
        if self._rich is None:
            self._plain(text)
            return
        from rich.text import Text

        self._draw(Text(text, style))

    def _draw(self, what: RenderableType) -> None:
        assert self._rich is not None
        self._rich.print(what)

    def _plain(self, *lines: str) -> None:
        for line in lines:
            self._stream.write(line + "\n")
        self._stream.flush()


class _Pace:
    """How fast steps go, evaluations and saves included, and how long the rest takes.

    Steps and seconds are both forgotten exponentially, and their ratio taken: one slow evaluation then moves the estimate a
    little, where an average of ratios would leap. The first step is left out because it is compiled.
    """

    def __init__(self, step: int, now: float) -> None:
        self._began = self._now = now
        self._step = step
        self._steps = self._seconds = 0.0
        self._started = False

    def note(self, step: int, now: float) -> None:
        if self._started and step > self._step:
            duration = now - self._now
            keep = math.exp(-duration / max(60.0, 0.25 * (now - self._began)))
            self._steps = keep * self._steps + (step - self._step)
            self._seconds = keep * self._seconds + duration
        self._started = True
        self._step, self._now = step, now

    @property
    def elapsed_s(self) -> float:
        return self._now - self._began

    def left_s(self, total: int) -> float | None:
        return self._seconds / self._steps * (total - self._step) if self._steps else None


class _Stream:
    """Text to a stream that may go away: a terminal that is closed or a disk that is full must not end a run of a week."""

    def __init__(self, file: TextStream) -> None:
        self._file: TextStream | None = file
        self.encoding = getattr(file, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        try:
            if self._file is not None:
                self._file.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        except OSError:
            self._file = None
        return len(text)

    def flush(self) -> None:
        try:
            if self._file is not None:
                self._file.flush()
        except OSError:
            self._file = None

    def isatty(self) -> bool:
        return self._file is not None and self._file.isatty()

    def fileno(self) -> int:
        if self._file is None:
            raise OSError("the stream has gone away")
        return self._file.fileno()


def _visible(text: str) -> str:
    r"""Control characters as their escapes, so that no text can drive the terminal.

    >>> print(_visible("a\x1b[2Jb\r\tc"))
    a\x1b[2Jb\r    c
    """
    # Not only what str.isprintable allows: joiners and direction marks are part of words in many scripts.
    shown = (c if c == "\n" or c.isprintable() or (ord(c) > 0x9F and not 0xD800 <= ord(c) < 0xE000) else ascii(c)[1:-1] for c in text.replace("\t", "    "))
    return "".join(shown)


def compact(value: float | int) -> str:
    """Three digits and a unit.

    >>> [compact(v) for v in (0.5, 999.4, 12345.0, 1.26e6, float("nan"))]
    ['0.5', '999', '12.3k', '1.26M', 'nan']
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _number(value: float | int) -> str:
    """Four decimals where they say something.

    >>> [_number(v) for v in (3.21, 24.83, 48213.7)]
    ['3.2100', '24.83', '48,214']
    """
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 10_000 else f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Hours, minutes, seconds.

    >>> duration(3725.4), duration(200_000.0), duration(None)
    ('1:02:05', '2 d 7:33:20', '-:--:--')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days = f"{hours // 24} d " if hours >= 48 else ""
    return f"{days}{hours % 24 if days else hours}:{minute:02}:{second:02}"
