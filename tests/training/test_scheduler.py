import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from consyn_jax.config import UserError
from consyn_jax.training.scheduler import build_schedule, warmup_length

NAMES = ("cosine", "linear", "constant", "constant_with_warmup", "wsd")


def rates(name: str, peak: float, total: int, warmup: int, min_ratio: float) -> np.ndarray:
    return np.asarray(build_schedule(name, peak, total, warmup, min_ratio)(jnp.arange(total + 1)))


def torch_rates(build: Callable[..., Any], total: int, **arguments: Any) -> np.ndarray:
    """What a schedule of transformers gives at steps 0 .. total, peak 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a schedule that moves without its optimizer
        schedule = build(optimizer, **arguments)
        found = []
        for _ in range(total + 1):
            found.append(schedule.get_last_lr()[0])
            schedule.step()
    return np.array(found)


@pytest.mark.parametrize("name", NAMES)
def test_closed_formulas(name: str) -> None:
    peak, total, warmup, least = 3e-3, 200, 20, 0.1
    s = np.arange(total + 1)
    r = np.clip((s - warmup) / (total - warmup), 0, 1)
    fall = np.clip((s - 160) / 40, 0, 1)
    expected = {
        "cosine": least + (1 - least) * (1 + np.cos(np.pi * r)) / 2,
        "linear": 1 - (1 - least) * r,
        "constant": np.ones(total + 1),
        "constant_with_warmup": np.ones(total + 1),
        "wsd": 1 - (1 - least) * fall,
    }[name]
    if name != "constant":
        expected = expected * np.minimum(1, (s + 1) / (warmup + 1))
    np.testing.assert_allclose(rates(name, peak, total, warmup, least), peak * expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "build"), [("cosine", transformers.get_cosine_schedule_with_warmup), ("linear", transformers.get_linear_schedule_with_warmup)]
)
def test_after_warm_up_the_rate_is_transformers(name: str, build: Callable[..., Any]) -> None:
    ours = rates(name, 1.0, 300, 30, 0.0)
    theirs = torch_rates(build, 300, num_warmup_steps=30, num_training_steps=300)
    np.testing.assert_allclose(ours[30:], theirs[30:], atol=1e-6)


def test_warm_up_is_transformers_one_step_ahead() -> None:
    """Theirs spends step 0 on a rate of 0. Ours gives step s what theirs, with one step more of warm-up, gives step s + 1."""
    ours = rates("constant_with_warmup", 1.0, 50, 30, 0.0)
    theirs = torch_rates(transformers.get_constant_schedule_with_warmup, 50, num_warmup_steps=31)
    np.testing.assert_allclose(ours[:-1], theirs[1:], atol=1e-6)
    assert (ours[0], theirs[0]) == (pytest.approx(1 / 31), 0)


def test_a_schedule_drives_torch_alike() -> None:
    ours = build_schedule("cosine", 1.0, 100, 10, 0.1)
    theirs = torch_rates(torch.optim.lr_scheduler.LambdaLR, 100, lr_lambda=lambda s: float(ours(s)))
    np.testing.assert_allclose(theirs, rates("cosine", 1.0, 100, 10, 0.1), rtol=1e-6)


@settings(deadline=None)  # the first call compiles
@given(st.sampled_from(NAMES), st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total))), st.floats(0, 0.9))
def test_rises_to_the_peak_then_never_rises_again(name: str, lengths: tuple[int, int], min_ratio: float) -> None:
    total, warmup = lengths
    found = np.asarray(build_schedule(name, 1.0, total, warmup, min_ratio)(jnp.arange(61)))[: total + 1]  # one shape, compiled once
    warmup = 0 if name == "constant" else warmup
    assert (found[:total] > 0).all()
    assert (np.diff(found[: min(warmup, total - 1) + 1]) > 0).all()
    assert (np.diff(found[warmup:]) <= 1e-6).all()
    assert found.max() <= 1.0
    if name in ("cosine", "linear", "wsd") and warmup < total:
        assert found[total] == pytest.approx(min_ratio, abs=1e-6)


def test_warm_up_is_a_share_or_a_number_of_steps() -> None:
    assert warmup_length(1000, None, 0.02) == 20
    assert warmup_length(1000, 0, 0.02) == 0
    assert warmup_length(1000, 7, 0.02) == 7


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"--scheduler 'cosin' is not known; did you mean cosine\?"):
        build_schedule("cosin", 1.0, 10, 0, 0.0)
    with pytest.raises(UserError, match=r"Warm-up of 11 steps is longer than the run of 10 steps"):
        build_schedule("linear", 1.0, 10, 11, 0.0)
