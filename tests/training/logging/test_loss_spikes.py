import json
from dataclasses import asdict

import numpy as np
import pytest

from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.logging.loss_spikes import FEWEST, WINDOW, LossSpikeDetector


def falling(steps: int) -> list[float]:
    """A falling loss with the noise of small batches."""
    rng = np.random.default_rng(0)
    return [float(3 + 4 * np.exp(-step / 50) + rng.normal(0, 0.1)) for step in range(steps)]


def test_noise_is_no_spike_and_a_spike_is_reported_once() -> None:
    losses = falling(600)
    losses[300:310] = [9.0, 12.0, 8.0, 7.0, 6.5, 6.0, 5.5, 5.0, 4.8, 4.5]
    losses[450] = 4.6
    detector = LossSpikeDetector()
    spikes = {
        step: usual
        for step, loss in enumerate(losses)
        if (usual := detector.update(loss)) is not None
    }
    assert list(spikes) == [300, 450]
    assert abs(spikes[450] - 3) < 0.1
    assert len(detector.losses) == WINDOW


def test_few_losses_are_not_judged_and_a_constant_loss_may_rise_a_little() -> None:
    detector = LossSpikeDetector()
    assert [detector.update(loss) for loss in [1.0] * (FEWEST - 1) + [50.0]] == [None] * FEWEST
    flat = LossSpikeDetector()
    assert [flat.update(loss) for loss in [2.0] * FEWEST + [2.1, 2.3]][-2:] == [None, 2.0]


def test_it_continues_from_the_record_of_a_checkpoint() -> None:
    losses, cut = [*falling(60), 9.0, 9.5, 3.5, 9.0], 61
    whole, first = LossSpikeDetector(), Progress()
    expected = [whole.update(loss) for loss in losses]
    found = [first.recent.update(loss) for loss in losses[:cut]]
    second = Progress.from_json(json.loads(json.dumps(asdict(first))))
    assert found + [second.recent.update(loss) for loss in losses[cut:]] == expected


@pytest.mark.parametrize("text", ["NaN", "[]", '"step"', "null"])
def test_a_malformed_record_is_called_damaged(text: str) -> None:
    with pytest.raises(UserError, match="damaged"):
        Progress.from_json(json.loads(text))
