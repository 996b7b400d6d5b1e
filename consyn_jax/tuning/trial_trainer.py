"""Train a trial with the trainer of `consyn-train` and programs shared with other trials."""

from __future__ import annotations

from collections.abc import Iterator
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
from consyn_jax.tuning.shared_programs import SharedPrograms, TrialProgram


class ValuesRefused(UserError):
    """The values of a trial cannot be trained; nothing else is wrong."""


@contextmanager
def refusing_values() -> Iterator[None]:
    """Let errors be `ValuesRefused`, except those for want of a file or a package."""
    try:
        yield
    except UserError as error:
        cause = error.__cause__
        while cause is not None:
            if isinstance(cause, OSError | ImportError):
                raise
            cause = cause.__cause__
        raise ValuesRefused(str(error)) from error


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
