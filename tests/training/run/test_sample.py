"""The sample that a run shows: a document that its model generates from the first token on."""

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import layout
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.run import ending

generated = ending.sample  # tests replace it in the runs that they start
TOKENIZER = BPETokenizer.bytes()
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=32,
    context=24,
    tie_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
)
RNG = np.random.default_rng(1)
PARAMS = jax.tree.map(
    lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), layout(CONFIG).shapes
)


def continued(first: int, count: int, seed: int) -> str:
    """What the model itself generates after one token, as the documents of a run begin."""
    model = ConsynLMHeadModel.from_parameters(CONFIG, PARAMS)
    ids = model.generate([[first]], count, temperature=0.8, top_k=50, seed=seed)
    return TOKENIZER.decode([int(i) for i in np.asarray(ids)[0]])


@pytest.mark.parametrize(
    ("of_tokenizer", "of_model", "first"), [(257, 65, 257), (None, 65, 65), (None, None, 258)]
)
def test_it_begins_as_documents_do(
    of_tokenizer: int | None, of_model: int | None, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With BOS, or after the end of another document where there is none."""
    monkeypatch.setattr(ending, "SAMPLE_TOKENS", 9)
    config = replace(CONFIG, bos_token_id=of_model)
    tokenizer: Any = Mock(TOKENIZER, first_id=of_tokenizer, eos_token_id=258)
    tokenizer.decode = TOKENIZER.decode
    texts = [generated(config, PARAMS, tokenizer, seed) for seed in (1, 2)]
    assert texts == [continued(first, 9, seed) for seed in (1, 2)]
    assert texts[0] != texts[1]


def test_it_is_no_longer_than_the_context() -> None:
    assert generated(CONFIG, PARAMS, TOKENIZER, 1) == continued(257, 23, 1)
