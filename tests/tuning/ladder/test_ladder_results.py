"""Predictions, their table, and their page, from losses that follow a known law."""

import json
import re
from dataclasses import replace

import pytest

from consyn_jax.cli.train import read_arguments
from consyn_jax.model.arithmetic import train_flops_per_token
from consyn_jax.tuning.ladder.critical_batch import BatchPoint
from consyn_jax.tuning.ladder.ladder_options import Budget
from consyn_jax.tuning.ladder.ladder_page import ladder_page
from consyn_jax.tuning.ladder.ladder_results import (
    LadderResults,
    as_json,
    command,
    notes,
    table,
)
from consyn_jax.tuning.ladder.model_family import model_of, preset, scaled, target
from consyn_jax.tuning.ladder.predictions import Forecast
from consyn_jax.tuning.ladder.scaling_law import LossPoint, ScalingLaw

LAW = ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28)
VOCABULARY, LENGTH = 49_152, 2048


@pytest.fixture(scope="module")
def results() -> LadderResults:
    options = preset("haiku")
    points, batches, flops = [], [], {}
    for size in (1e5, 2e5, 4e5, 8e5):
        model = model_of(options, scaled(options, size), VOCABULARY)
        flops[size] = train_flops_per_token(model, LENGTH)
        for ratio in (2.5, 5, 10, 20):
            tokens = ratio * size
            points.append(LossPoint(size, tokens, LAW.loss(size, tokens)))
            batches.append(BatchPoint(size, 0.8 * tokens, 3.0 * (0.8 * tokens) ** 0.5, tokens))
    forecast = Forecast(points, batches, VOCABULARY, LENGTH, draws=20)
    predicted = forecast.targets(None, 20.0)
    best = [forecast.best(1e19), forecast.best(1e21)]
    return LadderResults(forecast, flops, 2048, predicted, best)


def test_the_law_predicts_the_presets(results: LadderResults) -> None:
    assert [found.target.name for found in results.predicted] == ["verse", "stanza", "epic"]
    for found in results.predicted:
        assert found.tokens == 20 * found.target.parameters
        assert found.loss == pytest.approx(LAW.loss(found.target.parameters, found.tokens), 1e-3)
        assert found.interval[0] <= found.loss * 1.001
        assert found.interval[1] >= found.loss * 0.999
        assert found.batch == pytest.approx(3.0 * found.tokens**0.5, rel=0.01)


def test_budgets_are_flops_or_tokens(results: LadderResults) -> None:
    verse = target("verse", None, VOCABULARY, LENGTH)
    by_flops = results.forecast.targets(Budget("flops", 1e20), 20.0)[0]
    assert by_flops.tokens == pytest.approx(1e20 / verse.flops)
    assert results.forecast.targets(Budget("tokens", 3e9), 20.0)[0].tokens == 3e9


def test_the_best_size_is_that_of_the_closed_form(results: LadderResults) -> None:
    """With C = 6 N D it is G (C / 6)^(beta / (alpha + beta)) (Hoffmann et al., 2022, equation 4)."""
    found = results.best[1]
    ratio = LAW.alpha * LAW.a / (LAW.beta * LAW.b)
    share = LAW.beta / (LAW.alpha + LAW.beta)
    closed = ratio ** (1 / (LAW.alpha + LAW.beta)) * (1e21 / 6) ** share
    # Embeddings and attention cost FLOPs, too, which the closed form leaves out.
    assert found.target.parameters == pytest.approx(closed, rel=0.35)
    assert found.flops == pytest.approx(1e21)
    assert results.best[0].target.parameters < found.target.parameters
    for size in (found.target.parameters / 2, found.target.parameters * 2):
        other = target("verse", scaled(preset("verse"), size), VOCABULARY, LENGTH)
        assert LAW.loss(other.parameters, 1e21 / other.flops) > found.loss


def test_the_command_trains_the_best_size(results: LadderResults) -> None:
    config, _, _ = read_arguments([*command(results.best[0]).split()[1:], "--data", "x"])
    assert config.model.hidden_dim == results.best[0].target.shape.hidden_dim
    assert config.optimizer.scheduler == "wsd"
    assert config.budget.total_tokens == pytest.approx(results.best[0].tokens, rel=0.01)


def test_the_table_has_all_of_it(results: LadderResults) -> None:
    lines = list(table(results))
    assert lines[0].split()[:3] == ["parameters", "tokens", "FLOPs"]
    assert len([line for line in lines if line.startswith(("100,000", "800,000"))]) == 8
    assert lines[1].split()[-1] == "1.34k"  # the critical batch: 3 x (0.8 x 250,000)^0.5
    assert any(line.startswith("loss = 1.69 + 406 / N^0.34 + 411 / D^0.28") for line in lines)
    assert sum(line.startswith(("verse", "stanza", "epic")) for line in lines) == 3


def test_runs_that_the_fit_leaves_out_are_shown_as_well(results: LadderResults) -> None:
    short = LossPoint(1e5, 1e5, 5.4321)
    whole = replace(results, left_out=[short])
    assert list(table(whole))[1].split()[-3:] == ["5.4321", "left", "out"]
    (found,) = as_json(whole)["left_out"]
    assert (found["loss"], found["flops"]) == (5.4321, 1e5 * results.flops[1e5])
    assert len(as_json(whole)["points"]) == 16


def test_notes_say_what_makes_predictions_doubtful(results: LadderResults) -> None:
    far, batch = notes(results)
    assert "Treat it as a guess" in far
    assert batch.startswith("A step has 2,048 tokens. In 3 of ")
    calm = replace(results, tokens_per_step=256, predicted=results.predicted[:0], best=())
    assert notes(calm) == []


def test_json_and_page_show_the_same(results: LadderResults) -> None:
    found = json.loads(json.dumps(as_json(results)))
    assert ScalingLaw(**found["law"]) == results.forecast.law
    assert len(found["points"]) == 16
    assert found["predicted"][2]["model"] == "epic"
    page = ladder_page(results, "Ladder a<b", ["A doubt."])
    assert "Ladder a&lt;b" in page
    assert "A doubt." in page
    assert "with the data and the recipe of this ladder" in page
    assert len(re.findall(r'<circle class="best"', page)) == 32  # losses and noise scales
    for heading in ("Loss", "Predictions", "Best size for a budget", "Critical batch", "Runs"):
        assert f"<h2>{heading}</h2>" in page
    assert "nan" not in page
