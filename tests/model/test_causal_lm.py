from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.config import ModelConfig, UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import layout

TINY = ModelConfig(vocab_size=100, hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, context=64, tie_embeddings=False)


def test_logits_are_float32_over_the_vocabulary_without_its_padding() -> None:
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), layout(TINY).shapes)
    model = ConsynLMHeadModel.from_parameters(TINY, params | {"output": jnp.zeros((128, 32))})
    ids = jnp.arange(8).reshape(2, 4)
    logits = model(ids)
    assert logits.shape == (2, 4, 100)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, np.zeros((2, 4, 100)), "a head of zeros, as an untrained one, is uniform")


def test_a_preset_without_weights_warns_and_comes_initialised() -> None:
    with pytest.warns(UserWarning, match="NO PRETRAINED WEIGHTS: 'haiku'"):
        model = ConsynLMHeadModel.from_pretrained("haiku", seed=3)
    assert (model.config.hidden_dim, model.config.num_layers, model.config.vocab_size) == (128, 4, 49_152)
    assert float(jnp.std(model.parameters["embedding"])) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("name", ["haikuu", "no/such/place", "."])
def test_what_is_no_model_is_refused_in_words(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not a model"):
        ConsynLMHeadModel.from_pretrained(name)
