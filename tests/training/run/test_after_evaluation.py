"""What an evaluation decides: the best model, the rate of a plateau, and the end of the run."""

from typing import Any
from unittest.mock import Mock

import pytest

from consyn_jax.config import EvaluationOptions
from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing.best_evaluation import Selection
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.logging.console import Console
from consyn_jax.training.optim.schedules import Plateau
from consyn_jax.training.run.after_evaluation import (
    is_over,
    record_early_stop,
    record_evaluation,
    record_stop,
)
from consyn_jax.training.run.recording import Recorder

LOSS = EvaluationOptions(early_stopping_patience=2, early_stopping_min_delta=0.5)


def recording(**progress: Any) -> Mock:
    recorder = Mock(spec=Recorder, progress=Progress(**progress), console=Mock(spec=Console))
    recorder.callbacks = Mock()
    recorder.evaluation.side_effect = lambda values: {"step": recorder.progress.step, **values}
    return recorder


def test_the_best_model_is_exported_after_its_event() -> None:
    """A run that resumes from an earlier step then finds the event of a model to delete."""
    recorder, done = recording(), []
    recorder.event.side_effect = lambda name, details: done.append((name, details))
    values = ((1, 3.0), (2, 2.75), (3, 2.875))
    for recorder.progress.step, loss in values:
        line = record_evaluation(
            {"eval/loss": loss, "eval/accuracy": 0.5}, LOSS, recorder, lambda: done.append("model")
        )
        assert line == {"step": recorder.progress.step, "eval/loss": loss, "eval/accuracy": 0.5}
    assert done == [
        ("best", {"eval/loss": 3.0}),
        "model",
        ("best", {"eval/loss": 2.75}),
        "model",
    ]
    assert recorder.progress.selection == Selection(2.75, 2, stale=2, reference=3.0)
    shown = [call.args for call in recorder.console.evaluation.call_args_list]
    wanted = [({"eval/loss": loss, "eval/accuracy": 0.5}, step < 3) for step, loss in values]
    assert shown == wanted


def test_a_metric_that_cannot_be_computed_is_named() -> None:
    options = EvaluationOptions(metric_for_best_model="eval/bits_per_byte")
    with pytest.raises(UserError, match="--metric_for_best_model eval/bits_per_byte is not avail"):
        record_evaluation({"eval/loss": 1.0}, options, recording(), lambda: None)


def test_a_lower_rate_of_a_plateau_is_said() -> None:
    plateau = Mock(spec=Plateau, scale=1.0)

    def update(value: float) -> float:
        plateau.scale = plateau.scale / 2 if value > 2 else plateau.scale
        return plateau.scale

    plateau.update.side_effect = update
    recorder = recording(step=7, plateau=plateau)
    for loss in (1.0, 3.0, 2.0):
        line = record_evaluation({"eval/loss": loss}, LOSS, recorder, lambda: None)
        assert line["eval/loss"] == loss
    (said,) = recorder.console.note.call_args_list
    rate = "from now on, the learning rate is 0.5 times the schedule's rate."
    assert said.args[0] == f"Plateau at step 7: {rate}"


@pytest.mark.parametrize(
    ("progress", "ends"),
    [
        ({"step": 9}, False),
        ({"step": 10}, True),
        ({"step": 11}, True),
        ({"step": 4, "stopped_of": 10}, True),
        ({"step": 4, "stopped_of": 12}, False),
        ({"step": 4, "selection": Selection(stale=1)}, False),
        ({"step": 4, "selection": Selection(stale=2)}, True),
        ({"step": 3, "selection": Selection(stale=2)}, False),
    ],
)
def test_a_run_is_over_by_its_budget_a_callback_or_early_stopping(
    progress: dict[str, Any], ends: bool
) -> None:
    options = EvaluationOptions(early_stopping_patience=2, early_stopping_min_steps=4)
    assert is_over(Progress(**progress), 10, options) == ends


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"by": "Mine", "reason": "low"}, "Mine stops the run at step 5: low."),
        ({"by": "Mine", "reason": ""}, "Mine stops the run at step 5."),
    ],
)
def test_the_stop_of_a_callback_is_kept(request_: dict[str, str], said: str) -> None:
    recorder = recording(step=5)
    recorder.callbacks.run.stop_request = request_
    record_stop(recorder, 10)
    assert recorder.progress.stopped_of == 10
    recorder.event.assert_called_once_with("stop", request_)
    recorder.console.note.assert_called_once_with(said)


def test_early_stopping_is_recorded() -> None:
    recorder = recording(step=9, selection=Selection(1.0, 3, stale=2))
    record_early_stop(recorder)
    recorder.event.assert_called_once_with("early_stop", {"best_step": 3, "stale": 2})
    (said,) = recorder.console.note.call_args.args
    assert said == "Early stop at step 9: 2 evaluations without improvement since step 3."
