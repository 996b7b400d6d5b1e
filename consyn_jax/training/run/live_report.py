"""Keep `report.html` and `samples.jsonl` up to date while a run is in progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.files import open_regular, write_whole
from consyn_jax.training.logging.metrics import ending
from consyn_jax.training.logging.run_page import Status, write_report
from consyn_jax.training.run.directory import RunDirectory
from consyn_jax.training.run.recording import Recorder

SAMPLES = "samples.jsonl"
PAGE_SHARE = 0.005  # share of the run's time that writing pages may take
SAMPLE_SHARE = 0.01  # share of the run's time that samples at evaluations may take
TICK_S = 60.0  # a page of this age is written again after a step


class LiveReport:
    """The page of a run, and the samples on it.

    A process without a log writes nothing. A failure to write is reported once, and does not end
    the run. The page is rewritten as long as this takes no more than `PAGE_SHARE` of the run's
    time; the first and the last version are always written.

    Args:
        directory: The run directory, which is checked before every write.
        config: Values of the run, by flag.
        origins: Origin of each value.
        about: Rows of name and value that describe the run.
        left_s: Function that returns the remaining seconds of the run; None if unknown.
        clock: Clock in seconds, with any starting point.
    """

    def __init__(
        self,
        directory: RunDirectory,
        recorder: Recorder,
        config: Mapping[str, object],
        origins: Mapping[str, str],
        about: Sequence[tuple[str, str]] = (),
        left_s: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._directory, self._recorder, self._clock = directory, recorder, clock
        self.config, self._origins, self._about = config, origins, about
        self._left_s = left_s
        self._began = self._written = clock()
        self._spent_s = self._longest_gap_s = 0.0
        self._sample_spent_s, self._sample_s = 0.0, 0.0
        self._is_over = self._has_warned = False
        path, step = directory.path / SAMPLES, recorder.progress.step
        samples, fault = read_samples(path)
        if fault:
            recorder.console.warn(
                f"{path} {fault}, so report.html does not show texts that were sampled before."
            )
        self.samples = [line for line in samples if line["step"] <= step]

    @property
    def path(self) -> Path:
        """Path of the page."""
        return self._directory.path / "report.html"

    def refresh(self) -> None:
        """Rewrite the page, unless writing it has taken too much of the run's time."""
        passed = self._clock() - self._began
        if self._spent_s <= PAGE_SHARE * passed or not self._spent_s:
            self._write("running", is_alive=True)

    def tick(self) -> None:
        """Rewrite the page if its last version is at least a minute old; call this every step."""
        if self._clock() - self._written >= TICK_S:
            self.refresh()

    def finish(self) -> None:
        """Write the last version of the page of a complete run."""
        self._write("complete", is_alive=False)
        self._is_over = True

    def close(self) -> None:
        """Write the last version of the page if the run is incomplete; no effect after `finish`."""
        if not self._is_over:
            self._is_over = True
            self._write(ending(self._recorder.history.events), is_alive=False)

    # ------------------------------------------------------------------------------------- samples

    def time_for_sample(self) -> str:
        """Return "yes" if `SAMPLE_SHARE` of the run's time is enough for another sample, else "".

        The first sample is always allowed, and not counted, because it waits for the compiler. The
        second sample is assumed to take a tenth of the first one's time. Each later sample is
        assumed to take as long as the previous one.
        """
        passed = self._clock() - self._began
        in_time = self._sample_spent_s + self._sample_s <= SAMPLE_SHARE * passed
        return "yes" if in_time else ""

    def add_sample(self, text: str, took_s: float = 0.0) -> None:
        """Store a text that the model generated after the current step.

        Args:
            took_s: Time for generating the text, in seconds.
        """
        progress = self._recorder.progress
        if self.samples and self.samples[-1]["step"] == progress.step:
            self.samples.pop()
        is_first, self._sample_s = not self._sample_s, took_s
        if is_first:
            self._sample_s /= 10
        else:
            self._sample_spent_s += took_s
        self.samples.append({"step": progress.step, "tokens": progress.tokens, "text": text})
        lines = "".join(json.dumps(line) + "\n" for line in self.samples)
        self._guarded(lambda: write_whole(self._directory.path / SAMPLES, lines), SAMPLES)

    # ------------------------------------------------------------------------------------- writing

    def _write(self, words: str, *, is_alive: bool) -> None:
        began, recorder = self._clock(), self._recorder
        self._longest_gap_s = max(self._longest_gap_s, began - self._written)
        total, left = recorder.lengths.total_steps, self._left_s() if is_alive else None
        status = Status(words, is_alive, total, left, self._longest_gap_s)
        self._guarded(
            lambda: write_report(
                self._directory.path,
                recorder.history,
                self.config,
                [(line["step"], line["text"]) for line in self.samples],
                status,
                summary=recorder.summary(),
                activities=recorder.activities.values,
                origins=self._origins,
                about=self._about,
            ),
            self.path.name,
        )
        self._written = self._clock()
        self._spent_s += self._written - began

    def _guarded(self, write: Callable[[], object], name: str) -> None:
        if self._recorder.log is None:
            return
        try:
            self._directory.check()
            write()
        except UserError:  # the loop ends the run with this error
            return
        # The model and the log are complete, so a missing page is not a failure of the run.
        except Exception as error:  # noqa: BLE001
            if not self._has_warned:
                refused = isinstance(error, OSError) and error.strerror
                reason = refused or f"{type(error).__name__}: {error}"
                self._recorder.console.warn(
                    f"{name} could not be written ({reason}); the run goes on, and metrics.jsonl "
                    "has its numbers."
                )
            self._has_warned = True


def read_samples(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Read the samples of a run; also return a clause about a fault in the file, or ""."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            lines = [json.loads(line) for line in file.read().splitlines()]
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return [], "is damaged"
    kinds = {"step": int, "tokens": int, "text": str}
    if any(
        not isinstance(line, dict) or not all(isinstance(line.get(k), v) for k, v in kinds.items())
        for line in lines
    ):
        return [], "is damaged"
    return lines, ""
