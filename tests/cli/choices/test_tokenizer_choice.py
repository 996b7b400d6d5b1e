"""What a checkpoint knows about the beginnings and ends of texts, and when it stays."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from consyn_jax.cli.choices.model_choice import ModelChoice
from consyn_jax.cli.choices.tokenizer_choice import choose_tokenizer, tokenizer_notes, with_tokens
from consyn_jax.errors import UserError
from consyn_jax.model.pretrained.config_json import read_config, write_generation_config
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer

GENERATION = '{"eos_token_id": [258, 7],\n "temperature": 0.6}'
HF = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 5,
    "eos_token_id": [258, 9],
    "pad_token_id": None,
}
BYTES = BPETokenizer.bytes()
OTHER = BPETokenizer.train_from_iterator(["words"], 262, special_tokens=["</s>"])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A model's directory, as far as this looks at it."""
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "generation_config.json").write_text(GENERATION)
    return tmp_path


def choice(weights: Path) -> ModelChoice:
    stored = read_config(weights)
    return ModelChoice(stored, stored, weights)


def shape(found: ModelChoice) -> ModelConfig:
    assert found.stored is not None
    return replace(found.stored, bos_token_id=None, eos_token_id=None, generation_config=None)


def test_all_eos_ids_are_read_and_the_generation_config_wins(weights: Path) -> None:
    config = read_config(weights)
    assert config.eos_token_id == (258, 9)
    assert config.eos_token_ids == (258, 7)
    assert read_config(weights / "config.json").generation_config is None


@pytest.mark.parametrize("has_own", [True, False])
def test_ids_and_generation_config_stay(has_own: bool, weights: Path, tmp_path: Path) -> None:
    if has_own:
        OTHER.save(weights)  # its EOS, 0, is in neither list
    found = choice(weights)
    tokenizer = OTHER if has_own else BYTES
    made = with_tokens(shape(found), found, tokenizer)
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (5, (258, 9), None)
    write_generation_config(tmp_path, made)
    assert (tmp_path / "generation_config.json").read_text() == GENERATION
    notes = dict(tokenizer_notes(found, tokenizer))
    assert "documents begin with" in notes["tokenizer"]
    assert ("end of text" in notes) == has_own
    if has_own:
        assert notes["end of text"] == (
            "the checkpoint ends texts with 258 or 7, not with 0; its config.json and "
            "generation_config.json are not changed"
        )


def test_another_vocabulary_brings_its_own_ids(weights: Path) -> None:
    found = choice(weights)
    made = with_tokens(shape(found), found, OTHER)
    assert (made.bos_token_id, made.eos_token_id, made.generation_config) == (0, 0, None)
    assert "get the tokenizer's id" in dict(tokenizer_notes(found, OTHER))["end of text"]


def test_a_model_never_meets_the_bundled_vocabulary_unasked(weights: Path) -> None:
    config, _ = resolve({"checkpoint": str(weights)})
    with pytest.raises(UserError, match=r"has no tokenizer \(its files: config\.json, generation"):
        choose_tokenizer(config, choice(weights), is_store=False)
    assert choose_tokenizer(config, choice(weights), is_store=True) is None
    config, _ = resolve({"checkpoint": str(weights), "tokenizer": "bytes"})
    asked = choose_tokenizer(config, choice(weights), is_store=False)
    assert isinstance(asked, BPETokenizer)
    assert asked.sha256 == BYTES.sha256
