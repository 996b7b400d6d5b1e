import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from consyn_jax.optimizer_config import OPTIMIZERS
from consyn_jax.training.diagnostics.lr_find import (
    NUM_STEPS,
    Curve,
    draw_curve,
    range_test,
    rising_rates,
    rising_schedule,
    suggest,
    write_results,
)

RATES = rising_rates("adamw")
STEEPEST, LOWEST = (
    1e-3,
    2.6e-2,
)  # of `valley`; at the lowest 12 exp(-4 (x + 3)) = 4 ln 10 x 10^(4 (x + 1))
MIDDLE = math.sqrt(STEEPEST * LOWEST)


def decades(found: float | None, expected: float) -> float:
    assert found is not None
    return abs(math.log10(found / expected))


def valley(
    rates: np.ndarray = RATES, fall: float = 3.0, noise: float = 0.0, seed: int = 0
) -> Curve:
    """From ln 259 down around 1e-3, and up again around 0.1, to 1e6 nats."""
    x = np.log10(rates)
    losses = math.log(259) - fall / (1 + np.exp(-4 * (x + 3))) + 10 ** np.clip(4 * (x + 1), -20, 6)
    losses += noise * np.random.default_rng(seed).standard_normal(len(x))
    return list(zip(rates.tolist(), losses.tolist(), strict=True))


def with_losses(losses: Any) -> Curve:
    losses = np.asarray(losses, float)
    return list(zip(RATES[: len(losses)].tolist(), losses.tolist(), strict=True))


# ----------------------------------------------------------------------------------------- the test


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rates_rise_by_a_constant_factor_over_seven_decades(optimizer: str) -> None:
    rates = rising_rates(optimizer)
    assert len(rates) == NUM_STEPS
    assert rates[0] == pytest.approx({"lion": 1e-8, "sgd": 1e-5}.get(optimizer, 1e-7))
    assert rates[-1] / rates[0] == pytest.approx(1e7)
    np.testing.assert_allclose(rates[1:] / rates[:-1], 1e7 ** (1 / (NUM_STEPS - 1)))


def test_the_schedule_has_these_rates() -> None:
    rate = jax.jit(rising_schedule(RATES))
    np.testing.assert_allclose(
        [rate(step) for step in range(0, NUM_STEPS, 11)], RATES[::11], rtol=1e-6
    )
    assert rate(NUM_STEPS + 5) == rate(NUM_STEPS - 1)


def scripted(losses: list[float], **metrics: list[float]) -> tuple[Any, Iterator[int]]:
    """A step with these losses whose state counts steps, and endless batches."""

    def step(state: int, batch: int) -> tuple[int, dict[str, float]]:
        assert state == batch
        return state + 1, {"loss": losses[batch], "grad_norm": 1.0} | {
            name: values[batch] for name, values in metrics.items()
        }

    return step, iter(range(10**6))


def test_every_rate_is_tried_once_and_no_further_batch_is_taken() -> None:
    step, batches = scripted([5.0] * NUM_STEPS)
    steps: list[tuple[int, float]] = []
    curve = range_test(step, 0, batches, RATES, lambda done, loss: steps.append((done, loss)))
    assert curve == with_losses([5.0] * NUM_STEPS)
    assert next(batches) == NUM_STEPS
    assert steps == [(i + 1, 5.0) for i in range(NUM_STEPS)]


def test_it_ends_with_the_batches() -> None:
    step, _ = scripted([5.0] * NUM_STEPS)
    assert len(range_test(step, 0, range(7), RATES)) == 7
    assert range_test(step, 0, (), RATES) == []


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, math.inf), (5.0, math.nan)])
def test_it_ends_at_a_non_finite_loss_or_gradient(loss: float, norm: float) -> None:
    step, batches = scripted(
        [5.0] * 50 + [loss] + [5.0] * 200, grad_norm=[1.0] * 50 + [norm] + [1.0] * 200
    )
    curve = range_test(step, 0, batches, RATES)
    assert curve[:50] == with_losses([5.0] * 50)
    assert len(curve) == 51
    assert not math.isfinite(curve[50][1])


def test_it_ends_soon_after_the_loss_exceeds_its_start() -> None:
    noise = 0.3 * np.random.default_rng(0).standard_normal(NUM_STEPS)
    losses = (
        np.concatenate([np.linspace(2.0, 1.8, 120), np.full(80, 4.0)]) + noise
    )  # weights that were trained before: the fall is small
    step, batches = scripted(losses.tolist())
    assert 120 < len(range_test(step, 0, batches, RATES)) < 130


def test_a_step_that_the_loss_scale_skipped_is_repeated_at_the_same_rate() -> None:
    skipped = [1.0, 1.0] + [0.0] * 300
    scales, norms = [2.0**16, 2.0**15] + [2.0**14] * 300, [math.inf, math.inf] + [1.0] * 300
    step, batches = scripted(
        [5.0 + i for i in range(2)] + [4.0] * 300,
        skipped=skipped,
        loss_scale=scales,
        grad_norm=norms,
    )
    assert range_test(step, 0, batches, RATES) == with_losses([4.0] * NUM_STEPS)
    step, batches = scripted(
        [5.0] * 9, skipped=[0.0] * 8 + [1.0], loss_scale=[1.0] * 9, grad_norm=[1.0] * 8 + [math.inf]
    )
    assert len(range_test(step, 0, batches, RATES)) == 9, (
        "with the smallest scale it is no overflow"
    )


# ----------------------------------------------------------------------------------- the suggestion


def test_a_clean_valley() -> None:
    found = suggest(valley())
    assert decades(found.candidates["steepest"], STEEPEST) < 0.1
    assert decades(found.candidates["lowest"], LOWEST) < 0.1
    assert found.candidates["lowest / 10"] == pytest.approx(
        found.candidates["lowest"] / 10, rel=0.1
    )
    assert found.rule == "valley"
    assert found.rate == found.candidates["valley"]
    assert decades(found.rate, MIDDLE) < 0.1
    assert found.reason.startswith("The loss fell from 5.557 to 2.")


@pytest.mark.parametrize("fall", [3.0, 0.5])
def test_noise_moves_the_suggestion_little(fall: float) -> None:
    clean = suggest(valley(fall=fall)).rate
    assert clean is not None
    noisy = [
        decades(suggest(valley(fall=fall, noise=0.05 * fall, seed=seed)).rate, clean)
        for seed in range(100)
    ]
    assert np.median(noisy) < 0.1
    assert max(noisy) < 0.5


@pytest.mark.parametrize(
    "rates", [np.geomspace(1e-9, 1, 260), np.geomspace(1e-6, 10, 100), np.geomspace(1e-5, 0.3, 400)]
)
def test_the_suggestion_does_not_move_with_the_rates_that_were_tried(rates: np.ndarray) -> None:
    assert decades(suggest(valley(rates)).rate, MIDDLE) < 0.2


def test_the_way_of_diverging_does_not_matter() -> None:
    curve = valley()
    last = next(i for i, (_, loss) in enumerate(curve) if loss > 6)
    ends = [
        curve,
        curve[: last + 1],
        [*curve[:last], (curve[last][0], math.nan)],
        [*curve[:last], (curve[last][0], 1e30)],
    ]
    assert max(decades(suggest(end).rate, MIDDLE) for end in ends) < 0.1


def test_a_lone_spike_does_not_matter() -> None:
    curve = valley(noise=0.05)
    for at in (60, 100, 115, 140):
        spiked = [*curve[:at], (curve[at][0], 80.0), *curve[at + 1 :]]
        assert decades(suggest(spiked).rate, MIDDLE) < 0.3


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    rising = 5.0 + 10 ** np.linspace(-6, 2, NUM_STEPS)
    for losses in (
        np.full(NUM_STEPS, 5.5),
        rising,
        np.linspace(5, 6, NUM_STEPS),
        5.5 + 1e-6 * np.sin(np.arange(NUM_STEPS)),
    ):
        found = suggest(with_losses(losses))
        assert found.rate is None
        assert found.rule is None
        assert found.candidates == {}
        assert "No rate up to 1 lowered the loss by more than its noise." in found.reason
    rising_from_the_first = suggest(with_losses([*np.linspace(5, 8, 30), math.inf]))
    assert "No rate up to 1e-06 lowered" in rising_from_the_first.reason


def test_noise_alone_suggests_nothing() -> None:
    noise = np.random.default_rng(0).standard_normal((300, NUM_STEPS))
    assert sum(suggest(with_losses(2 + 0.3 * row)).rate is not None for row in noise) <= 9


def test_a_loss_that_falls_to_the_end_is_reported_as_such() -> None:
    x = np.log10(RATES)
    found = suggest(with_losses(5.5 - 3 / (1 + np.exp(-3 * (x + 1)))))
    assert decades(found.candidates["lowest"], 1.0) < 0.01
    assert "where the test ended, so higher rates may be good, too." in found.reason
    assert "where the test ended" not in suggest(valley()).reason


@pytest.mark.parametrize("length", [0, 1, 19])
def test_too_few_steps(length: int) -> None:
    for curve in (valley()[:length], [*valley()[:length], (RATES[length], math.nan)]):
        found = suggest(curve)
        assert found.rate is None
        assert (
            found.reason
            == f"The test ended after {length} steps with a finite loss, but a suggestion needs at least 20."
        )
        assert draw_curve(curve, found).endswith(found.reason)


def test_the_suggestion_for_a_quadratic_is_stable_and_not_slow() -> None:
    """Gradient descent on sum of c x^2 / 2 converges for rates below 2 / max c, and slowly for
    those far below."""
    curvature = np.geomspace(0.1, 10, 50)
    schedule = rising_rates("sgd").astype(np.float32)

    def step(x: np.ndarray, number: int) -> tuple[np.ndarray, dict[str, float]]:
        gradient = curvature * x
        return x - schedule[number] * gradient, {
            "loss": float(gradient @ x / 2),
            "grad_norm": float(np.linalg.norm(gradient)),
        }

    curve = range_test(step, np.ones(50), iter(range(10**6)), rising_rates("sgd"))
    assert len(curve) < NUM_STEPS
    found = suggest(curve).rate
    assert found is not None
    assert 0.2 / 50 < found < 2 / 10


# ------------------------------------------------------------------------------------------ showing


@pytest.mark.parametrize("width", [40, 64])
def test_a_chart_of_text(width: int) -> None:
    found = suggest(valley(noise=0.05))
    lines = draw_curve(valley(noise=0.05), found, width=width, height=8).splitlines()
    chart, rules = lines[:10], lines[12:]
    assert max(map(len, chart)) == width + 11
    assert chart[7].startswith("    2.5")
    assert chart[9].split() == ["1e-07", "1"]
    assert lines[10].strip() == f"▲ {found.rate:g}"
    left_of_the_mark = lines[10].index("▲") - 11
    assert RATES[round(left_of_the_mark / (width - 1) * (NUM_STEPS - 1))] == pytest.approx(
        found.rate, rel=0.3
    )
    assert [line.split("  ")[0] for line in rules[:4]] == [
        "valley",
        "steepest",
        "lowest",
        "lowest / 10",
    ]
    assert [line.endswith("<- suggested") for line in rules[:4]] == [True, False, False, False]
    assert rules[4].endswith(f"Suggested: --lr {found.rate:g}")


def test_a_chart_of_a_flat_curve() -> None:
    curve = with_losses([5.5] * NUM_STEPS)
    lines = draw_curve(curve, suggest(curve)).splitlines()
    assert len(lines) == 14
    assert lines[9] == "    5.500 ┤" + "▁" * 64
    assert "▲" not in "".join(lines)


@pytest.mark.parametrize(
    "curve", [valley(), [*valley()[:150], (0.1, math.nan)], [(1e-7, math.nan)], []]
)
def test_the_files_that_are_written(curve: Curve, tmp_path: Path) -> None:
    found = suggest(curve)
    write_results(tmp_path / "new" / "run", curve, found)
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == [
        "lr_find.json",
        "lr_find.png",
    ]
    assert (tmp_path / "new" / "run" / "lr_find.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    record = json.loads((tmp_path / "new" / "run" / "lr_find.json").read_text())
    assert record["rate"] == found.rate
    assert record["candidates"] == found.candidates
    assert record["rates"] == [rate for rate, _ in curve]
    assert record["losses"] == [loss if math.isfinite(loss) else None for _, loss in curve]


def test_the_same_curve_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_results(tmp_path / name, valley(noise=0.1), suggest(valley(noise=0.1)))
    for file in ("lr_find.json", "lr_find.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
