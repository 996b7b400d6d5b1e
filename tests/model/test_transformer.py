import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig

T = 16
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
    tie_embeddings=False,
)
WINDOWED = ModelConfig(**{**vars(CONFIG), "sliding_window": 3})
SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 8 + [0] * 2], np.int32)


@pytest.fixture(scope="module")
def params() -> Params:
    """Random parameters, so that every path carries a signal."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32),
        layout(CONFIG).shapes,
    )


def logits(
    config: ModelConfig,
    params: Params,
    ids: np.ndarray,
    segments: np.ndarray | None,
    compute: Compute | None = None,
) -> Float[Array, "B T V"]:
    at = None if segments is None else jnp.asarray(segments)
    return jax.jit(lambda p, ids: ConsynLMHeadModel.from_parameters(config, p)(ids, at, compute))(
        params, ids
    )


def log_probs(params: Params, ids: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits(CONFIG, params, ids, segments)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "segments"),
    [(CONFIG, None), (CONFIG, SEGMENTS), (WINDOWED, SEGMENTS)],
    ids=["one document", "packed", "window"],
)
def test_a_token_influences_exactly_the_positions_that_see_it(
    config: ModelConfig, segments: np.ndarray | None, params: Params
) -> None:
    """Check the gradient of the logits at t with respect to the input at s.

    Every position has its own row of the embedding.
    """
    ids = jnp.arange(T)[None] + 7
    at = None if segments is None else jnp.asarray(segments)
    mix = np.random.default_rng(1).normal(size=config.vocab_size).astype(np.float32)

    def mixed(embedding: jax.Array) -> jax.Array:
        return (
            ConsynLMHeadModel.from_parameters(config, {**params, "embedding": embedding})(ids, at)[
                0
            ]
            @ mix
        )

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


def test_packed_documents_give_the_same_as_each_alone(params: Params) -> None:
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 64, n).astype(np.int32) for n in (9, 1, 22)]
    packed = np.concatenate(documents)[None]
    segments = np.repeat([1, 2, 3], [9, 1, 22]).astype(np.int32)[None]
    together = log_probs(params, packed, segments)[0]
    position = 0
    for document in documents:
        alone = log_probs(params, np.pad(document, (0, 32 - len(document)))[None])[
            0, : len(document)
        ]
        np.testing.assert_allclose(together[position : position + len(document)], alone, atol=1e-5)
        position += len(document)


def test_bf16_is_close_to_float32(params: Params) -> None:
    ids = np.random.default_rng(4).integers(0, 64, (2, T)).astype(np.int32)
    exact = logits(CONFIG, params, ids, None)
    rough = logits(CONFIG, params, ids, None, Compute(jnp.bfloat16))
    assert rough.dtype == jnp.float32
    assert 0 < np.linalg.norm(rough - exact) < 0.03 * np.linalg.norm(exact)
