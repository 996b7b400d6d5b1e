"""Where the values of a run come from, and what is no value."""

import pytest

from consyn_jax.config import PRESETS, UserError, architecture, flags, flat
from consyn_jax.resolve import preset_architecture, resolve


def values(*args: object, **options: object) -> dict[str, object]:
    return flat(resolve(*args, **options)[0])  # type: ignore[arg-type]


def test_flags_win_over_the_file_the_file_over_the_preset_and_the_preset_over_the_default() -> None:
    config, origins = resolve({"lr": "1e-3"}, {"lr": 1.0, "beta2": 0.9, "seed": 7, "model": "haiku"}, file_name="run.yaml")
    assert (config.optimizer.lr, origins["lr"]) == (1e-3, "flag")
    assert (config.optimizer.beta2, origins["beta2"]) == (0.9, "file run.yaml")
    assert (config.model.hidden_dim, origins["hidden_dim"]) == (PRESETS["haiku"].hidden_dim, "preset haiku")
    assert (config.optimizer.beta1, origins["beta1"]) == (0.9, "default")
    assert set(origins) == set(flags())


def test_without_anything_the_run_is_verse_on_the_sample_for_three_epochs() -> None:
    found = values({})
    assert (found["model"], found["data"], found["epochs"], found["lr"]) == ("verse", ("sample",), 3.0, PRESETS["verse"].lr)


@pytest.mark.parametrize("budget", [{"max_steps": "5"}, {"total_tokens": "1e6"}, {"epochs": "0.5"}])
def test_any_budget_replaces_the_three_epochs(budget: dict[str, str]) -> None:
    found = values(budget)
    assert found["epochs"] == (0.5 if "epochs" in budget else None)
    assert found["total_tokens"] in (None, 1_000_000)


def test_names_may_have_dashes_and_aliases_mean_the_same() -> None:
    assert values({"--batch-size": "4", "learning-rate": "2e-4", "output_dir": "x"}) == values({"batch_size": 4, "lr": 2e-4, "output": "x"})


def test_resolving_what_was_resolved_changes_nothing() -> None:
    for given in ({"model": "haiku", "hidden_dim": 64}, {"model": "epic", "num_heads": 4, "mesh": "data=2"}, {"max_steps": 3, "data": ["a", "b"]}):
        once = values(given)
        assert values({}, once) == once


def test_heads_follow_the_dimensions_that_were_given() -> None:
    config, origins = resolve({"model": "haiku", "hidden_dim": 96, "num_heads": 3})
    assert (config.model.head_dim, origins["head_dim"]) == (32, "hidden_dim / num_heads")
    assert (config.model.num_kv_heads, origins["num_kv_heads"]) == (3, "num_heads")
    assert values({"model": "epic", "num_heads": 16})["num_kv_heads"] == 8
    assert values({"model": "haiku", "hidden_dim": 30, "head_dim": 16})["head_dim"] == 16


def test_sequences_follow_a_context_shorter_than_the_recipes() -> None:
    config, origins = resolve({"context": 1024})
    assert (config.data.max_tokens, origins["max_tokens"]) == (1024, "context")
    assert values({"model": "haiku", "context": 512})["max_tokens"] == PRESETS["haiku"].max_tokens
    with pytest.raises(UserError, match=r"^--max_tokens 2048 is above the context of 1024 tokens"):
        resolve({"context": 1024, "max_tokens": 2048})


def test_the_checkpoint_names_the_model_unless_there_is_a_model() -> None:
    config, origins = resolve({"checkpoint": "runs/a/final"})
    assert (config.model.model, origins["model"], config.model.hidden_dim) == ("runs/a/final", "checkpoint", None)
    assert values({"checkpoint": "runs/a/final", "model": "haiku"})["model"] == "haiku"


def test_a_keyword_is_named_without_dashes() -> None:
    with pytest.raises(UserError, match=r"^lrx is not a setting; did you mean lr\?$"):
        resolve({"lrx": 1}, given_as="keyword")


def test_values_of_yaml_and_of_the_command_line_come_to_the_same() -> None:
    texts = {"quiet": "true", "lr": "3e-4", "max_steps": "1_000", "total_tokens": "1e9", "data": "a", "mixed_precision": "no", "gradient_checkpointing": "full"}
    yaml = {"quiet": True, "lr": 3e-4, "max_steps": 1000, "total_tokens": 10**9, "data": ["a"], "mixed_precision": False, "gradient_checkpointing": True}
    assert values(texts) == values({}, yaml)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": "fast"}, "--lr wants a number, not 'fast'."),
        ({"lr": "nan"}, "--lr wants a number, not 'nan'."),
        ({"batch_size": "2.5"}, "--batch_size wants a whole number, not '2.5'."),
        ({"batch_size": "true"}, "--batch_size wants a whole number, not 'true'."),
        ({"quiet": "yes"}, "--quiet wants true or false, not 'yes'."),
        ({"hidden_dim": "100"}, "--hidden_dim 100 is not a multiple of --num_heads 12. Use 96 or 108, or give --head_dim."),
        ({"moment_dtype": "bfloat"}, "--moment_dtype 'bfloat' is not known; did you mean bfloat16? Known: float32, bfloat16."),
    ],
)
def test_what_is_no_value_is_named_with_its_flag(given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(given)
    assert str(caught.value) == message


def test_a_value_of_any_length_is_answered_by_a_sentence() -> None:
    for given in ({"lr": "1" + 4000 * "["}, {"scheduler": 4000 * "x"}):
        with pytest.raises(UserError) as refused:
            resolve({}, given, file_name="recipe.yaml")
        assert len(str(refused.value)) < 400


def test_presets_are_architectures() -> None:
    for name in PRESETS:
        assert preset_architecture(name) == architecture(resolve({"model": name})[0].model, vocab_size=49_152)
    with pytest.raises(UserError, match=r"did you mean haiku\?"):
        preset_architecture("hiaku")
