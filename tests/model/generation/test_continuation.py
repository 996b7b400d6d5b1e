from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model_config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=32,
    tie_embeddings=False,
)
PROMPT = jnp.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
NEW = 12


@pytest.fixture(scope="module")
def params() -> Params:
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), layout(CONFIG).shapes
    )


@pytest.fixture(scope="module")
def greedy(params: Params) -> np.ndarray:
    return np.asarray(ConsynLMHeadModel.from_parameters(CONFIG, params).generate(PROMPT, NEW))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
def test_the_cache_gives_the_same_as_the_whole_sequence(params: Params, window: int | None) -> None:
    config = replace(CONFIG, sliding_window=window)
    model = ConsynLMHeadModel.from_parameters(config, params)
    forward = jax.jit(lambda p, ids: ConsynLMHeadModel.from_parameters(config, p)(ids))
    # later tokens have no effect, so one shape, compiled once, is enough
    ids = np.zeros((2, 5 + NEW), np.int32)
    ids[:, :5] = PROMPT
    for t in range(5, 5 + NEW):
        ids[:, t] = np.argmax(forward(params, jnp.asarray(ids))[:, t - 1], axis=-1)
    np.testing.assert_array_equal(model.generate(PROMPT, NEW), ids)
    assert len(np.unique(ids[:, 5:])) > 3, "not one token repeated"


@pytest.mark.slow
def test_a_row_ends_at_eos_and_generation_when_all_rows_have_ended(
    params: Params, greedy: np.ndarray
) -> None:
    first, second = greedy[:, 5:]
    eos = next(int(token) for token in first[1:] if token not in second)
    at = list(first).index(eos)
    model = ConsynLMHeadModel.from_parameters(replace(CONFIG, eos_token_id=eos), params)
    both = np.asarray(model.generate(PROMPT, NEW))
    np.testing.assert_array_equal(both[1], greedy[1])
    np.testing.assert_array_equal(both[0, 5:], [*first[: at + 1], *[eos] * (NEW - at - 1)])
    np.testing.assert_array_equal(
        model.generate(jnp.tile(PROMPT[:1], (2, 1)), NEW), greedy[[0, 0], : 5 + at + 1]
    )
    np.testing.assert_array_equal(model.generate(PROMPT, NEW, stop_at_eos=False), greedy)


@pytest.mark.slow
def test_a_seed_fixes_the_draws(params: Params, greedy: np.ndarray) -> None:
    model = ConsynLMHeadModel.from_parameters(CONFIG, params)
    one, again, other = (
        np.asarray(model.generate(PROMPT, NEW, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert max(one.max(), other.max()) < 50
    np.testing.assert_array_equal(model.generate(PROMPT, NEW, temperature=1.0, top_k=1), greedy)


def test_prompts_that_do_not_fit_are_refused(params: Params) -> None:
    model = ConsynLMHeadModel.from_parameters(CONFIG, params)
    with pytest.raises(UserError, match="Prompt 0 is empty"):
        model.generate(jnp.zeros((1, 0), jnp.int32), 4)
    message = r"5 tokens, and with 28 new tokens it exceeds the model's context of 32\. Ask for at most 27 new tokens\."
    with pytest.raises(UserError, match=message):
        model.generate(PROMPT, 28)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[3, -1]], r"^Prompt 0 has token id -1 in input_ids at position 1, .* any length\.$"),
        ([[3], [-100]], r"^Prompt 1 has -100 in input_ids at position 0"),
        (np.array([[3, 50]]), r"^Prompt 0 has token id 50 .* ends at 49\. Use the tokenizer"),
        ([[1.5]], r"^Prompt 0 has 1\.5 in input_ids at position 0, but ids are whole numbers"),
        (np.ones((1, 2), np.float32), r"^Prompt 0 has 1\.0 in input_ids at position 0"),
        ([3, 4], r"^The prompts are one row of ids\. Pass \[ids\]"),
        (jnp.array([3, 4]), r"^The prompts are one row of ids\. Pass \[ids\]"),
        (np.ones((1, 1, 1), int), r"^Prompt 0 has input_ids of shape \(1, 1\)"),
        ([[3], "a"], r"^Prompt 1 is a text, and others are ids"),
        ({"input_ids": [[3]], "attention_mask": [[1]]}, r"^The prompts are a dict, .* 'input_ids'"),
        ([{"role": "user", "content": "a"}], r"^The prompts are messages of a conversation\. Use"),
        ([[{"role": "user", "content": "a"}]], r"^The prompts are messages of a conversation\."),
        (b"a", r"^The prompts are bytes\. Pass text: prompts\.decode\(\)"),
        (None, r"^Prompts of type NoneType are not supported\. Pass a text"),
    ],
)
def test_prompts_that_cannot_be_are_answered_with_a_remedy(
    params: Params, prompts: object, message: str
) -> None:
    model = ConsynLMHeadModel.from_parameters(CONFIG, params)
    with pytest.raises(UserError, match=message):
        model.generate(prompts, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": [[1]]}, r"takes no attention_mask\. Pass lists of ids without padding"),
        ({"do_sample": True}, r"takes no do_sample\. Pass temperature=1\.0 to sample"),
        ({"max_length": 9}, r"takes no max_length\. Pass max_new_tokens"),
        ({"num_return_sequences": 3}, r"takes no num_return_sequences\. Repeat the prompt"),
        ({"tokenizer": "a"}, r"takes no tokenizer\. Texts are encoded by the model's tokenizer"),
        ({"beams": 2}, r"takes no beams\. The arguments are prompts, max_new_tokens, compute"),
        ({"top_k": 5}, r"^top_k has no effect at temperature 0.*Pass temperature=1\.0, or leave"),
        ({"top_p": 0.5, "temperature": 0.0}, r"^top_p has no effect at temperature 0"),
        (
            {"compute": "bfloat16"},
            r"^compute is a str.*Pass model\.default_compute\(jnp\.bfloat16\)",
        ),
    ],
)
def test_arguments_that_cannot_be_are_answered_with_a_remedy(
    params: Params, options: dict[str, Any], message: str
) -> None:
    model = ConsynLMHeadModel.from_parameters(CONFIG, params)
    with pytest.raises(UserError, match=message):
        model.generate(PROMPT, 4, **options)


def test_prompts_by_the_name_of_transformers_are_answered(params: Params) -> None:
    model = ConsynLMHeadModel.from_parameters(CONFIG, params)
    with pytest.raises(UserError, match=r"takes no input_ids\. Pass the ids first"):
        model.generate(input_ids=PROMPT, attention_mask=np.ones_like(PROMPT))


def test_a_number_of_new_tokens_may_be_one_of_numpy(params: Params) -> None:
    model = ConsynLMHeadModel.from_parameters(CONFIG, params)
    assert model.generate([[3, 4]], np.int64(2)) == model.generate([[3, 4]], 2)


def test_prompts_from_a_generator_are_all_continued() -> None:
    model = ConsynLMHeadModel.from_config(CONFIG, seed=0)
    prompts = [[3, 4], [5], [6, 7, 8]]
    assert model.generate((ids for ids in prompts), 2) == model.generate(prompts, 2)


@pytest.mark.parametrize("count", [0, -1, True])
def test_a_number_of_new_tokens_that_cannot_be_is_refused(count: Any) -> None:
    model = ConsynLMHeadModel.from_config(CONFIG, seed=0)
    with pytest.raises(UserError, match="max_new_tokens must be a whole number from 1, not"):
        model.generate([[3, 4]], count)


@pytest.mark.parametrize("eos", [-1, 10**6, [2, -1], True])
def test_an_end_that_cannot_be_is_refused(eos: Any) -> None:
    model = ConsynLMHeadModel.from_config(CONFIG, seed=0)
    with pytest.raises(UserError, match="eos_token_id must be one or several ids"):
        model.generate([[3, 4]], 1, eos_token_id=eos)
