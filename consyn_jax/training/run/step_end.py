"""Plan the actions at the end of a step, before any of them is performed."""

from __future__ import annotations

from dataclasses import dataclass

from consyn_jax.training.runtime.signals import StopCoordinator


@dataclass(frozen=True)
class StepEnd:
    """The actions that are due at the end of a step.

    Attributes:
        stop: Whether a signal or a callback ends the run.
        last: Whether this is the last step of the run.
    """

    evaluate: bool = False
    save: bool = False
    stop: bool = False
    last: bool = False

    @property
    def is_due(self) -> bool:
        """Whether any action is due before the next step."""
        return self.evaluate or self.save or self.stop


def plan_step_end(
    step: int,
    total_steps: int,
    eval_steps: int | None,
    save_steps: int,
    coordinator: StopCoordinator,
) -> StepEnd:
    """Plan the actions at the end of `step`, counted from 1.

    Args:
        eval_steps: Steps between evaluations; None for no evaluations.
        save_steps: Steps between checkpoints.
    """
    last = step == total_steps
    return StepEnd(
        evaluate=eval_steps is not None and (step % eval_steps == 0 or last),
        save=step % save_steps == 0 or last or coordinator.save_now,
        stop=coordinator.stop_signal is not None or coordinator.ends_now,
        last=last,
    )


def interval(steps: int | None, total_steps: int) -> int:
    """Number of steps between evaluations or checkpoints; by default a tenth of the run.

    >>> interval(7, 200), interval(None, 200), interval(None, 3)
    (7, 20, 1)
    """
    return max(1, total_steps // 10) if steps is None else steps
