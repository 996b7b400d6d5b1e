from unittest.mock import Mock

import pytest

from consyn_jax.training.run.step_end import StepEnd, plan_step_end
from consyn_jax.training.runtime.signals import StopCoordinator


def planned(step: int, eval_steps: int | None = 4, **told: object) -> StepEnd:
    """The end of a step of 10, with a checkpoint every 3 steps."""
    quiet = {"stop_signal": None, "save_now": False, "ends_now": False}
    coordinator = Mock(spec=StopCoordinator, **(quiet | told))
    return plan_step_end(step, 10, eval_steps, 3, coordinator)


def test_evaluations_and_checkpoints_are_due_at_their_steps_and_at_the_last() -> None:
    for step in range(1, 11):
        due = planned(step)
        assert due.evaluate == (step in (4, 8, 10))
        assert due.save == (step in (3, 6, 9, 10))
        assert due.last == (step == 10)
        assert not due.stop
        assert due.is_due == (step in (3, 4, 6, 8, 9, 10))
    assert planned(10, eval_steps=None) == StepEnd(save=True, last=True)


@pytest.mark.parametrize(
    ("told", "due"),
    [
        ({"save_now": True}, StepEnd(save=True)),
        ({"stop_signal": "SIGTERM"}, StepEnd(stop=True)),
        ({"ends_now": True}, StepEnd(stop=True)),
    ],
)
def test_a_message_adds_nothing_else(told: dict[str, object], due: StepEnd) -> None:
    """An idle step, of which only a stop is due, neither evaluates nor saves."""
    assert planned(5, **told) == due
    assert due.is_due
    assert [due.evaluate, due.save, due.stop, due.last].count(True) == 1
