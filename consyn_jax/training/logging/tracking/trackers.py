"""Trackers: callbacks that copy a run's metrics and samples to TensorBoard or Weights & Biases."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from consyn_jax.training.logging.tracking.callbacks import Maker, RunView
from consyn_jax.training.logging.tracking.event_file import EventFile
from consyn_jax.training.logging.tracking.wandb_rows import Row, row_of, written_rows

Table = tuple[list[str], list[list[Any]]]  # names of the columns, and rows


class TensorBoardTracker:
    """Writes events for TensorBoard to `logs_dir`, in a new file for each start of the run.

    Args:
        purge_step: first step after the step from which the run resumes; None for a new run.
            TensorBoard ignores the points of earlier files from `purge_step` on.
    """

    def __init__(self, logs_dir: Path, purge_step: int | None = None) -> None:
        self._logs_dir, self._purge_step = logs_dir, purge_step
        self._newest = -1  # step of the last line of training metrics
        self._file: EventFile | None = None  # opened late, because the import takes seconds
        self._samples = NewSamples(None if purge_step is None else purge_step - 1)

    def on_step(self, run: RunView, values: Mapping[str, Any]) -> None:
        """Write the numbers in a line of metrics as an event, and new samples as further events."""
        self._newest = values["step"]
        self._line(run, values["step"], numbers(values))

    def on_evaluate(self, run: RunView, values: Mapping[str, Any]) -> None:
        """Write an event with the metrics, and an event with the histograms if there are any."""
        metrics = numbers(values)
        if values["step"] == self._newest:  # `on_step` has written `tokens` and `time_s`
            metrics = {name: value for name, value in metrics.items() if "/" in name}
        self._line(run, values["step"], metrics)
        if run.histograms:
            from tensorboardX.proto.summary_pb2 import Summary

            shown = [_summary(name, each) for name, each in run.histograms.items()]
            self._write(values["step"], Summary(value=shown))

    def on_save(self, run: RunView, path: Path) -> None:
        """Flush the events to disk; a run resumed from this checkpoint will not rewrite them."""
        if self._file is not None:
            self._file.flush()

    def _line(self, run: RunView, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        if self._file is None and run.resumed_from is None:
            rows = [[name, value] for name, value in run.config.items()]
            self._text(0, "config", markdown((["flag", "value"], rows)))
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._write(step, Summary(value=scalars))
        for sample in self._samples.new(run):
            # Indent the text, so that TensorBoard does not format it as Markdown.
            indented = "\n".join("    " + line for line in sample["text"].splitlines())
            self._text(sample["step"], "sample", indented)

    def on_end(self, run: RunView, ending: str) -> None:
        """Write the table of evaluations, and close the file."""
        if self._file is None:  # nothing was logged
            return
        if (table := evaluations(run.history))[1]:
            self._text(run.step, "evaluations", markdown(table))
        self._file.close()

    def _text(self, step: int, tag: str, text: str) -> None:
        from tensorboardX.summary import text as text_summary

        self._write(step, text_summary(tag, text))

    def _open(self) -> EventFile:
        from tensorboardX.proto import event_pb2

        self._logs_dir.mkdir(parents=True, exist_ok=True)
        self._event = event_pb2.Event
        file = EventFile(self._logs_dir)
        file.write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.Value("START"))
            purge = {"wall_time": time.time(), "step": self._purge_step, "session_log": start}
            file.write(self._event(**purge))
        return file

    def _write(self, step: int, summary: Any) -> None:
        if self._file is not None and not self._logs_dir.is_dir():  # deleted during the run
            self._file.close()
            self._file = None
        if self._file is None:
            self._file = self._open()
        self._file.write(self._event(wall_time=time.time(), step=step, summary=summary))


class WandbTracker:
    """Copies a run to Weights & Biases, with local files in `directory`/wandb.

    The constructor starts the W&B run. With WANDB_MODE=offline, neither network nor key is needed.
    Without a key or a network, the W&B run is also kept offline, and `warn` tells how to upload it.
    A resumed run continues its W&B run, and sends only the lines of metrics that are missing there.

    Args:
        config: every setting by flag name.
        run_id: id of the W&B run to continue; None for a new one.
        resume_step: the step from which the run resumes; None for a new run.
        keep_id: called with the id of the W&B run, to save it for the next start.
        warn: called with a sentence if W&B cannot be reached.
    """

    def __init__(
        self,
        project: str,
        run_name: str | None,
        directory: Path,
        config: Mapping[str, Any],
        run_id: str | None = None,
        resume_step: int | None = None,
        keep_id: Callable[[str], None] = lambda run_id: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        self._samples = NewSamples(resume_step)
        # At the end, wandb waits for its uploads, by default without limit. If the network fails,
        # the job would never end and would block its GPUs.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")
        # console="off": otherwise wandb redirects stdout and stderr, which breaks the progress bar.
        # login_timeout: otherwise wandb waits for ever for a user who types the key.
        settings = wandb.Settings(console="off", quiet=True, login_timeout=60)
        begin = functools.partial(
            wandb.init,
            project=project,
            name=run_name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(directory),
            config=dict(config),
            settings=settings,
        )
        try:
            self._run = begin(mode=None)
        except (wandb.errors.Error, TimeoutError) as error:
            self._run = begin(mode="offline")
            warn(
                f"Weights & Biases: {_sentence(error)} The run is logged offline in "
                f"{directory / 'wandb'}; upload it later with `wandb sync`."
            )
        # Log our step as a value: wandb drops values at steps before its newest step, and a resumed
        # run has such steps.
        self._run.define_metric("*", step_metric="step")
        keep_id(self._run.id)
        changes = config.get("resume", "auto") != "auto" or bool(config.get("overwrite_schedule"))
        self._find_rows(run_id, resume_step if changes else None)

    def _find_rows(self, run_id: str | None, until: int | None) -> None:
        """Find the rows that earlier starts have written.

        Args:
            run_id: id of the W&B run to continue; None for a new one.
            until: last step whose rows count as written; None if all rows count.
        """
        self._lacks_rows, self._written, self._uploaded = run_id is not None, set[Row](), -1
        if run_id is None:
            return
        own = Path(self._run.dir).parent
        self._written = written_rows(own.parent, run_id, own)
        if not self._run.offline:
            self._uploaded = int(self._run.summary.get("step", -1))
        if until is not None:
            self._written = {row for row in self._written if row[0] <= until}
            self._uploaded = min(self._uploaded, until)

    def on_step(self, run: RunView, values: Mapping[str, Any]) -> None:
        """Log the numbers in a line of metrics as a row, and new samples as further rows."""
        import html

        import wandb

        if self._lacks_rows:
            self._lacks_rows = False
            for line in run.history:
                if "event" not in line and line["step"] < values["step"]:
                    self._row(line)
        self._row(values)
        for sample in self._samples.new(run):
            page = f"<pre style='white-space:pre-wrap'>{html.escape(sample['text'])}</pre>"
            shown = wandb.Html(page, inject=False)
            self._run.log({"step": sample["step"], "sample": shown})

    def on_evaluate(self, run: RunView, values: Mapping[str, Any]) -> None:
        """Log a row with the metrics, and a row with the histograms if there are any."""
        import wandb

        self.on_step(run, values)
        if run.histograms:
            shown = {
                name: wandb.Histogram(np_histogram=(each.counts, each.edges))
                for name, each in run.histograms.items()
            }
            self._run.log({"step": values["step"], **shown})

    def _row(self, line: Mapping[str, Any]) -> None:
        """Log a line of metrics, unless an earlier start of the run has written it."""
        if line["step"] > self._uploaded and row_of(line) not in self._written:
            self._run.log({"step": line["step"], **numbers(line)})

    def on_end(self, run: RunView, ending: str) -> None:
        """Send the tables and the report, and wait at most WANDB_FINISH_TIMEOUT seconds."""
        import wandb

        samples = [[sample[key] for key in SAMPLE] for sample in run.samples]
        tables = {"evaluations": evaluations(run.history), "samples": (list(SAMPLE), samples)}
        shown = {name: wandb.Table(*table) for name, table in tables.items() if table[1]}
        if shown:
            self._run.log({"step": run.step, **shown})
        if (page := run.directory / "report.html").is_file():
            artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
            artifact.add_file(str(page))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if ending.startswith(("complete", "stopped")) else 1)


def _summary(name: str, histogram: Any) -> Any:
    from tensorboardX.summary import histogram_raw

    counts, edges = histogram.counts, histogram.edges
    about = edges[0], edges[-1], int(counts.sum()), histogram.total, histogram.squares
    return histogram_raw(name, *about, edges[1:].tolist(), counts.tolist()).value[0]


SAMPLE = ("step", "tokens", "text")


class NewSamples:
    """The samples of a run that a tracker has not written yet.

    Args:
        resumed_from: step up to which an earlier start has written samples; None for a new run.
    """

    def __init__(self, resumed_from: int | None) -> None:
        self._newest = -1 if resumed_from is None else resumed_from

    def new(self, run: RunView) -> Iterable[Mapping[str, Any]]:
        """Return the samples added since the last call."""
        found = [sample for sample in run.samples if sample["step"] > self._newest]
        self._newest = max([self._newest, *(sample["step"] for sample in found)])
        return found


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numeric values of a line of metrics, without its step and without booleans."""
    return {
        key: float(value)
        for key, value in line.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def evaluations(history: Sequence[Mapping[str, Any]]) -> Table:
    """The evaluations of a run as a table."""
    lines = [line for line in history if "event" not in line and "eval/loss" in line]
    names = dict.fromkeys(key for line in lines for key in line if key.startswith("eval/"))
    columns = ["step", "tokens", *names]
    return columns, [[line.get(name) for name in columns] for line in lines]


def markdown(table: Table) -> str:
    r"""Format a table as Markdown.

    >>> print(markdown((["flag", "value"], [["lr", 0.5], ["stop", "a|b"]])))
    | flag | value |
    | --- | --- |
    | lr | 0.5 |
    | stop | a\|b |
    """
    columns, rows = table
    cells = [
        [f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def tracker_makers(
    backends: Sequence[str],
    *,
    directory: Path,
    project: str,
    run_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
    run_id: str | None = None,
    keep_id: Callable[[str], None] = lambda run_id: None,
    warn: Callable[[str], None],
) -> list[Maker]:
    """Name and constructor of each tracker that `--logging_backend` names.

    Args:
        backends: the values of `--logging_backend`.
        directory: the run directory.
        config: every setting by flag name.
        resume_step: the step from which the run resumes; None for a new run.
        run_id: id of the Weights & Biases run to continue; None for a new one.
        keep_id: called with the id of the Weights & Biases run, to save it for the next start.
        warn: called with a sentence if Weights & Biases cannot be reached.
    """
    makers: list[Maker] = []
    if {"tensorboard", "both"} & set(backends):
        purge_step = None if resume_step is None else resume_step + 1
        make = functools.partial(TensorBoardTracker, directory / "logs", purge_step)
        makers.append(("TensorBoard", make))
    if {"wandb", "both"} & set(backends):
        names = (project, run_name, directory, config or {})
        make_run = functools.partial(WandbTracker, *names, run_id, resume_step, keep_id, warn)
        makers.append(("Weights & Biases", make_run))
    return makers


def _sentence(error: BaseException) -> str:
    """An error's message on one line, with a full stop at the end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
