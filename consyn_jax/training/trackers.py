"""Trackers (TensorBoard, Weights & Biases): copies of a run's numbers and samples, for looking at. `metrics.jsonl` is the truth."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from consyn_jax.config import UserError
from consyn_jax.training.metrics import FILE_NAME, plain


class Tracker(Protocol):
    """Where metrics are copied to for people to look at. Methods may raise anything; `Trackers` stands between."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""

    def sample(self, step: int, text: str) -> None:
        """Record a text that the model wrote."""

    def close(self) -> None:
        """Hand over what is still held back."""


class TensorBoardTracker:
    """Events for TensorBoard in `logs_dir`, one new file a start of the run, begun with its first event.

    Args:
        purge_step: TensorBoard forgets points of earlier files from this step on: the step after the one resumed at.
    """

    def __init__(self, logs_dir: Path, purge_step: int | None = None) -> None:
        self._logs_dir, self._purge_step = logs_dir, purge_step
        self._writer: Any = None

    def _open(self) -> Any:
        # Its import takes seconds where torch is installed, which it imports. By the first event, the second step is under way.
        # SummaryWriter queues events for a thread: once that thread has died of a full disk, the queue fills and training hangs.
        # The writer below it does its work at once and raises where it fails.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._logs_dir.mkdir(parents=True, exist_ok=True)
        self._event = event_pb2.Event
        # Two starts within a second would share a name, and the second would overwrite the first.
        writer = EventsWriter(str(self._logs_dir / "events"), f".{os.getpid()}.{time.time_ns() % 10**9:09d}")
        if self._purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.Value("START"))
            writer.write_event(event_pb2.Event(wall_time=time.time(), step=self._purge_step, session_log=start))
        return writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all the values."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._write(step, Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in values.items()]))

    def sample(self, step: int, text: str) -> None:
        """The text as it is; TensorBoard would otherwise read it as Markdown."""
        from tensorboardX.summary import text as text_summary

        self._write(step, text_summary("sample", "\n".join("    " + line for line in text.splitlines())))

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, summary: Any) -> None:
        if self._writer is None:
            self._writer = self._open()
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


class WandbTracker:
    """A Weights & Biases run; its files lie in `directory`/wandb.

    WANDB_MODE=offline needs neither network nor key. Without that, where there is no key or no network, the run is kept
    offline all the same and `warn` says how to upload it.

    Args:
        run_id: the run to go on with, from `Trackers.run_id` of the run that is resumed.
    """

    def __init__(
        self,
        project: str,
        run_name: str | None,
        directory: Path,
        config: Mapping[str, Any],
        run_id: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        # At the end wandb waits for its uploads, by default without limit: a dead network would keep the job, and its GPUs, alive.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")
        # console off: wandb would wrap stdout and stderr, and with them the progress bar. A prompt for a key that nobody answers ends.
        settings = wandb.Settings(console="off", quiet=True, login_timeout=60)

        def start(mode: Any) -> Any:
            return wandb.init(
                project=project,
                name=run_name,
                dir=str(directory),
                config=dict(config),
                id=run_id,
                resume="allow" if run_id else None,
                mode=mode,
                settings=settings,
            )

        try:
            self._run = start(None)
        except (wandb.errors.Error, TimeoutError) as error:
            self._run = start("offline")
            warn(f"Weights & Biases: {_sentence(error)} The run is kept offline in {directory / 'wandb'}; `wandb sync` uploads it.")
        # wandb drops values whose step lies before its newest, which after a resume they do: the step is a value of its own.
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """Names the run at Weights & Biases."""
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the history."""
        self._run.log({"step": step, **values})

    def sample(self, step: int, text: str) -> None:
        """The text as HTML, escaped."""
        import html

        import wandb

        self._run.log({"step": step, "sample": wandb.Html(f"<pre style='white-space:pre-wrap'>{html.escape(text)}</pre>", inject=False)})

    def close(self) -> None:
        """Upload what is left (at most WANDB_FINISH_TIMEOUT seconds) and end the run."""
        self._run.finish()


class Trackers:
    """Several trackers as one that never raises: one that fails is reported once and switched off, and training goes on.

    Args:
        starts: by name, what starts each tracker; importing its library belongs to it.
        warn: told about a failure, in one sentence.
    """

    def __init__(self, starts: Mapping[str, Callable[[], Tracker]], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._active: dict[str, Tracker] = {}
        for name, start in starts.items():
            self._guard(name, functools.partial(self._start, name, start))

    @property
    def run_id(self) -> str | None:
        """Weights & Biases' name of the run, to be saved and given to `build_trackers` on resuming; None without it."""
        return next((tracker.run_id for tracker in self._active.values() if isinstance(tracker, WandbTracker)), None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers among the values; texts, booleans and None stay in `metrics.jsonl`."""
        found = {key: plain(value) for key, value in values.items()}
        numbers = {key: float(value) for key, value in found.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        if numbers:
            self._each(lambda tracker: tracker.log(step, numbers))

    def sample(self, step: int, text: str) -> None:
        """Send a text that the model wrote."""
        self._each(lambda tracker: tracker.sample(step, text))

    def close(self) -> None:
        """Close all; safe to call twice."""
        self._each(lambda tracker: tracker.close())
        self._active.clear()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._active.items()):
            self._guard(name, functools.partial(do, tracker))

    def _start(self, name: str, start: Callable[[], Tracker]) -> None:
        self._active[name] = start()

    def _guard(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - third-party sinks: their libraries may raise anything, and none of it may end a run
            self._active.pop(name, None)
            self._warn(f"{name} failed and is switched off; training and {FILE_NAME} go on. {type(error).__name__}: {_sentence(error)}")


def build_trackers(
    backend: str,
    *,
    directory: Path,
    project: str,
    run_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
    run_id: str | None = None,
    warn: Callable[[str], None],
) -> Trackers:
    """The trackers of `--logging_backend` for the run in `directory`.

    Args:
        backend: tensorboard, wandb, both or none.
        resume_step: the step of the state that the run goes on from; None for a new run.
        run_id: `Trackers.run_id` of the run that is resumed.
        warn: told, in one sentence, when a tracker fails.

    Raises:
        UserError: there is no such backend.
    """
    if backend not in ("tensorboard", "wandb", "both", "none"):
        raise UserError(f"--logging_backend {backend!r} is not known. Known: tensorboard, wandb, both, none.")
    starts: dict[str, Callable[[], Tracker]] = {}
    if backend in ("tensorboard", "both"):
        starts["TensorBoard"] = lambda: TensorBoardTracker(directory / "logs", None if resume_step is None else resume_step + 1)
    if backend in ("wandb", "both"):
        starts["Weights & Biases"] = lambda: WandbTracker(project, run_name, directory, config or {}, run_id, warn)
    return Trackers(starts, warn)


def _sentence(error: BaseException) -> str:
    """An error's message as one line that ends like a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
