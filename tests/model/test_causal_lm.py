from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.given_values import (
    check_tokenizer,
    checked_compute,
    checked_config,
    checked_seed,
)
from consyn_jax.model.parameters import layout
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer

TINY = ModelConfig(
    vocab_size=100,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
    tie_embeddings=False,
)


def test_logits_are_float32_over_the_vocabulary_without_its_padding() -> None:
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), layout(TINY).shapes)
    model = ConsynLMHeadModel.from_parameters(TINY, params | {"output": jnp.zeros((128, 32))})
    ids = jnp.arange(8).reshape(2, 4)
    logits = model(ids)
    assert logits.shape == (2, 4, 100)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(
        logits, np.zeros((2, 4, 100)), "a head of zeros, as in an untrained model, is uniform"
    )


@pytest.mark.parametrize(
    ("ids", "segments", "message"),
    [
        ([[1, -1]], None, r"input, row 0, has token id -1 in input_ids at position 1"),
        (np.array([[1, 2], [-100, 2]]), None, r"row 1, has -100 in input_ids at position 0"),
        (jnp.array([[1, 100]]), None, r"token id 100 .* ends at 99\. Use the tokenizer"),
        (np.array([[1, 2**40]]), None, r"token id 1,099,511,627,776 in input_ids"),
        ([[1.0, 2.0]], None, r"1\.0 in input_ids .* int32"),
        (jnp.ones((1, 2)), None, r"1\.0 in input_ids .* int32"),
        ([1, 2], None, r"have shape \(2,\)\. Pass \[ids\]"),
        (np.ones((1, 1, 1), int), None, r"have shape \(1, 1, 1\)\. Give \[rows, tokens\]"),
        ([[1, 2], [3]], None, r"rows of unequal length\. Pad them"),
        ({"input_ids": [[1]]}, None, r"takes ids, not a dict"),
        ([[1, 2]], [[1]], r"segment_ids of shape \(1,\) for 2 input_ids\. Number the docu"),
        ([[1, 2]], [1, 1], r"segment_ids have shape \(2,\)\. Pass \[ids\]"),
        ([[1, 2]], [[1, -1]], r"has -1 in segment_ids at position 1"),
        ([[1], [2]], [[1]], r"1 rows of segment_ids for 2 rows"),
    ],
)
def test_ids_that_cannot_be_are_answered_with_their_place(
    ids: object, segments: object, message: str
) -> None:
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), layout(TINY).shapes)
    model = ConsynLMHeadModel.from_parameters(TINY, params)
    with pytest.raises(UserError, match=message):
        model(ids, segments)


def test_lists_and_arrays_of_any_library_are_ids() -> None:
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), layout(TINY).shapes)
    model = ConsynLMHeadModel.from_parameters(TINY, params)
    wanted = model(jnp.arange(8).reshape(2, 4))
    for ids in (np.arange(8).reshape(2, 4), [[0, 1, 2, 3], [4, 5, 6, 7]]):
        np.testing.assert_array_equal(model(ids), wanted)


def test_a_preset_without_weights_warns_and_is_initialised() -> None:
    with pytest.warns(UserWarning, match="NO PRETRAINED WEIGHTS: 'haiku'"):
        model = ConsynLMHeadModel.from_pretrained("haiku", seed=3)
    assert (model.config.hidden_dim, model.config.num_layers, model.config.vocab_size) == (
        128,
        4,
        49_152,
    )
    assert float(jnp.std(model.parameters["embedding"])) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("name", ["haikuu", "no/such/place", "."])
def test_an_unknown_model_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not a model"):
        ConsynLMHeadModel.from_pretrained(name)


@pytest.mark.parametrize(
    ("check", "given", "message"),
    [
        (
            checked_config,
            {"vocab_size": 9},
            r"^from_config takes a ModelConfig .* not a dict\. For",
        ),
        (checked_config, None, r"not a NoneType\. For a Hugging Face model, use from_pretrained"),
        (checked_seed, "a", r"^seed must be a whole number from 0 to 4294967295, not 'a'\.$"),
        (checked_seed, -1, r"^seed must be a whole number from 0 to 4294967295, not -1\.$"),
        (checked_seed, 1.5, r"^seed must be a whole number .* not 1\.5\.$"),
        (checked_compute, "bfloat16", r"^compute is a str, .* Pass model\.default_compute"),
        (partial(check_tokenizer, vocab_size=9), "a", r"^tokenizer is a str, not a BPETokenizer\."),
        (partial(check_tokenizer, vocab_size=9), BPETokenizer.bytes(), r"^The tokenizer has 259 "),
    ],
)
def test_values_that_cannot_be_are_answered_with_a_remedy(
    check: Callable[[Any], object], given: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(given)


def test_a_model_is_not_saved_in_a_file_or_with_a_larger_tokenizer(tmp_path: Path) -> None:
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), layout(TINY).shapes)
    model = ConsynLMHeadModel.from_parameters(TINY, params)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file, so a model cannot be saved in it\. Give"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match="more than the model's vocabulary of 100"):
        model.save_pretrained(tmp_path / "new", BPETokenizer.bytes())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"hidden_dim": True}, r"^--hidden_dim must be a whole number, not True\."),
        ({"rope_theta": float("nan")}, r"^--rope_theta must be greater than 0, not nan\."),
        ({"norm_eps": float("inf")}, r"^--norm_eps must be at least 0, not inf\."),
    ],
)
def test_an_architecture_of_other_than_numbers_is_refused(
    field: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, **field)
