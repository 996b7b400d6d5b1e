import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from consyn_jax.config import BudgetOptions
from consyn_jax.errors import UserError
from consyn_jax.optimizer_config import DECAY_SHAPES, SCHEDULERS, OptimizerOptions
from consyn_jax.resolve import resolve
from consyn_jax.training.optim.schedules import (
    DECAYS,
    MOST_STEPS,
    SCHEDULES,
    Plateau,
    RatesAhead,
    build_plateau,
    build_schedule,
    count_steps,
    countable,
    decay_end,
    draw_schedule,
    warmup_length,
    write_schedule_plot,
)

NAMES = SCHEDULERS
STAY = ("constant", "constant_with_warmup", "plateau")


def scheduled(
    name: str, peak: float, total: int, warmup: int, min_ratio: float, **shape: Any
) -> optax.Schedule:
    given = {"num_cycles": 1, "power": 1.0, "decay_shape": "linear"} | shape
    options = OptimizerOptions(
        scheduler=name, lr=peak, warmup_steps=warmup, min_lr_ratio=min_ratio, **given
    )
    return build_schedule(options, total)


def rates(
    name: str, peak: float, total: int, warmup: int, min_ratio: float, **shape: Any
) -> np.ndarray:
    return np.asarray(
        scheduled(name, peak, total, warmup, min_ratio, **shape)(jnp.arange(total + 1))
    )


def torch_rates(build: Callable[..., Any], total: int, **arguments: Any) -> np.ndarray:
    """The rates of a torch or transformers schedule at steps 0 .. total, with peak 1."""
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
    shape = {
        "cosine": (1 + np.cos(np.pi * r)) / 2,
        "linear": 1 - r,
        "polynomial": (1 - r) ** 1.7,
        "wsd": 1 - np.sqrt(fall),
        "cosine_with_restarts": np.where(
            s == total, 0, (1 + np.cos(np.pi * ((s - warmup) % 60 / 60))) / 2
        ),
    }.get(name, np.ones(total + 1))
    expected = least + (1 - least) * shape
    if name == "inverse_sqrt":
        expected = np.sqrt(warmup / np.maximum(s, warmup))
    if name != "constant":
        expected = np.where(s < warmup, (s + 1) / (warmup + 1), expected)
    found = rates(name, peak, total, warmup, least, num_cycles=3, power=1.7, decay_shape="sqrt")
    np.testing.assert_allclose(found, peak * expected, rtol=0, atol=1e-6 * peak)


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))]
)
def test_three_ways_to_decay(shape: str, expected: float) -> None:
    """Half-way through the last 30 %: Hägele et al. (2024), section 3.2."""
    found = rates("wsd", 1.0, 200, 20, 0.0, decay_ratio=0.3, decay_shape=shape)
    assert (found[20:140] == 1).all()
    assert found[141] < 1
    assert found[170] == pytest.approx(expected, abs=1e-6)
    assert found[200] == pytest.approx(0, abs=1e-6)


@pytest.mark.users_compiler
@pytest.mark.parametrize(
    ("name", "shape", "build", "arguments"),
    [
        ("cosine", {}, lr_scheduler.CosineAnnealingLR, {"T_max": 240, "eta_min": 0.1}),
        (
            "linear",
            {},
            lr_scheduler.LinearLR,
            {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 240},
        ),
        (
            "polynomial",
            {"power": 2.5},
            lr_scheduler.PolynomialLR,
            {"power": 2.5, "total_iters": 240},
        ),
        (
            "cosine_with_restarts",
            {"num_cycles": 4},
            lr_scheduler.CosineAnnealingWarmRestarts,
            {"T_0": 60, "eta_min": 0.1},
        ),
        ("constant", {}, lr_scheduler.ConstantLR, {"factor": 1.0}),
    ],
)
def test_every_step_is_torchs(
    name: str, shape: dict[str, Any], build: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    least = 0.0 if name == "polynomial" else 0.1  # theirs ends at 0
    theirs = torch_rates(build, 240, **arguments)[
        :240
    ]  # ours ends there, and has no restart at the end
    np.testing.assert_allclose(
        rates(name, 1.0, 240, 0, least, **shape)[:240], theirs, rtol=0, atol=1e-6
    )


def test_inverse_sqrt_without_warm_up_has_a_default_timescale() -> None:
    theirs = torch_rates(transformers.get_inverse_sqrt_schedule, 300, num_warmup_steps=0)
    np.testing.assert_allclose(rates("inverse_sqrt", 1.0, 300, 0, 0.1), theirs, rtol=0, atol=1e-6)


@pytest.mark.users_compiler
@pytest.mark.parametrize(
    ("name", "build", "arguments"),
    [
        ("cosine", transformers.get_cosine_schedule_with_warmup, {"num_training_steps": 300}),
        ("linear", transformers.get_linear_schedule_with_warmup, {"num_training_steps": 300}),
        (
            "cosine_with_restarts",
            transformers.get_cosine_with_hard_restarts_schedule_with_warmup,
            {"num_training_steps": 300, "num_cycles": 3},
        ),
        ("inverse_sqrt", transformers.get_inverse_sqrt_schedule, {}),
    ],
)
def test_after_warm_up_the_rate_is_transformers(
    name: str, build: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    ours = rates(name, 1.0, 300, 30, 0.0, num_cycles=3)
    theirs = torch_rates(build, 300, num_warmup_steps=30, **arguments)
    np.testing.assert_allclose(ours[30:], theirs[30:], atol=1e-6)


@pytest.mark.users_compiler
def test_warm_up_is_transformers_one_step_ahead() -> None:
    """Theirs spends step 0 on a rate of 0; with one more step of warm-up it is one step late."""
    ours = rates("constant_with_warmup", 1.0, 50, 30, 0.0)
    theirs = torch_rates(transformers.get_constant_schedule_with_warmup, 50, num_warmup_steps=31)
    np.testing.assert_allclose(ours[:-1], theirs[1:], atol=1e-6)
    assert (ours[0], theirs[0]) == (pytest.approx(1 / 31), 0)


@pytest.mark.users_compiler
def test_a_schedule_works_in_torchs_lambda_lr() -> None:
    ours = scheduled("cosine", 1.0, 100, 10, 0.1)
    theirs = torch_rates(torch.optim.lr_scheduler.LambdaLR, 100, lr_lambda=lambda s: float(ours(s)))
    np.testing.assert_allclose(theirs, rates("cosine", 1.0, 100, 10, 0.1), rtol=1e-6)


@settings(deadline=None)  # the first call compiles
@given(
    st.sampled_from(NAMES),
    st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total))),
    st.floats(0, 0.9),
)
def test_rises_to_the_peak_then_never_rises_again(
    name: str, lengths: tuple[int, int], min_ratio: float
) -> None:
    total, warmup = lengths
    found = np.asarray(scheduled(name, 1.0, total, warmup, min_ratio)(jnp.arange(61)))[
        : total + 1
    ]  # one shape, compiled once
    warmup = 0 if name == "constant" else warmup
    assert (found[:total] > 0).all()
    assert (np.diff(found[: min(warmup, total - 1) + 1]) > 0).all()
    assert (
        np.diff(found[warmup:]) <= 1e-6
    ).all()  # of restarts this has one cycle, which is the default of the function
    assert found.max() <= 1.0
    if name not in (*STAY, "inverse_sqrt") and warmup < total:
        assert found[total] == pytest.approx(min_ratio, abs=1e-6)


def test_warm_up_is_a_share_or_a_number_of_steps() -> None:
    assert warmup_length(1000, None, 0.02) == 20
    assert warmup_length(1000, 0, 0.02) == 0
    assert warmup_length(1000, 7, 0.02) == 7


def test_a_run_and_its_decay_have_at_least_one_step() -> None:
    """A decay of one step lowers no step's rate; the rate after the run is the lowest."""
    last = rates("wsd", 1.0, 200, 0, 0.2, decay_ratio=1e-3)
    np.testing.assert_allclose(last, [1.0] * 200 + [0.2], rtol=1e-6)
    assert [decay_end(step, 0.2) for step in (1, 2, 8)] == [2, 3, 10]
    short = [BudgetOptions(epochs=epochs) for epochs in (1e-3, 1.0, 1.01)]
    steps = [count_steps(budget, OptimizerOptions(), 32, 800) for budget in short]
    assert steps == [1, 100, 101]


def test_a_decay_from_a_step_has_no_warm_up() -> None:
    """The run that it continues had it; the decay is the rest of the run, whatever its ratio."""
    chosen = OptimizerOptions(
        lr=1.0, scheduler="constant_with_warmup", warmup_steps=5, decay_from=8, decay_ratio=0.9
    )
    schedule = build_schedule(replace(chosen, decay_shape="linear", min_lr_ratio=0.2), 10)
    found = [float(schedule(step)) for step in (0, 4, 8, 9, 10)]
    assert found == pytest.approx([1.0, 1.0, 1.0, 0.6, 0.2])


def test_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"Warm-up of 11 steps is longer than the run of 10 steps"):
        scheduled("linear", 1.0, 10, 11, 0.0)


def test_a_run_of_more_steps_than_can_be_counted_is_refused() -> None:
    scheduled("linear", 1.0, MOST_STEPS, 11, 0.0)
    assert np.iinfo(np.int32).max == MOST_STEPS
    assert countable(MOST_STEPS) == MOST_STEPS
    for steps in (MOST_STEPS + 1, 10**5000):
        with pytest.raises(
            UserError, match=r"The run would take .* steps, and at most 2,147,483,6"
        ):
            countable(steps)


def test_the_tables_have_the_schedules_and_decays_of_the_flags() -> None:
    assert tuple(SCHEDULES) == SCHEDULERS
    assert tuple(DECAYS) == DECAY_SHAPES


def options(**given: Any) -> OptimizerOptions:
    return resolve({"model": "haiku", **given})[0].optimizer


def test_the_flags_reach_the_schedule() -> None:
    chosen = options(scheduler="polynomial", power=3, lr=2.0, warmup_steps=10, min_lr_ratio=0.2)
    np.testing.assert_array_equal(
        build_schedule(chosen, 50)(jnp.arange(50)),
        rates("polynomial", 2.0, 50, 10, 0.2, power=3.0)[:50],
    )
    chosen = options(
        scheduler="wsd", lr=2.0, decay_ratio=0.5, decay_shape="cosine", warmup_ratio=0.1
    )
    expected = rates("wsd", 2.0, 50, 5, 0.1, decay_ratio=0.5, decay_shape="cosine")
    np.testing.assert_array_equal(build_schedule(chosen, 50)(jnp.arange(50)), expected[:50])
    chosen = options(scheduler="cosine_with_restarts", lr=2.0, num_cycles=5, warmup_steps=0)
    np.testing.assert_array_equal(
        build_schedule(chosen, 50)(jnp.arange(50)),
        rates("cosine_with_restarts", 2.0, 50, 0, 0.1, num_cycles=5)[:50],
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"warmup_steps": 11, "max_steps": 10},
            "--warmup_steps 11 is more than --max_steps 10",
        ),
        ({"warmup_steps": -1}, "--warmup_steps must not be negative"),
        ({"warmup_ratio": 1}, "--warmup_ratio must be at least 0 and below 1"),
        ({"min_lr_ratio": 1.5}, "--min_lr_ratio must be at least 0 and below 1"),
        ({"num_cycles": 0}, "--num_cycles must be greater than 0"),
        ({"power": 0}, "--power must be greater than 0"),
        ({"decay_ratio": 1.1}, "--decay_ratio must be above 0 and at most 1"),
        ({"decay_shape": "sqr"}, r"--decay_shape 'sqr' is not known; did you mean sqrt\?"),
        ({"plateau_factor": 1}, "--plateau_factor must be above 0 and below 1"),
        ({"plateau_patience": -1}, "--plateau_patience must not be negative"),
        ({"plateau_cooldown": -1}, "--plateau_cooldown must not be negative"),
        ({"plateau_threshold": -1}, "--plateau_threshold must be at least 0 and below 1"),
        (
            {"scheduler": "plateau", "validation_fraction": 0},
            "--scheduler plateau needs evaluations, and --validation_fraction 0 leaves no data",
        ),
        (
            {"scheduler": "polynomal"},
            r"--scheduler 'polynomal' is not known; did you mean polynomial\?",
        ),
    ],
)
def test_invalid_flags_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(**given)


# ------------------------------------------------------------------------------------------ plateau


def torch_plateau(metrics: list[float], **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, eps=0.0, **settings)
    found = []
    for metric in metrics:
        schedule.step(metric)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.users_compiler
@given(
    st.lists(st.sampled_from([1.0, 0.999, 0.9, 0.5, 2.0, math.nan, math.inf]), max_size=40),
    st.sampled_from([0.1, 0.5]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 1e-4, 0.2]),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
)
def test_plateau_is_torchs(
    metrics: list[float],
    factor: float,
    patience: int,
    cooldown: int,
    threshold: float,
    least: float,
    greater: bool,
) -> None:
    assume(not (greater and math.inf in metrics))  # theirs takes it for the best of all
    ours = Plateau(factor, patience, cooldown, threshold, least, greater)
    mode = "max" if greater else "min"
    theirs = torch_plateau(
        metrics,
        mode=mode,
        factor=factor,
        patience=patience,
        cooldown=cooldown,
        threshold=threshold,
        min_lr=least,
    )
    assert [ours.update(metric) for metric in metrics] == theirs


def test_plateau_waits_lowers_cools_and_stops_at_the_floor() -> None:
    plateau = Plateau(0.5, 1, 2, 1e-4, 0.3, False)
    values = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert [plateau.update(value) for value in values] == [
        1,
        1,
        1,
        0.5,
        0.5,
        0.5,
        0.5,
        0.3,
        0.3,
        0.3,
        0.3,
        0.3,
    ]


@given(st.lists(st.floats(0.1, 3), min_size=1, max_size=30), st.integers(0, 29))
def test_plateau_continues_from_json(metrics: list[float], cut: int) -> None:
    whole, first = (Plateau(0.5, 1, 1, 1e-4, 0.0, False) for _ in range(2))
    expected = [whole.update(metric) for metric in metrics]
    found = [first.update(metric) for metric in metrics[:cut]]
    second = Plateau(**json.loads(json.dumps(asdict(first), allow_nan=False)))
    assert found + [second.update(metric) for metric in metrics[cut:]] == expected
    assert second == whole


def test_only_the_plateau_scheduler_has_a_plateau_rule() -> None:
    assert build_plateau(options(), greater_is_better=False) is None
    chosen = options(
        scheduler="plateau",
        plateau_factor=0.3,
        plateau_patience=4,
        plateau_cooldown=5,
        plateau_threshold=0.01,
        min_lr_ratio=0.05,
    )
    assert build_plateau(chosen, greater_is_better=True) == Plateau(0.3, 4, 5, 0.01, 0.05, True)


# ------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("total", [1, 7, 1000, 10**7])
@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_the_text_chart(name: str, total: int) -> None:
    lines = draw_schedule(
        scheduled(name, 6e-4, total, 0, 0.0), total, width=40, height=8
    ).splitlines()
    assert len(lines) == 10
    assert max(map(len, lines)) <= 51
    assert lines[0].startswith("   0.0006 ┤█")
    assert lines[-1].endswith(f"{total:,}")
    if name == "constant":
        assert all(line.endswith("█" * 40) for line in lines[:8])


def test_the_png_is_written(tmp_path: Path) -> None:
    write_schedule_plot(scheduled("wsd", 6e-4, 100, 10, 0.0), 100, tmp_path / "schedule.png")
    write_schedule_plot(scheduled("cosine", 6e-4, 1, 0, 0.0), 1, tmp_path / "short.png")
    for name in ("schedule.png", "short.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_png_shows_the_whole_run(tmp_path: Path) -> None:
    drawn: list[np.ndarray] = []

    def schedule(step: Any) -> Any:
        drawn.append(np.asarray(step))
        return np.ones(len(step))

    for total in (100, 10_000):
        write_schedule_plot(schedule, total, tmp_path / "schedule.png")
        assert (drawn[-1][0], drawn[-1][-1], len(drawn[-1])) == (0, total - 1, min(total, 2000))


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_rates_ahead_are_those_of_each_update(scheduler: str) -> None:
    config, _ = resolve({"model": "haiku", "scheduler": scheduler, "warmup_steps": 7})
    schedule = build_schedule(config.optimizer, 600)
    rates = RatesAhead(schedule)
    for updates in (0, 1, 6, 7, 255, 256, 599, 600, 300):
        assert rates(updates) == pytest.approx(float(schedule(updates)), rel=1e-6, abs=1e-12)
    assert RatesAhead(lambda step: 0.5)(1000) == 0.5


@pytest.mark.parametrize("updates", [0, 256, 300, 512])
def test_rates_ahead_may_begin_anywhere(updates: int) -> None:
    """As in a run that resumes; each block of rates may be the first."""
    assert RatesAhead(lambda step: 2.0 * step)(updates) == 2.0 * updates
