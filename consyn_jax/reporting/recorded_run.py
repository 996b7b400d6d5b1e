"""Read finished and running runs from their directories."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consyn_jax.config_file import DERIVED
from consyn_jax.errors import UserError
from consyn_jax.training.logging.curves import Metrics, Point, best, curve, smooth
from consyn_jax.training.logging.metrics import FILE_NAME, ending, read_metrics
from consyn_jax.training.provenance.run_facts import made_with, read_facts
from consyn_jax.training.run.directory import CONFIG
from consyn_jax.training.run.identity import read_run_config
from consyn_jax.training.run.lock import is_held

# Flags that do not change the experiment, so they are left out of comparisons.
NOT_COMPARED = {"output", "overwrite", "resume", "quiet", "wandb_project", "wandb_run_name"}


@dataclass(frozen=True)
class RecordedRun:
    """One run, as read from its directory for a report.

    Attributes:
        name: a short name, unique among the runs of the report.
        metrics: the lines of metrics.jsonl.
        values: the value of each flag.
        total_steps: planned number of steps; 0 if unknown.
        about: devices, versions and commit at the latest start of the run.
        is_running: whether a process holds the lock of the run directory.
    """

    name: str
    metrics: Metrics
    values: Mapping[str, Any]
    total_steps: int
    about: Mapping[str, str]
    is_running: bool

    @property
    def state(self) -> str:
        """The state in words: complete, running, diverged, stopped by a signal, or not ended."""
        if self.is_running:
            return "running"
        return ending([line for line in self.metrics if "event" in line])

    @property
    def best(self) -> Point | None:
        """The point of the lowest evaluation loss; None if the run has no evaluation."""
        return best(curve(self.metrics, "eval/loss"))

    @property
    def results(self) -> dict[str, float | str | None]:
        """The results of the run by column name; None for values that were not logged.

        The training loss is smoothed, tokens/s is the median of the run, and time is in seconds.
        """
        train, speed = curve(self.metrics, "train/loss"), "throughput/tokens_per_s"
        last: Mapping[str, Any] = self.metrics[-1] if self.metrics else {}
        lowest, speeds = self.best, [point.value for point in curve(self.metrics, speed)]
        return {
            "state": self.state,
            "step": last.get("step"),
            "of": self.total_steps,
            "tokens": last.get("tokens"),
            "best eval loss": None if lowest is None else lowest.value,
            "at step": None if lowest is None else lowest.step,
            "train loss": smooth(train)[-1].value if train else None,
            "tokens/s": statistics.median(speeds) if speeds else None,
            "time": last.get("time_s"),
        }


def read_run(directory: Path, name: str = "") -> RecordedRun:
    """Read a run from its directory, which stays unchanged.

    Args:
        name: the name to show; if empty, the name of the directory.

    Raises:
        UserError: the directory holds no run, or a file in it is damaged.
    """
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory} is not the directory of a run: it has no {CONFIG}.")
    values = read_run_config(directory / CONFIG, remedy="Restore it from a copy.")
    steps = values.pop(DERIVED).get("total_steps")
    metrics = read_metrics(directory / FILE_NAME) if (directory / FILE_NAME).exists() else []
    return RecordedRun(
        name or directory.resolve().name,
        metrics,
        values,
        steps if isinstance(steps, int) else 0,
        _about(read_facts(directory)),
        is_held(directory),
    )


def _about(facts: dict[str, Any] | None) -> dict[str, str]:
    if facts is None or not facts["starts"]:
        return {}
    start = facts["starts"][-1]
    devices = f"{start.get('num_devices', '?')} x {start.get('device_kind', '?')}"
    return {"devices": devices, **dict(made_with(facts))}


def read_runs(directories: Sequence[Path]) -> list[RecordedRun]:
    """Read several runs, and give each a short unique name from its path.

    Raises:
        UserError: a directory is given twice, or holds no readable run.
    """
    places = [directory.resolve() for directory in directories]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice. Leave one of them out.")
    names = short_names(places)
    return [read_run(d, name) for d, name in zip(directories, names, strict=True)]


def short_names(places: Sequence[Path]) -> list[str]:
    """Shorten all paths to their last n parts, with the smallest n that gives unique names.

    >>> short_names([Path("/a/x/run"), Path("/a/y/run")])
    ['x/run', 'y/run']
    """
    for depth in range(1, max((len(place.parts) for place in places), default=1) + 1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def differing(runs: Sequence[RecordedRun]) -> list[tuple[str, list[str]]]:
    """Flags whose values differ between the runs, each with its value in every run."""
    names = dict.fromkeys(name for run in runs for name in run.values)
    rows = [(name, [run.values.get(name) for run in runs]) for name in names]
    texts = [(name, _texts(values)) for name, values in rows if name not in NOT_COMPARED]
    return [(name, found) for name, found in texts if len(set(found)) > 1]


def _texts(values: Sequence[Any]) -> list[str]:
    """Format values with 6 digits, or with all digits if different values would look equal."""
    whole = [_text(value) for value in values]
    short = [
        f"{value:.6g}" if isinstance(value, float) else text
        for value, text in zip(values, whole, strict=True)
    ]
    return short if len(set(short)) == len(set(whole)) else whole


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
