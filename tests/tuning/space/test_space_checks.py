"""What is refused before the first trial: combinations inside ranges, flags without effect."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import yaml

from consyn_jax.config_file import describe
from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Params, initial_parameters, layout
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import OPTIMIZERS, SCHEDULERS, OptimizerOptions
from consyn_jax.resolve import resolve
from consyn_jax.training.optim.optimizers import build_optimizer
from consyn_jax.training.optim.schedules import SCHEDULES
from consyn_jax.tuning.search_space import Dimension, parse_search
from consyn_jax.tuning.space.space_checks import (
    MOST_POINTS,
    MOST_VALUES,
    NO_EFFECT,
    check_space,
    points_to_check,
)
from consyn_jax.tuning.tune_options import resolve_tuning

HAIKU = {"model": "haiku", "data": ["x"]}
SHAPE = {"hidden_dim": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
MODEL = ModelConfig(vocab_size=16, mlp_dim=8, context=8, **SHAPE)


def resolved(search: str, **given: Any) -> Any:
    return resolve_tuning({**HAIKU, **given, "search": search.split()})


@pytest.mark.parametrize(
    ("search", "given", "sentence"),
    [
        (
            "num_heads=1:4",
            {"hidden_dim": 32},
            "--num_heads 3 is refused: --hidden_dim 32 is not a multiple of --num_heads 3. Write "
            "--search num_heads=1,2,4.",
        ),
        (
            "num_kv_heads=1:4",
            {"hidden_dim": 32, "num_heads": 4},
            "Write --search num_kv_heads=1,2,4.",
        ),
        ("hidden_dim=32:64", {}, "Write --search hidden_dim=32,40,48,56,64."),
        ("hidden_dim=32:64:log num_heads=2,8", {}, "Write --search hidden_dim=32,48,64."),
        ("warmup_steps=1:9", {"max_steps": 5}, "Write --search warmup_steps=1:5."),
        ("hidden_dim=5:7", {"num_heads": 3}, "Write --hidden_dim 6 instead of --search"),
    ],
)
def test_a_value_inside_a_range_is_refused_with_what_to_write(
    search: str, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as raised:
        resolved(search, **given)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("search", ["num_heads=1,2,4", "hidden_dim=32,48,64 num_heads=2,8"])
def test_what_is_written_instead_is_accepted(search: str) -> None:
    given = {} if "hidden_dim" in search else {"hidden_dim": 32}
    resolved(search, **given)


def test_a_fault_of_the_plain_command_is_named_alone() -> None:
    with pytest.raises(UserError, match=r"^--max_steps must be greater than 0, not 0"):
        resolved("lr=1e-3:1e-2", max_steps=0)
    resolved("lr=0.1:1", optimizer="sgd")  # the search mends the plain command
    with pytest.raises(UserError) as raised:
        resolved("lr=1e-3:1e-2", metric="eval/rewards/margins")
    assert str(raised.value).startswith("--metric eval/rewards/margins")


def test_few_combinations_are_all_checked_and_many_are_sampled() -> None:
    space = [Dimension("num_heads", 1, 4), Dimension("lr", 0.1, 0.2)]
    assert {(p["num_heads"], p["lr"]) for p in points_to_check(space)} == {
        (heads, lr) for heads in (1, 2, 3, 4) for lr in (0.1, 0.2)
    }
    many = [Dimension(f"flag{i}", 0.0, 1.0) for i in range(12)]
    points = points_to_check(many)
    assert len(points) == 24 + MOST_POINTS
    assert all(any(point[d.name] == 1.0 for point in points[:24]) for d in many)
    long = points_to_check([Dimension("seed", 0, 10**9)])
    assert len(long) == MOST_VALUES + 2
    assert [point["seed"] for point in long[:2]] == [0, 10**9]


def test_choices_that_do_not_fit_are_named() -> None:
    def refuse(values: object) -> None:
        raise UserError("No.")

    with pytest.raises(UserError, match=r"with --flag0 0 is refused: No\."):
        check_space([Dimension("flag0", 0.0, 1.0)], refuse)


def test_dimensions_that_the_weights_set_cannot_vary() -> None:
    for given, other in (({"checkpoint": "runs/a/final"}, "checkpoint"), ({}, "model")):
        own = {"model": "runs/a/final", "checkpoint": "runs/a/final"} if other == "model" else given
        with pytest.raises(UserError) as raised:
            resolved("hidden_dim=32,64", **own)
        assert str(raised.value) == (
            "--search hidden_dim cannot vary, because all trials start from the weights of "
            "runs/a/final, and the shapes of these weights are fixed. Leave hidden_dim out of "
            f"--search, or leave --{other} out."
        )


@pytest.mark.parametrize(
    "value", [{"lr": [1e-3]}, [{"lr": [1e-3]}], "lr=1,2 beta1=0.8,0.9", ["lr=1,2", 5]], ids=str
)
def test_a_search_in_a_file_is_a_list_of_texts(value: Any) -> None:
    with pytest.raises(UserError, match=r"must be a list of FLAG=VALUES. Write search: \['lr="):
        resolve_tuning(HAIKU, {"search": value}, file_name="recipe.yaml")
    resolve_tuning(HAIKU, {"search": ["lr=1,2", "beta1=0.8,0.9"]}, file_name="recipe.yaml")


@pytest.mark.parametrize("item", ["optimizer=adamw, muon", "lr_multipliers=head=1, mlp=2; head=2"])
def test_a_search_with_spaces_is_the_same_in_a_file_as_on_the_command_line(item: str) -> None:
    given = resolve_tuning({**HAIKU, "search": [item]})
    printed = yaml.safe_load(describe(*given))["search"]
    for search in (printed, item):
        assert resolve_tuning(HAIKU, {"search": search})[0] == given[0]


def test_a_flag_is_fixed_or_searched_and_a_search_replaces_a_file() -> None:
    with pytest.raises(UserError) as raised:
        resolved("lr=1e-3:1e-2", lr="1e-3")
    assert "--lr 1e-3 and --search lr=0.001:0.01 set the same flag" in str(raised.value)
    search = {"search": ["lr=1e-3:1e-2", "beta1=0.8,0.9"]}
    _, origins = resolve_tuning({**HAIKU, **search}, {"lr": 1e-3}, file_name="recipe.yaml")
    assert origins["lr"] == "search, instead of file recipe.yaml"
    assert origins["beta1"] == "search"


@pytest.mark.parametrize(
    ("search", "given", "reason"),
    [
        ("num_cycles=1:3", {}, "without --scheduler cosine_with_restarts"),
        ("power=1:3", {}, "without --scheduler polynomial"),
        ("decay_ratio=0.1:0.3", {}, "without --scheduler wsd"),
        ("plateau_factor=0.1:0.3", {}, "without --scheduler plateau"),
        ("min_lr_ratio=0:0.3", {"scheduler": "constant"}, "with --scheduler constant"),
        ("warmup_steps=0:3", {"scheduler": "constant"}, "with --scheduler constant"),
        ("warmup_ratio=0:0.3", {"warmup_steps": 2}, "beside --warmup_steps"),
        ("base_hidden_dim=32,64", {}, "without --parametrization mup"),
        ("eps=1e-9:1e-8", {"optimizer": "lion"}, "with --optimizer lion"),
        ("beta2=0.9:0.99", {"optimizer": "sgd", "lr": 0.1}, "with --optimizer sgd"),
        ("max_nonfinite_steps=1:3", {}, "without --on_nonfinite skip"),
    ],
)
def test_a_flag_without_effect_is_refused(search: str, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as raised:
        resolved(search, **given)
    assert f"--search {parse_search([search])[0].text()} has no effect {reason}" in str(
        raised.value
    )


def test_a_flag_that_has_an_effect_in_some_trials_is_searched() -> None:
    resolved("scheduler=cosine,wsd decay_ratio=0.1:0.3")
    resolved("optimizer=adamw,lion eps=1e-9:1e-8")
    resolved("parametrization=standard,mup base_hidden_dim=32,64")


def test_the_table_agrees_with_the_schedules_and_the_optimizers() -> None:
    for name in SCHEDULERS:
        run = resolve({"model": "haiku", "scheduler": name})[0]
        rule, is_constant = SCHEDULES[name], name.startswith("constant")
        assert (NO_EFFECT["warmup_steps"](run) is None) == rule.has_warmup
        assert (NO_EFFECT["min_lr_ratio"](run) is None) == (rule.has_floor and not is_constant)
        assert (NO_EFFECT["decay_ratio"](run) is None) == rule.decays_late


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_unused_flags_of_an_optimizer_are_those_that_change_no_update(optimizer: str) -> None:
    axes = layout(MODEL).logical_axes
    start = initial_parameters(MODEL, 0)
    gradients = [initial_parameters(MODEL, seed) for seed in (1, 2)]

    @jax.jit
    def train(values: dict[str, Any]) -> Params:
        options = OptimizerOptions(optimizer=optimizer, weight_decay=0.0, **values)
        rule, params = build_optimizer(options, 0.1, axes), start
        state = rule.init(params)
        for gradient in gradients:  # after one, Adam's corrected moments do not depend on betas
            updates, state = rule.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    plain = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    before = jax.tree.leaves(train(plain))
    for name in plain:
        after = jax.tree.leaves(train({**plain, name: 0.3}))
        changed = any(not jnp.array_equal(old, new) for old, new in zip(before, after, strict=True))
        assert changed == (name not in OPTIMIZERS[optimizer].unused), name
