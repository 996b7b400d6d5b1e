"""Compare models in a table, with intervals, differences and changed answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from consyn_jax.inference.scoring.resampling import Interval, ratio_interval
from consyn_jax.inference.scoring.text_scores import TextScores
from consyn_jax.scoring.request_scores import TaskScores


@dataclass(frozen=True)
class Value:
    """A metric's value for one model.

    Attributes:
        interval: 95 % interval; None if there are no resamples.
        difference: Difference from the first model's value; None for the first model.
        difference_interval: 95 % interval of the difference.
        changed: Share of the requests whose answer differs from the first model's.
    """

    value: float
    interval: Interval | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    changed: float | None = None


@dataclass(frozen=True)
class Section:
    """The results for one data source or task.

    Attributes:
        size: Size of the data, as text: "500 requests".
        values: By metric, a value for each model; None if the model has no value.
        notes: Notes about each model.
    """

    name: str
    size: str
    values: dict[str, list[Value | None]]
    notes: tuple[tuple[str, ...], ...]

    def as_json(self) -> dict[str, Any]:
        """The section as an object for the JSON file."""
        return {
            "name": self.name,
            "size": self.size,
            "notes": self.notes,
            "metrics": {
                metric: [None if value is None else asdict(value) for value in row]
                for metric, row in self.values.items()
            },
        }


def text_section(name: str, scores: Sequence[TextScores], resamples: int, seed: int) -> Section:
    """Build the section with the models' results for texts.

    Models may have different tokenizers, so differences are given only for bits per byte.
    """
    metrics = list(dict.fromkeys(metric for each in scores for metric in each.metrics))
    values: dict[str, list[Value | None]] = {}
    for metric in metrics:
        values[metric] = [_text_value(metric, each, resamples, seed) for each in scores]
    byte_row = values.get("bits_per_byte", [])
    for at, value in enumerate(byte_row[1:], 1):
        first = byte_row[0]
        if value is not None and first is not None:
            difference = value.value - first.value
            byte_row[at] = Value(value.value, value.interval, difference)
    first_one = scores[0]
    size = f"{first_one.documents:,} document{'' if first_one.documents == 1 else 's'}"
    if first_one.num_bytes:
        size += f", {first_one.num_bytes:,} bytes"
    return Section(name, size, values, tuple(_text_notes(each) for each in scores))


def _text_value(metric: str, scores: TextScores, resamples: int, seed: int) -> Value | None:
    if metric not in scores.metrics:
        return None
    interval = None
    if metric in ("perplexity", "loss", "bits_per_token"):
        found = ratio_interval(scores.nll, scores.tokens, resamples, seed)
        scale = {"perplexity": _exp, "bits_per_token": lambda x: x / math.log(2)}
        change = scale.get(metric, lambda x: x)
        interval = None if found is None else Interval(change(found.low), change(found.high))
    return Value(scores.metrics[metric], interval)


def _text_notes(scores: TextScores) -> tuple[str, ...]:
    tokens = int(scores.tokens.sum())
    notes = [
        f"{tokens:,} tokens scored in windows of {scores.window:,}, stride {scores.stride:,}",
        f"intervals by resampling {len(scores.nll):,} {scores.unit}s",
    ]
    if scores.unscored:
        notes.append(
            f"{scores.unscored:,} tokens not scored, because nothing precedes them in a window"
        )
    return (*notes, *scores.notes)


def task_section(scores: Sequence[TaskScores], resamples: int, seed: int) -> Section:
    """Build the section with the models' results for a task."""
    task, first = scores[0].task, scores[0]
    values: dict[str, list[Value | None]] = {}
    for metric in first.units:
        values[metric] = [
            _task_value(metric, each, None if each is first else first, resamples, seed)
            for each in scores
        ]
    count = task.size
    size = f"{count:,} request{'' if count == 1 else 's'}"
    return Section(task.name, size, values, tuple(each.notes for each in scores))


def _task_value(
    metric: str, scores: TaskScores, first: TaskScores | None, resamples: int, seed: int
) -> Value:
    over, under = scores.units[metric]
    scale = _exp if metric == "perplexity" else float
    value = scale(over.sum() / under.sum())
    found = ratio_interval(over, under, resamples, seed)
    interval = None if found is None else Interval(scale(found.low), scale(found.high))
    if first is None:
        return Value(value, interval)
    other_over, other_under = first.units[metric]
    difference = value - scale(other_over.sum() / other_under.sum())
    paired = None
    if metric != "perplexity" and np.array_equal(under, other_under):
        paired = ratio_interval(over - other_over, under, resamples, seed)
    changed = None
    if metric in scores.choices:
        changed = float((scores.choices[metric] != first.choices[metric]).mean())
    elif metric == "greedy_match":
        changed = float((over != other_over).mean())
    return Value(value, interval, difference, paired, changed)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


# ------------------------------------------------------------------------------------------- print


def as_lines(sections: Sequence[Section], models: Sequence[str]) -> list[str]:
    """The table for a terminal: a block for each section, a line for each metric and model."""
    width = max(map(len, models))
    lines: list[str] = []
    for section in sections:
        lines.append(f"{section.name} ({section.size})")
        for metric, row in section.values.items():
            for model, value in zip(models, row, strict=True):
                if value is not None:
                    lines.append(f"  {metric:<22}  {model:<{width}}  {shown(value)}".rstrip())
        for note, names in _grouped_notes(section, models).items():
            whose = "" if len(names) == len(models) else f"{', '.join(names)}: "
            lines.append(f"  {whose}{note}")
    return lines


def shown(value: Value) -> str:
    """Format a value with its interval and its difference from the first model's value."""
    text = f"{value.value:.6g}"
    if value.interval is not None:
        text += f"  [{value.interval.low:.4g}, {value.interval.high:.4g}]"
    if value.difference is not None:
        text += f"  {value.difference:+.4g}"
        if value.difference_interval is not None:
            low, high = value.difference_interval
            text += f" [{low:+.4g}, {high:+.4g}]"
    if value.changed is not None:
        text += f"  {value.changed:.1%} of answers changed"
    return text


def _grouped_notes(section: Section, models: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for model, notes in zip(models, section.notes, strict=True):
        for note in notes:
            found.setdefault(note, []).append(model)
    return found
