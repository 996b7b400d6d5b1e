"""Train a trial with the trainer of `consyn-train` and programs shared with other trials."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import optax

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.training.open_run import RunInputs
from consyn_jax.training.program import Built
from consyn_jax.training.runtime.signals import Signals
from consyn_jax.training.trainer import ConsynTrainer
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.shared_programs import SharedPrograms, TrialProgram, flags_of_programs
from consyn_jax.tuning.space.space_checks import points_to_check, refusal
from consyn_jax.tuning.varied_run import Settings, VariedRun

MOST_BUILDS = 100  # trials to build in search of one that this machine can train


class ValuesRefused(UserError):
    """The values of a trial cannot be trained; nothing else is wrong."""


@contextmanager
def refusing_values() -> Iterator[None]:
    """Turn errors into `ValuesRefused`, except errors about a missing file or package."""
    try:
        yield
    except UserError as error:
        cause = error.__cause__
        while cause is not None:
            if isinstance(cause, OSError | ImportError):
                raise
            cause = cause.__cause__
        raise ValuesRefused(str(error)) from error


def trainer_of_study(
    space: Sequence[Dimension], varied: VariedRun, make: Callable[[Settings], ConsynTrainer]
) -> ConsynTrainer:
    """Check that this machine can train some trial, and return a trainer that describes the study.

    The description must not depend on the machine. The trainer therefore has the first values that
    `make` accepts, even if this machine cannot build a program for these values.

    Args:
        make: function that returns the trainer of a run.

    Raises:
        UserError: none of the trials can be built (up to `MOST_BUILDS` are tried), or a file or
            package is missing.
    """
    first = {dimension.name: dimension.ends[0] for dimension in space}
    points = points_to_check(flags_of_programs(space, varied))  # other flags change no program
    if len(points) > MOST_BUILDS:
        points = [points[0], *random.Random(0).sample(points[1:], MOST_BUILDS - 1)]
    found: ConsynTrainer | None = None
    refused: list[tuple[dict[str, Any], ValuesRefused]] = []
    for values in points:
        try:
            with refusing_values():
                trainer = make(varied.with_values({**first, **values}))
                found = trainer if found is None else found
                trainer.build()
        except ValuesRefused as error:
            refused.append((values, error))
        else:
            return found
    values, cause = refused[0]
    if len({str(error) for _, error in refused}) == 1:  # the values are not the cause
        raise UserError(str(cause)) from cause
    raise refusal(values, str(cause)) from cause


class TrialTrainer(ConsynTrainer):
    """The trainer of one trial.

    Args:
        shared: compiled programs of the study so far; this trial adds its programs.
        header: rows of name and value, printed before the trial begins.
        signals: record of the signals of this process; if None, the trial records signals itself.
        inputs: keyword arguments of `ConsynTrainer`.
    """

    def __init__(
        self,
        shared: SharedPrograms,
        header: list[tuple[str, str]],
        signals: Signals | None = None,
        **inputs: Any,
    ) -> None:
        super().__init__(**inputs)
        self.shared, self.header, self.signals = shared, header, signals

    def add_callback(self, callback: Any) -> None:
        """Add a callback, which receives the trial's evaluations and may end the trial."""
        self._callbacks = (*self._callbacks, callback)

    def _build(self, run: RunConfig, schedule: optax.Schedule | None) -> Built:
        built = super()._build(run, schedule)
        fields = {name: getattr(built.program, name) for name in built.program.__match_args__}
        own = TrialProgram(**fields, shared=self.shared, run=run, total_steps=self.total_steps)
        return built._replace(program=own)

    def compile_train_step(self, run: RunConfig, schedule: optax.Schedule | None = None) -> Any:
        """Compile the train step of `run`, or reuse the step of another trial."""
        return self.shared.bound_step(self._build(run, schedule).program, run, self.total_steps)

    def run_inputs(self) -> RunInputs:
        """All inputs of the trial's run.

        Notes and warnings about settings are left out, because bad settings are part of a search.
        """
        return replace(
            super().run_inputs(),
            header=self.header,
            warnings=[],
            signals=self.signals,
            exports_model=False,
            is_trial=True,
        )
