"""The output of a run on stderr: header, progress bar, evaluations, warnings, samples and outcome.

On a terminal, rich draws the output. In a file or in CI, the output consists of plain lines without
control codes. With `quiet`, only warnings and the final line are printed.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from consyn_jax.errors import visible
from consyn_jax.training.logging.formats import decimals, duration
from consyn_jax.training.logging.live.live_line import (
    LossTrend,
    details,
    fitted,
    now,
    rows,
    speed,
)

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live

EVALUATION_NAMES = {
    "eval/loss": "eval loss",
    "eval/perplexity": "perplexity",
    "eval/bits_per_byte": "bits/byte",
    "eval/accuracy": "accuracy",
    "eval/rewards/margins": "reward margin",
    "eval/rewards/accuracies": "reward accuracy",
}


class Console(AbstractContextManager["Console"]):
    """Prints the output of one run.

    It is a context manager, which restores the terminal on exit, also after an exception.

    Args:
        quiet: print only warnings and the final line.
        logging_steps: without a terminal, print a line for the first step, the last step, and each
            multiple of this number.
        file: the text file to print to; None for stderr. If writing to it fails, later output is
            dropped, and the run continues.
        clock: clock in seconds, with any starting point.

    Attributes:
        alert: function that returns a sentence to show below the live line, or "".
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        logging_steps: int = 1,
        file: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = LastingStream(sys.stderr if file is None else file)
        self._quiet = quiet
        self._logging_steps = logging_steps
        self._clock = clock
        self._live: Live | None = None
        self._total = self._step = 0
        self._trend, self._newest = LossTrend(), dict[str, Any]()
        self._status = self._phase = self._evaluated = self._best = ""
        self._phase_text, self._phase_began = "", 0.0
        self._pace = _Pace(0, clock())
        self._lines_begun = False
        self._rich: RichConsole | None = None
        self.alert: Callable[[], str] = str
        if (
            not quiet
            and self._stream.isatty()
            and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        ):
            from rich.console import Console as RichConsole

            self._rich = RichConsole(
                file=self._stream,  # type: ignore[arg-type]
                force_terminal=True,
                highlight=False,
                markup=False,
                emoji=False,
            )

    def header(self, rows: Sequence[tuple[str, object]], title: str = "consyn-train") -> None:
        """Print a table of names and values that describes the run."""
        if self._quiet:
            return
        cells = [(visible(name), visible(str(value))) for name, value in rows]
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
        bold = Text(title, "bold")
        look: Any = {"border_style": "dim", "expand": False, "padding": (0, 1)}
        self._rich.print(Panel(table, title=bold, title_align="left", **look))

    def start(self, total_steps: int, done: int = 0) -> None:
        """Start the live line, which shows "compiling" until the first step.

        Args:
            done: the step from which the run resumes.
        """
        self._total, self._step = total_steps, done
        self._pace, self._trend = _Pace(done, self._clock()), LossTrend()
        self._lines_begun = False
        self.enter("compiling", is_told=True)
        if self._rich is not None:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render,
                console=self._rich,
                refresh_per_second=2,
                # If stdout is a file or a pipe, rich must not redirect it to the terminal.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start(refresh=True)

    def enter(self, phase: str, *, is_told: bool = False) -> None:
        """Show the name and the starting time of an activity, such as an evaluation.

        Args:
            phase: the activity; "" for training steps, which are not shown.
            is_told: whether to print a line about the activity if there is no terminal.
        """
        if phase == self._phase:
            return
        self._phase, self._phase_began = phase, self._clock()
        if phase:
            self._phase_text = f"{phase} since {now()}"
        if phase and is_told and self._rich is None and not self._quiet:
            self._plain(f"{self._phase_text[:1].upper()}{self._phase_text[1:]}.")

    def step(
        self,
        step: int,
        loss: float | int,
        tokens_per_s: float | int,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Show the state after a step. On a terminal, every call updates the bar.

        Args:
            loss: training loss, in nats per token.
            values: the step's line of metrics; None if the step has none.
        """
        first, self._step = not self._lines_begun, step
        self._lines_begun, self._phase = True, ""
        self._pace.note(step, self._clock())
        self._trend.add(float(loss))
        self._newest = self._newest if values is None else dict(values)
        if self._quiet:
            return
        self._status = speed(tokens_per_s)
        if self._rich is None and (first or step % self._logging_steps == 0 or step == self._total):
            elapsed, left = duration(self._pace.elapsed_s), duration(self.left_s())
            begin = [f"step {step:,}/{self._total:,}", self._trend.text(), self._status]
            optional = [*details(self._newest), f"elapsed {elapsed}"]
            self._plain(fitted(begin, optional, f"left {left}"))

    def _render(self) -> Any:
        """Draw the live lines; rich calls this at every refresh, so that times are current."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        assert self._rich is not None
        width = self._rich.width - 1
        clock = f"{duration(self._clock() - self._pace.began)}, {duration(self.left_s())} left"
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(no_wrap=True, style="bold")
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, style="dim")
        progress = ProgressBar(total=max(self._total, 1), completed=self._step)
        bar.add_row(f"step {self._step:,}/{self._total:,}", progress, clock)
        lines: list[Any] = [bar]
        if self._lines_begun:
            shown = fitted([self._trend.text(), self._status], details(self._newest), "", width)
            lines.append(Text(shown[:width], "cyan", no_wrap=True))
        if self._phase:
            passed = duration(self._clock() - self._phase_began)
            lines.append(Text(f"{self._phase_text}, {passed}"[:width], "yellow", no_wrap=True))
        elif self._evaluated:
            shown = fitted([self._evaluated], [self._best], "", width)
            lines.append(Text(shown[:width], "green", no_wrap=True))
        if alert := self.alert():
            lines += [Text(part, "bold yellow") for part in _wrapped(alert, width)]
        return Group(*lines)

    @property
    def is_live(self) -> bool:
        """Whether the live line is being drawn."""
        return self._live is not None

    def left_s(self) -> float | None:
        """Estimated seconds until the end of the run; None if unknown."""
        return self._pace.left_s(self._total)

    def evaluation(self, values: Mapping[str, Any], best: bool) -> None:
        """Print a line about an evaluation, above the bar.

        Args:
            values: a line of `metrics.jsonl` with `eval/` keys. If it has no `step`, the last step
                shown is used.
            best: whether the evaluation is the best so far.
        """
        if self._quiet:
            return
        parts = [f"step {values.get('step', self._step):,}"]
        parts += [
            f"{name} {decimals(values[key], 4 if key == 'eval/loss' else 3)}"
            for key, name in EVALUATION_NAMES.items()
            if values.get(key) is not None
        ]
        self._evaluated = f"{' '.join(parts[1:2])} at {parts[0]}"
        self._best = f"best {self._evaluated}" if best else self._best
        if best:  # "best eval" is as wide as "eval loss", so the lines stay aligned
            parts[1:2] = [part.replace("eval loss", "best eval") for part in parts[1:2]]
        width = None if self._rich is None else self._rich.width - 1
        lines = ["  ".join(parts)] if width is None else rows(parts, width)
        for line in lines:
            self._line(line, "bold green" if best else "green")

    def warn(self, text: str) -> None:
        """Print a highlighted warning, even if `quiet` is set."""
        self._line(f"warning: {visible(text)}", "bold yellow")

    def note(self, text: str) -> None:
        """Print an informational message."""
        if not self._quiet:
            self._line(visible(text), "dim")

    def sample(self, text: str, title: str = "sample") -> None:
        """Print a text that the model generated.

        Control characters are escaped, because a model may generate any of them.
        """
        if self._quiet:
            return
        if self._rich is None:
            self._plain(f"{title}:", *(f"  {line}" for line in visible(text).split("\n")))
            return
        from rich.padding import Padding
        from rich.text import Text

        self._rich.print(Text(f"{title}:", "bold"))
        self._rich.print(Padding(Text(visible(text), "italic"), (0, 0, 0, 2), expand=False))

    def finish(self, lines: Sequence[str]) -> None:
        """Remove the live line, and print the outcome.

        With `quiet`, only the last of `lines` is printed. It says where the files are.
        """
        self._phase = ""
        self.close()
        if self._quiet:
            self._plain(*lines[-1:])
            return
        for line in lines[:-1]:
            self._line(visible(line), "")
        for line in lines[-1:]:
            self._line(visible(line), "bold")

    def close(self) -> None:
        """Remove the bar and show the cursor again. Safe to call twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, text: str, style: str) -> None:
        if self._rich is None:
            self._plain(text)
            return
        from rich.text import Text

        width = self._rich.width - 1
        for line in text.split("\n"):
            # Do not break paths, and print commands unchanged, so that both can be copied.
            wrapped = [line] if line.startswith("  ") else _wrapped(line, width)
            for part in wrapped:
                self._rich.print(Text(part, style), soft_wrap=True)

    def _plain(self, *lines: str) -> None:
        for line in lines:
            self._stream.write(line + "\n")
        self._stream.flush()


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]


class _Pace:
    """Estimates the time left from the pace of steps, including evaluations and saves.

    The pace is the ratio of two exponentially decaying sums, of steps and of seconds. A slow
    evaluation changes this ratio only a little; an average of step times would jump. The first step
    does not count, because it includes compilation.
    """

    def __init__(self, step: int, now: float) -> None:
        self.began = self._now = now
        self._step = step
        self._steps = self._seconds = 0.0
        self._started = False

    def note(self, step: int, now: float) -> None:
        if self._started and step > self._step:
            passed_s = now - self._now
            keep = math.exp(-passed_s / max(60.0, 0.25 * (now - self.began)))
            self._steps = keep * self._steps + (step - self._step)
            self._seconds = keep * self._seconds + passed_s
        self._started = True
        self._step, self._now = step, now

    @property
    def elapsed_s(self) -> float:
        return self._now - self.began

    def left_s(self, total: int) -> float | None:
        return self._seconds / self._steps * (total - self._step) if self._steps else None


def show(text: str) -> None:
    """Print to stdout; escape characters that are not in the encoding of stdout."""
    stream = LastingStream(sys.stdout)
    stream.write(text + "\n")
    stream.flush()


class LastingStream:
    """A stream that ignores failed writes.

    A closed terminal or a full disk must not end a long run.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.encoding = getattr(file, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write the text; after a failure, this and all later text is dropped."""
        try:
            if self._file is not None:
                self._file.write(
                    text.encode(self.encoding, "backslashreplace").decode(self.encoding)
                )
        except OSError:
            self._file = None
        return len(text)

    def flush(self) -> None:
        """Flush the stream; after a failure, all later text is dropped."""
        try:
            if self._file is not None:
                self._file.flush()
        except OSError:
            self._file = None

    def isatty(self) -> bool:
        """Whether the stream is a terminal and no write has failed."""
        return self._file is not None and self._file.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream."""
        if self._file is None:
            raise OSError("the stream has disappeared")
        return self._file.fileno()
