"""The run record: the part of a checkpoint that is not in the training state."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field, is_dataclass
from types import NoneType
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing.best_evaluation import Selection
from consyn_jax.training.logging.advice import Adviser
from consyn_jax.training.logging.loss_spikes import LossSpikeDetector
from consyn_jax.training.optim.schedules import Plateau


@dataclass
class Progress:
    """The part of a run's progress that the configuration does not determine.

    Attributes:
        clipped: Number of steps with clipped gradients since the last line of metrics.
        unlogged: Number of steps since the last line of metrics.
        left_out: Number of steps whose update was skipped because the loss or a gradient was not
            finite.
        recent: The last losses, in which spikes are detected.
        stopped_of: Total steps of the budget, if a callback ended the run early; otherwise None.
        run: Identity of the run; None in checkpoints of older versions.
    """

    step: int = 0
    tokens: int = 0
    clipped: int = 0
    unlogged: int = 0
    left_out: int = 0
    recent: LossSpikeDetector = field(default_factory=LossSpikeDetector)
    selection: Selection = field(default_factory=Selection)
    plateau: Plateau | None = None
    adviser: Adviser = field(default_factory=Adviser)
    tracker_id: str | None = None
    stopped_of: int | None = None
    run: str | None = None

    @classmethod
    def from_json(cls, record: Any) -> Progress:
        """Build the progress from the parsed JSON of `dataclasses.asdict`.

        Raises:
            UserError: The record is damaged.
        """
        try:
            _ = record["step"]  # its default is for a new run, not for a damaged record
            return checked(cls, record)
        except (TypeError, KeyError) as error:
            raise UserError(
                f"The record of this checkpoint is damaged ({error}). Resume from another "
                "checkpoint with --resume STEP."
            ) from error


def _checked_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    """Convert a list from JSON to a tuple, and check the types of its items."""
    if not all(isinstance(item, (kind, int) if kind is float else kind) for item in value):
        raise TypeError(f"{name} is {value!r:.50}")
    return tuple(value)


def checked(kind: Any, values: Any) -> Any:
    """Build a dataclass from a dictionary of its fields, and check their types.

    Raises:
        TypeError: A value has the wrong type.
        KeyError: A field is unknown.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is {type(values).__name__}")
    hints, made = typing.get_type_hints(kind), {}
    for name, value in values.items():
        choices = typing.get_args(hints[name]) or (hints[name],)
        tuples = [c for c in (hints[name], *choices) if typing.get_origin(c) is tuple]
        if tuples and isinstance(value, list):
            made[name] = _checked_tuple(name, value, typing.get_args(tuples[0])[0])
            continue
        is_list = typing.get_origin(hints[name]) is list
        inner = next((choice for choice in choices if is_dataclass(choice)), None)
        made[name] = (
            value
            if inner is None or (value is None and NoneType in choices)
            else checked(inner, value)
        )
        allowed = tuple(choice for choice in choices if isinstance(choice, type))
        allowed = (*allowed, int) if float in allowed else allowed
        if isinstance(value, list) != is_list or not all(
            isinstance(item, allowed) for item in (value if is_list else [made[name]])
        ):
            raise TypeError(f"{name} is {value!r:.50}")
    return kind(**made)
