import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Array, Float
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from consyn_jax.config import ModelConfig
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model.transformer import Compute, apply_rope, rms_norm, rope_table

T = 16
CONFIG = ModelConfig(vocab_size=64, hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, context=64, tie_embeddings=False)
WINDOWED = ModelConfig(**{**vars(CONFIG), "sliding_window": 3})
SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 8 + [0] * 2], np.int32)


@pytest.fixture(scope="module")
def params() -> Params:
    """Random everywhere, so that every path carries a signal."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), layout(CONFIG).shapes)


def logits(config: ModelConfig, params: Params, ids: np.ndarray, segments: np.ndarray | None, compute: Compute | None = None) -> Float[Array, "B T V"]:
    at = None if segments is None else jnp.asarray(segments)
    return jax.jit(lambda p, ids: ConsynLMHeadModel.from_parameters(config, p)(ids, at, compute))(params, ids)


def log_probs(params: Params, ids: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits(CONFIG, params, ids, segments)))


@pytest.mark.parametrize(("config", "segments"), [(CONFIG, None), (CONFIG, SEGMENTS), (WINDOWED, SEGMENTS)], ids=["one document", "packed", "window"])
def test_a_token_has_influence_exactly_where_it_may(config: ModelConfig, segments: np.ndarray | None, params: Params) -> None:
    """The gradient of the logits at t with respect to the input at s; every position has its own row of the embedding."""
    ids = jnp.arange(T)[None] + 7
    at = None if segments is None else jnp.asarray(segments)
    mix = np.random.default_rng(1).normal(size=config.vocab_size).astype(np.float32)

    def mixed(embedding: jax.Array) -> jax.Array:
        return ConsynLMHeadModel.from_parameters(config, {**params, "embedding": embedding})(ids, at)[0] @ mix

    influence_TSD = jax.jit(jax.jacrev(mixed))(params["embedding"])[:, ids[0]]
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    allowed = s <= t
    if segments is not None:
        allowed &= segments[0][:, None] == segments[0][None]
    if config.sliding_window is not None:
        allowed &= t - s < 1 + config.num_layers * (config.sliding_window - 1)
    np.testing.assert_array_equal(np.abs(influence_TSD).max(-1) > 0, allowed)


def test_other_tokens_do_not_change_a_single_bit(params: Params) -> None:
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 64, (1, T)).astype(np.int32)
    other = ids.copy()
    other[0, 5:] = rng.integers(0, 64, T - 5)
    np.testing.assert_array_equal(log_probs(params, ids)[:, :5], log_probs(params, other)[:, :5])


def test_packed_documents_have_the_loss_of_each_alone(params: Params) -> None:
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 64, n).astype(np.int32) for n in (9, 1, 22)]
    packed = np.concatenate(documents)[None]
    segments = np.repeat([1, 2, 3], [9, 1, 22]).astype(np.int32)[None]
    together = log_probs(params, packed, segments)[0]
    position = 0
    for document in documents:
        alone = log_probs(params, np.pad(document, (0, 32 - len(document)))[None])[0, : len(document)]
        np.testing.assert_allclose(together[position : position + len(document)], alone, atol=1e-5)
        position += len(document)


def test_bf16_is_close_to_float32(params: Params) -> None:
    ids = np.random.default_rng(4).integers(0, 64, (2, T)).astype(np.int32)
    exact = logits(CONFIG, params, ids, None)
    rough = logits(CONFIG, params, ids, None, Compute(jnp.bfloat16))
    assert rough.dtype == jnp.float32
    assert 0 < np.linalg.norm(rough - exact) < 0.03 * np.linalg.norm(exact)


@pytest.mark.users_compiler
def test_rms_norm_is_torchs() -> None:
    rng = np.random.default_rng(5)
    x, scale = rng.normal(size=(3, 7, 32)).astype(np.float32), rng.normal(size=32).astype(np.float32)
    theirs = torch.nn.functional.rms_norm(torch.tensor(x), (32,), torch.tensor(scale), eps=1e-5)
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), theirs, atol=1e-6)


@pytest.mark.users_compiler
def test_rotation_is_transformers() -> None:
    x = np.random.default_rng(6).normal(size=(1, T, 2, 8)).astype(np.float32)
    positions = np.arange(T)[None] + 100
    angles = positions[..., None] * 500.0 ** (-np.arange(0, 8, 2) / 8)
    cos, sin = (torch.tensor(np.concatenate([f(angles)] * 2, -1), dtype=torch.float32) for f in (np.cos, np.sin))
    theirs, _ = apply_rotary_pos_emb(torch.tensor(x).transpose(1, 2), torch.tensor(x).transpose(1, 2), cos, sin)
    ours = apply_rope(jnp.asarray(x), rope_table(jnp.asarray(positions), 100 + T, 8, 500.0))
    np.testing.assert_allclose(ours, theirs.transpose(1, 2), atol=2e-5)
