"""The origins of the values of a run, and refused values."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.config import PRESETS, RunConfig, architecture
from consyn_jax.config_file import describe, read_config_file
from consyn_jax.errors import UserError
from consyn_jax.flags import flags, flat
from consyn_jax.resolve import preset_architecture, resolve


def values(*args: object, **options: object) -> dict[str, object]:
    return flat(resolve(*args, **options)[0])  # type: ignore[arg-type]


def test_flags_override_the_file_the_file_the_preset_and_the_preset_the_default() -> None:
    config, origins = resolve(
        {"lr": "1e-3"}, {"lr": 1.0, "beta2": 0.9, "seed": 7, "model": "haiku"}, file_name="run.yaml"
    )
    assert (config.optimizer.lr, origins["lr"]) == (1e-3, "flag")
    assert (config.optimizer.beta2, origins["beta2"]) == (0.9, "file run.yaml")
    assert (config.model.hidden_dim, origins["hidden_dim"]) == (
        PRESETS["haiku"]["hidden_dim"],
        "preset haiku",
    )
    assert (config.optimizer.beta1, origins["beta1"]) == (0.9, "default")
    assert set(origins) == set(flags(RunConfig))


def test_the_default_run_is_verse_on_the_sample_for_three_epochs() -> None:
    found = values({})
    assert (found["model"], found["data"], found["epochs"], found["lr"]) == (
        "verse",
        ("sample",),
        3.0,
        PRESETS["verse"]["lr"],
    )


@pytest.mark.parametrize("budget", [{"max_steps": "5"}, {"total_tokens": "1e6"}, {"epochs": "0.5"}])
def test_any_budget_replaces_the_three_epochs(budget: dict[str, str]) -> None:
    found = values(budget)
    assert found["epochs"] == (0.5 if "epochs" in budget else None)
    assert found["total_tokens"] in (None, 1_000_000)


def test_names_may_have_dashes_and_aliases_mean_the_same() -> None:
    assert values({"--batch-size": "4", "learning-rate": "2e-4", "output_dir": "x"}) == values(
        {"batch_size": 4, "lr": 2e-4, "output": "x"}
    )


def test_resolving_twice_changes_nothing() -> None:
    for given in (
        {"model": "haiku", "hidden_dim": 64},
        {"model": "epic", "num_heads": 4, "mesh": "data=2"},
        {"max_steps": 3, "data": ["a", "b"]},
    ):
        once = values(given)
        assert values({}, once) == once


def test_heads_follow_the_dimensions_that_were_given() -> None:
    config, origins = resolve({"model": "haiku", "hidden_dim": 96, "num_heads": 3})
    assert (config.model.head_dim, origins["head_dim"]) == (32, "hidden_dim / num_heads")
    assert (config.model.num_kv_heads, origins["num_kv_heads"]) == (3, "num_heads")
    assert values({"model": "epic", "num_heads": 16})["num_kv_heads"] == 8
    assert values({"model": "haiku", "hidden_dim": 30, "head_dim": 16})["head_dim"] == 16
    assert values({"model": "haiku", "num_heads": 1})["head_dim"] == 128
    for name in ("num_heads", "hidden_dim"):
        with pytest.raises(UserError, match=f"--{name} must be"):
            resolve({"model": "haiku", name: 0})


def test_sequences_are_not_longer_than_a_given_context() -> None:
    config, origins = resolve({"context": 1024})
    assert (config.data.max_tokens, origins["max_tokens"]) == (1024, "context")
    assert values({"model": "haiku", "context": 512})["max_tokens"] == 256
    with pytest.raises(
        UserError, match=r"^--max_tokens 2048 is above the model's context of 1024 tokens"
    ):
        resolve({"context": 1024, "max_tokens": 2048})


def test_the_checkpoint_gives_the_model_unless_one_is_given() -> None:
    config, origins = resolve({"checkpoint": "runs/a/final"})
    assert (config.model.model, origins["model"], config.model.hidden_dim) == (
        "runs/a/final",
        "checkpoint",
        None,
    )
    assert values({"checkpoint": "runs/a/final", "model": "haiku"})["model"] == "haiku"


def test_a_keyword_is_named_without_dashes() -> None:
    with pytest.raises(UserError, match=r"^lrx is not a setting; did you mean lr\?$"):
        resolve({"lrx": 1}, given_as="keyword")


def test_yaml_and_command_line_give_the_same_values() -> None:
    texts = {
        "quiet": "true",
        "lr": "3e-4",
        "max_steps": "1_000",
        "total_tokens": "1e9",
        "data": "a",
        "mixed_precision": "no",
        "gradient_checkpointing": "full",
    }
    yaml = {
        "quiet": True,
        "lr": 3e-4,
        "max_steps": 1000,
        "total_tokens": 10**9,
        "data": ["a"],
        "mixed_precision": False,
        "gradient_checkpointing": True,
    }
    assert values(texts) == values({}, yaml)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": "fast"}, "--lr must be a number, not 'fast'."),
        ({"lr": "nan"}, "--lr must be a number, not 'nan'."),
        ({"batch_size": "2.5"}, "--batch_size must be a whole number, not '2.5'."),
        ({"batch_size": "true"}, "--batch_size must be a whole number, not 'true'."),
        ({"batch_size": "1e30"}, "--batch_size must be below 2**63, and '1e30' is not."),
        ({"lr": "1e400"}, "--lr must be below 1.8e308, and '1e400' is not."),
        ({"lr": "inf"}, "--lr must be a number, not 'inf'."),
        ({"quiet": "yes"}, "--quiet must be true or false, not 'yes'."),
        ({"lr": True}, "--lr must be a number, not True."),
        ({"output": {"a": 1}}, "--output must be text, not {'a': 1}."),
        ({"output": None}, "--output must be text, not None."),
        ({"seed": 2**63}, "--seed must be below 2**63, and 9223372036854775808 is not."),
        (
            {"hidden_dim": "100"},
            "--hidden_dim 100 is not a multiple of --num_heads 12. Use 96 or 108, or give "
            "--head_dim.",
        ),
        (
            {"moment_dtype": "bfloat"},
            "--moment_dtype 'bfloat' is not known; did you mean bfloat16? Known: float32, "
            "bfloat16.",
        ),
    ],
)
def test_an_invalid_value_is_named_with_its_flag(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(given)
    assert str(caught.value) == message


def test_a_flag_that_may_be_bare_may_be_true_or_false() -> None:
    """As trainers write it in which it is no more than a switch."""
    for given, value in (("True", "full"), ("false", "none"), ("minimal", "minimal")):
        assert values({"gradient_checkpointing": given})["gradient_checkpointing"] == value


@pytest.mark.parametrize(
    ("given", "recipe"),
    [
        ({"lora_rank": 4}, (2e-4, 0.0, 0.999)),
        ({"objective": "dpo"}, (1e-6, 0.0, 0.999)),
        ({"objective": "dpo", "lora_rank": 4}, (1e-5, 0.0, 0.999)),
        ({"checkpoint": None, "model": "/own/config.json"}, (3e-4, 0.1, 0.95)),
    ],
    ids=str,
)
def test_each_kind_of_training_has_its_recipe(
    given: dict[str, Any], recipe: tuple[float, ...]
) -> None:
    options = resolve({"checkpoint": "there"} | given)[0].optimizer
    assert (options.lr, options.weight_decay, options.beta2) == recipe


def test_a_name_of_the_users_own_is_for_flags_that_take_one() -> None:
    """And a text in YAML may look like a truth value."""
    assert values({"logging_backend": ["own.module:Class"]})["logging_backend"] == (
        "own.module:Class",
    )
    for name, value in (("logging_backend", ["own"]), ("scheduler", "own:Class")):
        with pytest.raises(UserError, match=rf"^--{name} 'own.*' is not known"):
            resolve({name: value})
    assert values({}, {"output": True})["output"] == "true"


def test_numbers_may_be_separated_by_commas() -> None:
    config, _ = resolve({"data": ["a", "b"], "data_weights": ["0.5,0.5"]})
    assert config.data.data_weights == (0.5, 0.5)


def test_names_of_matrices_in_one_word_are_answered_with_the_words() -> None:
    with pytest.raises(UserError, match=r"by spaces: --lora_targets q_proj v_proj\."):
        resolve({"lora_rank": 4, "checkpoint": "x", "lora_targets": ["q_proj,v_proj"]})


def test_a_long_value_is_shortened_in_the_message() -> None:
    for given in ({"lr": "1" + 4000 * "["}, {"scheduler": 4000 * "x"}):
        with pytest.raises(UserError) as refused:
            resolve({}, given, file_name="recipe.yaml")
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", ["batch_size", "lr", "decay_from", "seed", "resume"])
@pytest.mark.parametrize("value", [5001 * "1", 10**5000], ids=["text", "number"])
def test_a_number_of_thousands_of_digits_is_not_called_something_else(
    name: str, value: str | int
) -> None:
    """Python converts integers of at most 4,300 digits, in both directions."""
    if name == "resume" and isinstance(value, int):
        return  # text
    with pytest.raises(UserError) as refused:
        resolve({name: value})
    said = str(refused.value)
    assert "must be below" in said or "at most 15 digits" in said
    assert "must be a number" not in said
    assert "must be a whole number" not in said


def test_whole_numbers_are_exact() -> None:
    """A float would have another last digit."""
    config, _ = resolve({"model": "haiku", "total_tokens": "9_007_199_254_740_993"})
    assert config.budget.total_tokens == 9_007_199_254_740_993


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_another_model_takes_the_place_of_the_files_with_its_recipe(optimizer: str) -> None:
    chosen = {
        "optimizer": optimizer,
        "batch_size": 4,
        **({"lr": 0.1} if optimizer == "sgd" else {}),
    }
    whole = flat(resolve({"model": "haiku", **chosen})[0])
    expected, _ = resolve({"model": "stanza", **chosen})
    assert resolve({"model": "stanza"}, whole)[0] == expected
    tuned = flat(resolve({"checkpoint": "there"})[0])
    assert values({"--model": "haiku"}, tuned)["checkpoint"] is None
    assert values({"model": "haiku"}, whole) == values({}, whole)
    narrow = flat(resolve({"model": "haiku", "mlp_dim": 256, "lr": 0.02, "optimizer": "adamw"})[0])
    other = resolve({"model": "stanza"}, narrow)[0]
    assert (other.model.hidden_dim, other.model.mlp_dim, other.optimizer.lr) == (2048, 256, 0.02)


CHOSEN = (
    {},
    {"hidden_dim": 192},
    {"hidden_dim": 120, "num_heads": 6},
    {"hidden_dim": 70, "num_heads": 7, "num_kv_heads": 1, "head_dim": 12, "mlp_dim": 100},
    {"hidden_dim": 960, "head_dim": 16},
    {"num_heads": 8, "context": 128, "lr": 0.02},
    {"optimizer": "lion", "max_tokens": 96, "epochs": 3},
    {"optimizer": "sgd", "lr": 0.1, "max_steps": 7, "weight_decay": 0.3},
)


def written(given: dict[str, Any]) -> dict[str, Any]:
    """The content of the recipe that a run with these flags writes."""
    return flat(resolve(given)[0])


def outcome(given: dict[str, Any], file: dict[str, Any] | None = None) -> RunConfig | str:
    try:
        return resolve(given, file)[0]
    except UserError as error:
        return str(error).replace(" (file )", "")


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_a_written_recipe_gives_another_model_what_the_user_chose_and_nothing_else(
    chosen: dict[str, Any],
) -> None:
    """For each pair of presets: the values that followed from the earlier one are not fixed."""
    for own, other in itertools.product(PRESETS, repeat=2):
        made = outcome({"model": own, **chosen})
        if isinstance(made, str):
            continue  # no run could have written this
        file = written({"model": own, **chosen})
        assert outcome({}, file) == made
        assert outcome({"model": other}, file) == outcome({"model": other, **chosen})


@pytest.mark.parametrize(
    ("before", "added"),
    [
        ({}, {"checkpoint": "there"}),
        ({"checkpoint": "there"}, {"model": "haiku"}),
        ({"checkpoint": "there"}, {"checkpoint": "elsewhere"}),
        ({"checkpoint": "there"}, {"lora_rank": 8}),
        ({"checkpoint": "there"}, {"objective": "dpo"}),
        ({"checkpoint": "there", "objective": "dpo"}, {"objective": "next_token"}),
        ({"model": "haiku"}, {"optimizer": "lion"}),
        ({"model": "haiku", "optimizer": "lion"}, {"optimizer": "adamw"}),
        ({"model": "haiku"}, {"hidden_dim": 256}),
        ({"model": "haiku"}, {"num_heads": 8}),
        ({"model": "haiku"}, {"context": 64}),
        ({"model": "haiku"}, {"max_steps": 10**6}),
    ],
    ids=str,
)
def test_what_followed_from_a_value_of_a_recipe_does_not_outlive_it(
    tmp_path: Path, before: dict[str, Any], added: dict[str, Any]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(describe(*resolve({"batch_size": 4, **before})))
    file = read_config_file(path)
    merged = before | added
    if {"model", "checkpoint"} & added.keys():  # one of the two names the other
        merged = {n: v for n, v in merged.items() if n in added or n != "checkpoint"}
    assert outcome(added, file) == outcome({"batch_size": 4, **merged})


def test_values_written_by_hand_are_all_chosen() -> None:
    by_hand = {"hidden_dim": 256, "head_dim": 64, "epochs": 3}
    run, _ = resolve({"model": "haiku", "num_heads": 8, "max_steps": 9}, by_hand)
    assert (run.model.head_dim, run.budget.epochs) == (64, 3)


def test_a_width_from_a_file_that_does_not_fit_is_named_with_the_file() -> None:
    with pytest.raises(UserError, match=r"--hidden_dim 64 \(file a\.yaml\) is not a multiple of"):
        resolve({"model": "verse"}, {"model": "haiku", "hidden_dim": 64}, file_name="a.yaml")


def test_presets_are_architectures() -> None:
    for name in PRESETS:
        assert preset_architecture(name) == architecture(
            resolve({"model": name})[0].model, vocab_size=49_152
        )
    with pytest.raises(UserError, match=r"did you mean haiku\?"):
        preset_architecture("hiaku")


def test_a_model_with_a_name_too_long_for_a_file_is_no_directory() -> None:
    run, _ = resolve({"model": "x" * 300})
    assert run.model.checkpoint is None
