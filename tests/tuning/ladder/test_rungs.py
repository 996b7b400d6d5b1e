"""The sizes of a ladder, and the runs of each."""

import itertools
import re

import pytest

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.resolve import resolve
from consyn_jax.tuning.ladder.model_family import (
    ladder_shapes,
    model_of,
    num_body_parameters,
    scaled,
    scaled_target,
    shape_of,
    target,
)
from consyn_jax.tuning.ladder.rungs import plan_rung


def run_of(model: str = "haiku", **given: object) -> RunConfig:
    return resolve({"model": model, "scheduler": "wsd", **given})[0]


@pytest.mark.parametrize("model", ["haiku", "verse", "stanza", "epic"])
def test_sizes_double_up_to_the_model_and_keep_its_heads(model: str) -> None:
    options = run_of(model).model
    found = ladder_shapes(options, 4)
    whole = shape_of(options)
    assert found[-1] == whole
    sizes = [num_body_parameters(model_of(options, shape)) for shape in found]
    for small, large in itertools.pairwise(sizes):
        assert 1.4 < large / small < 2.5
    proportions = [shape.hidden_dim / shape.num_layers for shape in found]
    assert max(proportions) <= 1.5 * min(proportions)
    for shape in found:
        assert shape.head_dim == whole.head_dim
        assert shape.num_heads * shape.head_dim == shape.hidden_dim
        assert shape.num_heads / shape.num_kv_heads == whole.num_heads / whole.num_kv_heads
        ratio = shape.mlp_dim / shape.hidden_dim / (whole.mlp_dim / whole.hidden_dim)
        assert ratio == pytest.approx(1, abs=0.05)


def test_the_largest_size_is_the_model_itself_whatever_its_flags() -> None:
    options = run_of(mlp_dim=200, num_layers=9).model
    assert ladder_shapes(options, 3)[-1] == shape_of(options)


def test_any_size_is_met_within_a_quarter() -> None:
    for size in (3e5, 1e6, 5e7, 7e8, 2e10):
        assert scaled_target(size, 256, 128).parameters == pytest.approx(size, rel=0.25)


def test_a_target_is_its_preset() -> None:
    verse = target("verse", None, 49_152, 2048)
    assert verse.parameters == pytest.approx(85e6, rel=0.01)  # 124 M with the embedding
    assert verse.flops == pytest.approx(6 * 122.7e6, rel=0.2)  # and attention


def test_sizes_that_are_the_same_are_refused() -> None:
    with pytest.raises(UserError, match="same shape for two sizes near 14,500 parameters"):
        ladder_shapes(run_of().model, (14_000.0, 14_500.0, 1e6))


def test_a_model_whose_heads_do_not_make_up_its_width_is_refused() -> None:
    options = run_of(hidden_dim=128, num_heads=2, head_dim=32).model
    with pytest.raises(UserError, match="2 x 32 is not 128"):
        scaled(options, 1e5)


def test_the_runs_of_a_size_double_and_share_their_beginning() -> None:
    run = run_of()
    rung = plan_rung(run, shape_of(run.model), 20, 1e9)
    assert rung.tokens[-1] == pytest.approx(20 * rung.parameters, rel=0.01)
    for short, long in itertools.pairwise(rung.ends):
        assert long == pytest.approx(2 * short, abs=1)
    for start, end in zip(rung.starts, rung.ends, strict=True):
        assert start == pytest.approx(0.8 * end, abs=1)
        assert start % rung.starts[0] == 0
    assert rung.all_steps == pytest.approx(1.175 * rung.steps, rel=0.001)


def test_other_budgets_limit_a_size() -> None:
    run = run_of()
    assert plan_rung(run, shape_of(run.model), 20, 100).steps == 100


def test_a_budget_too_small_for_the_runs_is_refused() -> None:
    run = run_of()
    with pytest.raises(
        UserError, match=r"is 39 steps of 2,048 tokens, but the 4 runs of this size need 40\. "
    ):
        plan_rung(run, shape_of(run.model), 20, 39)
    with pytest.raises(
        UserError, match=r"Warm-up of 11 steps .* after step 10. Lower --warmup_steps\."
    ):
        plan_rung(run_of(warmup_steps=11), shape_of(run.model), 20, 100)
    with pytest.raises(
        UserError, match=r"Warm-up of 20 steps .* after step 10. Lower --warmup_ratio\."
    ):
        plan_rung(run_of(warmup_ratio=0.2), shape_of(run.model), 20, 100)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_budget_that_is_asked_for_is_the_smallest_that_suffices(ratio: float) -> None:
    run = run_of(decay_ratio=ratio, warmup_steps=0)
    with pytest.raises(UserError) as refused:
        plan_rung(run, shape_of(run.model), 20, 1)
    (needed,) = re.findall(r"need (\d+)\.", str(refused.value))
    assert plan_rung(run, shape_of(run.model), 20, int(needed)).ends[0] >= 5
    with pytest.raises(UserError, match=f"need {needed}"):
        plan_rung(run, shape_of(run.model), 20, int(needed) - 1)
