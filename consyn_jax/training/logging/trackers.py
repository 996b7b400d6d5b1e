"""Trackers copy a run's numbers and samples to TensorBoard or Weights & Biases.

To add one, write a class with the four methods of `Tracker`, and a line in `build_trackers`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from consyn_jax.errors import UserError
from consyn_jax.training.logging.metrics import FILE_NAME, plain


@runtime_checkable
class Tracker(Protocol):
    """A place that metrics are copied to, for people to look at.

    Methods may raise anything: `Trackers` catches it.
    """

    def start(self, config: Mapping[str, Any]) -> str | None:
        """Begin with the run's configuration; libraries are imported here, not before.

        Returns:
            The service's id of the run, by which a resumed run continues it; None if it has none.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""

    def sample(self, step: int, text: str) -> None:
        """Record a text that the model wrote."""

    def close(self) -> None:
        """Write what is still buffered."""


class TensorBoardTracker:
    """Events for TensorBoard in `logs_dir`, in a new file for each start of the run.

    Args:
        purge_step: TensorBoard drops the points of earlier files from this step on: the step after
            the one that the run resumes from.
    """

    def __init__(self, logs_dir: Path, purge_step: int | None = None) -> None:
        self._logs_dir, self._purge_step = logs_dir, purge_step
        self._writer: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Do nothing: the file is opened with its first event.

        Importing tensorboardX takes seconds if torch is installed, because it imports torch. At the
        first event, the device already works on the second step.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all the values."""
        from tensorboardX.proto.summary_pb2 import Summary

        values_of_event = [
            Summary.Value(tag=key, simple_value=value) for key, value in values.items()
        ]
        self._write(step, Summary(value=values_of_event))

    def sample(self, step: int, text: str) -> None:
        """The text, indented so that TensorBoard does not read it as Markdown."""
        from tensorboardX.summary import text as text_summary

        indented = "\n".join("    " + line for line in text.splitlines())
        self._write(step, text_summary("sample", indented))

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        # SummaryWriter queues events for a thread. Once that thread has died of a full disk, the
        # queue fills and training hangs. The writer below it writes at once, and raises errors.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._logs_dir.mkdir(parents=True, exist_ok=True)
        self._event = event_pb2.Event
        # Two starts within a second would share a name, and the second would overwrite the first.
        suffix = f".{os.getpid()}.{time.time_ns() % 10**9:09d}"
        writer = EventsWriter(str(self._logs_dir / "events"), suffix)
        if self._purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.Value("START"))
            writer.write_event(
                event_pb2.Event(wall_time=time.time(), step=self._purge_step, session_log=start)
            )
        return writer

    def _write(self, step: int, summary: Any) -> None:
        if self._writer is not None and not self._logs_dir.is_dir():  # deleted under the run
            self.close()
            self._writer = None
        if self._writer is None:
            self._writer = self._open()
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


class WandbTracker:
    """A Weights & Biases run, with its files in `directory`/wandb.

    WANDB_MODE=offline needs neither network nor key. Without a key or a network the run is kept
    offline, too, and `warn` says how to upload it.

    Args:
        run_id: the run to continue, from `Trackers.run_id` of the earlier start.
    """

    def __init__(
        self,
        project: str,
        run_name: str | None,
        directory: Path,
        run_id: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._directory, self._warn = directory, warn
        self._identity: dict[str, Any] = {
            "project": project,
            "name": run_name,
            "id": run_id,
            "resume": "allow" if run_id else None,
        }

    def start(self, config: Mapping[str, Any]) -> str:
        """Start or continue the run at Weights & Biases, offline if it cannot be reached."""
        import wandb

        self._directory.mkdir(parents=True, exist_ok=True)
        # At the end wandb waits for its uploads, by default without limit: with a dead network it
        # would keep the job, and its GPUs, alive.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")
        # console off: wandb would otherwise wrap stdout and stderr, and with them the progress bar.
        # A prompt for a key that is not answered times out.
        settings = wandb.Settings(console="off", quiet=True, login_timeout=60)
        begin = functools.partial(
            wandb.init,
            dir=str(self._directory),
            config=dict(config),
            settings=settings,
            **self._identity,
        )
        try:
            self._run = begin(mode=None)
        except (wandb.errors.Error, TimeoutError) as error:
            self._run = begin(mode="offline")
            self._warn(
                f"Weights & Biases: {_sentence(error)} The run is kept offline in "
                f"{self._directory / 'wandb'}; `wandb sync` uploads it."
            )
        # wandb drops values at steps before its newest, as there are after a resume, so the step is
        # logged as a value.
        self._run.define_metric("*", step_metric="step")
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the history."""
        self._run.log({"step": step, **values})

    def sample(self, step: int, text: str) -> None:
        """The text as HTML, escaped."""
        import html

        import wandb

        page = f"<pre style='white-space:pre-wrap'>{html.escape(text)}</pre>"
        self._run.log({"step": step, "sample": wandb.Html(page, inject=False)})

    def close(self) -> None:
        """Upload what is left, for at most WANDB_FINISH_TIMEOUT seconds, and end the run."""
        self._run.finish()


class Trackers:
    """Several trackers as one that never raises.

    A tracker that fails is reported once and switched off; training continues.

    Args:
        trackers: by the name that warnings use.
        config: the run's configuration.
        warn: called with one sentence about each failure.

    Attributes:
        run_id: Weights & Biases' id of the run, to be saved and given to `build_trackers` on
            resuming.
    """

    def __init__(
        self,
        trackers: Mapping[str, Tracker],
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._active, self._warn = dict(trackers), warn
        self.run_id: str | None = None
        self._each(functools.partial(self._start, config))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers among the values; texts, booleans and None stay in `metrics.jsonl`."""
        found = {key: plain(value) for key, value in values.items()}
        numbers = {
            key: float(value)
            for key, value in found.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if numbers:
            self._each(lambda tracker: tracker.log(step, numbers))

    def sample(self, step: int, text: str) -> None:
        """Send a text that the model wrote."""
        self._each(lambda tracker: tracker.sample(step, text))

    def close(self) -> None:
        """Close all; safe to call twice."""
        self._each(lambda tracker: tracker.close())
        self._active.clear()

    def _start(self, config: Mapping[str, Any], tracker: Tracker) -> None:
        self.run_id = tracker.start(config) or self.run_id

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._active.items()):
            try:
                do(tracker)
            # Third-party libraries may raise anything, and none of it may end a run.
            except Exception as error:  # noqa: BLE001
                del self._active[name]
                self._warn(
                    f"{name} failed and is switched off; training and {FILE_NAME} continue. "
                    f"{type(error).__name__}: {_sentence(error)}"
                )


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
        resume_step: the step that the run resumes from; None for a new run.
        run_id: `Trackers.run_id` of the start that is resumed.
        warn: called with one sentence when a tracker fails.

    Raises:
        UserError: the backend is unknown.
    """
    if backend not in ("tensorboard", "wandb", "both", "none"):
        raise UserError(
            f"--logging_backend {backend!r} is unknown. Known: tensorboard, wandb, both, none."
        )
    trackers: dict[str, Tracker] = {}
    if backend in ("tensorboard", "both"):
        purge_step = None if resume_step is None else resume_step + 1
        trackers["TensorBoard"] = TensorBoardTracker(directory / "logs", purge_step)
    if backend in ("wandb", "both"):
        trackers["Weights & Biases"] = WandbTracker(project, run_name, directory, run_id, warn)
    return Trackers(trackers, config or {}, warn)


def _sentence(error: BaseException) -> str:
    """An error's message as one line that ends like a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
