"""How far a run has come: what its checkpoints hold beside the state, and how fast it goes."""

from __future__ import annotations

import time
import typing
from dataclasses import dataclass, field, is_dataclass
from types import NoneType
from typing import Any

from consyn_jax.config import UserError
from consyn_jax.training.scheduler import Plateau
from consyn_jax.training.selection import Selection
from consyn_jax.training.spikes import RecentLosses


@dataclass
class Progress:
    """What a checkpoint holds beside the state; everything else follows from the configuration.

    Attributes:
        clipped, unlogged: of the steps since the last line of metrics, those whose gradients were clipped, and all.
        left_out: steps whose update was left out because the loss or a gradient was not finite.
    """

    step: int = 0
    tokens: int = 0
    clipped: int = 0
    unlogged: int = 0
    left_out: int = 0
    recent: RecentLosses = field(default_factory=RecentLosses)
    selection: Selection = field(default_factory=Selection)
    plateau: Plateau | None = None
    tracker_id: str | None = None

    @classmethod
    def from_json(cls, record: Any) -> Progress:
        """From what `dataclasses.asdict` gave, by way of JSON.

        Raises:
            UserError: it is something else.
        """
        try:
            return checked(cls, record)
        except (TypeError, KeyError) as error:
            raise UserError(f"The record of this checkpoint is damaged ({error}). Go on from another with --resume STEP.") from error


def checked(kind: Any, values: Any) -> Any:
    """A dataclass from the dictionary of its fields, each of its type.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is {type(values).__name__}")
    hints, made = typing.get_type_hints(kind), {}
    for name, value in values.items():
        choices = typing.get_args(hints[name]) or (hints[name],)
        listed = typing.get_origin(hints[name]) is list
        inner = next((choice for choice in choices if is_dataclass(choice)), None)
        made[name] = value if inner is None or (value is None and NoneType in choices) else checked(inner, value)
        allowed = (*choices, int) if float in choices else choices
        if isinstance(value, list) != listed or not all(isinstance(item, allowed) for item in (value if listed else [made[name]])):
            raise TypeError(f"{name} is {value!r:.50}")
    return kind(**made)


class Stopwatch:
    """Steps, tokens and waiting since the last lap; pauses do not count."""

    def __init__(self) -> None:
        self.steps = self.tokens = 0
        self._began, self._waited_s = time.perf_counter(), 0.0

    def lap(self, waited_s: float) -> tuple[float, float, float]:
        """(seconds a step, tokens a second, share of the time spent waiting for data) since the last lap."""
        now = time.perf_counter()
        elapsed = max(now - self._began, 1e-9)
        result = elapsed / max(self.steps, 1), self.tokens / elapsed, min(1.0, (waited_s - self._waited_s) / elapsed)
        self.steps = self.tokens = 0
        self._began, self._waited_s = now, waited_s
        return result

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second since the last lap."""
        return self.tokens / max(time.perf_counter() - self._began, 1e-9)

    def pause(self, seconds: float) -> None:
        """Leave these seconds out."""
        self._began += seconds
