"""The results of a ladder as tables of text, as JSON, and as commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from consyn_jax.training.logging.formats import compact, decimals
from consyn_jax.tuning.ladder.critical_batch import BatchPoint
from consyn_jax.tuning.ladder.predictions import Forecast, Prediction
from consyn_jax.tuning.ladder.scaling_law import LossPoint, ScalingLaw, interval
from consyn_jax.tuning.study_results import aligned

FAR = 100.0  # predictions beyond this multiple of the largest run's FLOPs get a warning


@dataclass(frozen=True)
class LadderResults:
    """A fitted ladder and its predictions.

    Attributes:
        flops: training FLOPs per token of each size, by number of parameters.
        tokens_per_step: tokens per optimizer step, the same in all runs.
        predicted: predictions for the presets verse, stanza and epic, for each budget.
        best: prediction for the best size, for each budget of FLOPs.
        left_out: losses of runs with few steps, which the fit does not use.
    """

    forecast: Forecast
    flops: Mapping[float, float]
    tokens_per_step: int
    predicted: Sequence[Prediction]
    best: Sequence[Prediction]
    left_out: Sequence[LossPoint] = ()

    @property
    def largest_flops(self) -> float:
        """Largest number of FLOPs of any run."""
        return max(point.tokens * self.flops[point.parameters] for point in self.forecast.points)


def table(results: LadderResults) -> Iterator[str]:
    """All results as lines of text."""
    yield from aligned([POINT_HEAD, *point_rows(results)])
    yield ""
    yield law_text(results.forecast)
    yield ""
    yield from aligned([PREDICTION_HEAD, *map(prediction_row, results.predicted)])
    if results.best:
        yield ""
        yield from aligned([BEST_HEAD, *map(best_row, results.best)])


def law_text(forecast: Forecast) -> str:
    """The scaling law and its error, as a sentence."""
    return (
        f"{forecast.law.text()}, with N parameters without embeddings and D tokens; median error "
        f"{forecast.error:.2%}."
    )


POINT_HEAD = ["parameters", "tokens", "FLOPs", "eval/loss", "fitted", "critical batch"]


def point_rows(results: LadderResults) -> list[list[str]]:
    """Table rows: the loss at the end of each run, and the fitted loss if the fit uses the run.

    A row also has the critical batch size, measured at the beginning of the run's decay.
    """
    forecast, rows = results.forecast, []
    points = [*forecast.points, *results.left_out]
    for point in sorted(points, key=lambda p: (p.parameters, p.tokens)):
        batch = batch_of(point, forecast.batches)
        fitted = forecast.law.loss(point.parameters, point.tokens)
        flops = point.tokens * results.flops[point.parameters]
        rows.append(
            [
                f"{point.parameters:,.0f}",
                compact(point.tokens),
                f"{flops:.2e}",
                decimals(point.loss),
                "left out" if point in results.left_out else decimals(float(fitted)),
                "" if batch is None else compact(batch),
            ]
        )
    return rows


def batch_of(point: LossPoint, batches: Sequence[BatchPoint]) -> float | None:
    """The noise scale measured at the beginning of a run's decay; None if not measured."""
    run = point.parameters, point.tokens
    return next((b.scale for b in batches if (b.parameters, b.run_tokens) == run), None)


PREDICTION_HEAD = ["model", "parameters", "tokens", "FLOPs", "eval/loss", "90 % of fits", "batch"]


def prediction_row(found: Prediction) -> list[str]:
    """A prediction as the cells of a table row."""
    return [
        found.target.name,
        compact(found.target.parameters),
        compact(found.tokens),
        f"{found.flops:.1e}",
        decimals(found.loss),
        between(found.interval),
        "" if found.batch is None else compact(found.batch),
    ]


BEST_HEAD = ["FLOPs", "best size", "90 % of fits", "tokens", "eval/loss", "90 % of fits", "batch"]


def best_row(found: Prediction) -> list[str]:
    """The best size for a budget, as the cells of a table row."""
    assert found.sizes is not None
    return [
        f"{found.flops:.1e}",
        compact(found.target.parameters),
        f"{compact(found.sizes[0])} to {compact(found.sizes[1])}",
        compact(found.tokens),
        decimals(found.loss),
        between(found.interval),
        "" if found.batch is None else compact(found.batch),
    ]


def between(values: tuple[float, float]) -> str:
    """An interval of losses, as text."""
    return f"{decimals(values[0])} to {decimals(values[1])}"


NEXT = "Next, with the data and the recipe of this ladder:"


def command(found: Prediction) -> str:
    """The command that trains the best size for a budget, without flags for data and recipe."""
    words = [f"--{name} {value}" for name, value in found.target.shape.flags.items()]
    return (
        f"consyn-train --model {found.target.name} {' '.join(words)} --scheduler wsd "
        f"--total_tokens {found.tokens:.3g}"
    )


def notes(results: LadderResults) -> list[str]:
    """Sentences about the limits of the predictions."""
    said = []
    furthest = max((p.flops for p in (*results.predicted, *results.best)), default=0.0)
    distance = furthest / results.largest_flops
    if distance > FAR:
        said.append(
            f"The largest prediction is for {compact(distance)} times the FLOPs of the largest "
            "run. Treat it as a guess: its interval covers only the noise of the fit."
        )
    batches, size = results.forecast.batches, results.tokens_per_step
    noisy = sum(batch.scale < size for batch in batches)
    if noisy:
        said.append(
            f"A step has {size:,} tokens. In {noisy} of {len(batches)} runs, this is more than the "
            "critical batch size, so these runs used their tokens inefficiently. Lower "
            "--batch_size."
        )
    if results.forecast.batch is None:
        said.append(
            "The critical batch size is unknown: the gradient exceeded its noise in too few of the "
            "measurements."
        )
    return said


def as_json(results: LadderResults) -> dict[str, Any]:
    """All measurements, fits and predictions, as JSON values."""
    forecast = results.forecast
    constants = {
        name: interval([getattr(law, name) for law in forecast.laws])
        for name in ScalingLaw.__dataclass_fields__
    }
    return {
        "law": asdict(forecast.law),
        "law_intervals": constants,
        "median_error": forecast.error,
        "points": [_point(found, results) for found in forecast.points],
        "left_out": [_point(found, results) for found in results.left_out],
        "critical_batch": None if forecast.batch is None else asdict(forecast.batch),
        "noise_scales": [asdict(b) for b in forecast.batches],
        "predicted": [_prediction(found) for found in results.predicted],
        "best": [_prediction(found) | {"command": command(found)} for found in results.best],
    }


def _point(found: LossPoint, results: LadderResults) -> dict[str, float]:
    return asdict(found) | {"flops": found.tokens * results.flops[found.parameters]}


def _prediction(found: Prediction) -> dict[str, Any]:
    own = {
        "model": found.target.name,
        "parameters": found.target.parameters,
        "tokens": found.tokens,
        "flops": found.flops,
        "loss": float(found.loss),
        "loss_interval": found.interval,
        "batch_tokens": found.batch,
    }
    return own if found.sizes is None else {**own, "parameters_interval": found.sizes}
