"""What a ladder refuses before anything is read."""

import re

import pytest

from consyn_jax.errors import UserError
from consyn_jax.tuning.tune_options import resolve_tuning


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"search": ["lr=1e-3,1e-2"]}, "--search and --ladder are two studies."),
        ({"ladder": "2"}, "--ladder 2 gives too few sizes to fit a curve. Use at least 3."),
        ({"ladder": "100"}, "--ladder 100 is a number of sizes above 32, the most"),
        ({"ladder": "1e5,2e5"}, "--ladder 1e5,2e5 gives too few sizes to fit a curve."),
        ({"ladder": "big"}, "--ladder must be a number of sizes up to 32, or sizes in parameters"),
        ({"ladder": "1e5,2e5,-4e5"}, "or sizes in parameters such as 1e5,2e5,4e5"),
        ({"predict": ["1e20"]}, "--predict must be flops=X or tokens=X with a number above 0"),
        ({"predict": ["flops=0"]}, "with a number above 0, not 'flops=0'"),
        ({"tokens_per_parameter": "0"}, "--tokens_per_parameter must be above 0, not 0."),
        ({"trials": "4"}, "--trials does not work with --ladder: it is for --search."),
        ({"scheduler": "linear"}, "--scheduler linear does not work with --ladder"),
        ({"save_steps": "10"}, "--save_steps does not work with --ladder"),
        ({"early_stopping_patience": "3"}, "--early_stopping_patience does not work with"),
        (
            {"checkpoint": "x/y"},
            "--checkpoint does not work with --ladder: all sizes start from new",
        ),
        ({"optimizer": "schedule_free_adamw", "lr": "1e-3"}, "averages its weights instead of"),
        ({"decay_ratio": "1"}, "--decay_ratio 1 leaves no steps before the decay"),
        ({"model": "some.json"}, "--ladder scales a preset, but --model some.json is not one"),
        ({"validation_fraction": "0"}, "leaves no data for them"),
        ({"streaming": "true", "max_steps": "100"}, "--streaming does not work with consyn-tune"),
    ],
)
def test_mistakes(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        resolve_tuning({"ladder": "4", "model": "haiku", "data": ["x"], **given})


def test_flags_of_a_ladder_need_one() -> None:
    for name, value in (("predict", ["flops=1e20"]), ("tokens_per_parameter", "10")):
        with pytest.raises(UserError, match=f"--{name} is for --ladder. Add --ladder"):
            resolve_tuning({"search": ["lr=1e-3,1e-2"], name: value, "data": ["x"]})


def test_a_recipe_of_a_search_goes_into_a_ladder() -> None:
    """It has all values of a run, those that a ladder decides itself among them."""
    recipe = {"model": "haiku", "scheduler": "cosine", "epochs": 3.0, "lr": 0.004}
    config, _ = resolve_tuning({"ladder": "4", "data": ["x"]}, recipe, file_name="recipe.yaml")
    assert (config.optimizer.scheduler, config.optimizer.lr) == ("wsd", 0.004)
