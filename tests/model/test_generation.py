from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.config import ModelConfig, UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.generation import choose
from consyn_jax.model.parameters import Params, layout

CONFIG = ModelConfig(vocab_size=50, hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, context=32, tie_embeddings=False)
PROMPT = jnp.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
NEW = 12


@pytest.fixture(scope="module")
def params() -> Params:
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), layout(CONFIG).shapes)


@pytest.fixture(scope="module")
def greedy(params: Params) -> np.ndarray:
    return np.asarray(ConsynLMHeadModel.from_parameters(CONFIG, params).generate(PROMPT, NEW))


@pytest.mark.parametrize("window", [None, 3])
def test_the_cache_gives_what_the_whole_sequence_gives(params: Params, window: int | None) -> None:
    config = replace(CONFIG, sliding_window=window)
    model = ConsynLMHeadModel.from_parameters(config, params)
    forward = jax.jit(lambda p, ids: ConsynLMHeadModel.from_parameters(config, p)(ids))
    ids = np.zeros((2, 5 + NEW), np.int32)  # what stands after a position does not count, so one shape does
    ids[:, :5] = PROMPT
    for t in range(5, 5 + NEW):
        ids[:, t] = np.argmax(forward(params, jnp.asarray(ids))[:, t - 1], axis=-1)
    np.testing.assert_array_equal(model.generate(PROMPT, NEW), ids)
    assert len(np.unique(ids[:, 5:])) > 3, "more than one token over and over"


def test_a_row_ends_at_eos_and_the_text_when_all_rows_have(params: Params, greedy: np.ndarray) -> None:
    first, second = greedy[:, 5:]
    eos = next(int(token) for token in first[1:] if token not in second)
    at = list(first).index(eos)
    model = ConsynLMHeadModel.from_parameters(replace(CONFIG, eos_token_id=eos), params)
    both = np.asarray(model.generate(PROMPT, NEW))
    np.testing.assert_array_equal(both[1], greedy[1])
    np.testing.assert_array_equal(both[0, 5:], [*first[: at + 1], *[eos] * (NEW - at - 1)])
    np.testing.assert_array_equal(model.generate(jnp.tile(PROMPT[:1], (2, 1)), NEW), greedy[[0, 0], : 5 + at + 1])
    np.testing.assert_array_equal(model.generate(PROMPT, NEW, stop_at_eos=False), greedy)


def test_a_seed_fixes_what_is_drawn(params: Params, greedy: np.ndarray) -> None:
    model = ConsynLMHeadModel.from_parameters(CONFIG, params)
    one, again, other = (np.asarray(model.generate(PROMPT, NEW, temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert max(one.max(), other.max()) < 50
    np.testing.assert_array_equal(model.generate(PROMPT, NEW, temperature=1.0, top_k=1), greedy)


def draw(top_k: int | None, top_p: float | None, temperature: float = 1.0) -> np.ndarray:
    """Frequencies of the four tokens of probabilities .1 .5 .15 .25 among 4,000 draws."""
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    tokens = jax.vmap(lambda key: choose(logits, key, temperature, top_k, top_p)[0])(jax.random.split(jax.random.key(0), 4000))
    return np.bincount(tokens, minlength=4) / 4000


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (None, None, [0.1, 0.5, 0.15, 0.25]),
        (2, None, [0, 2 / 3, 0, 1 / 3]),
        (4, None, [0.1, 0.5, 0.15, 0.25]),
        (None, 0.7, [0, 2 / 3, 0, 1 / 3]),  # .5 alone does not hold .7, .5 and .25 do
        (None, 0.8, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        (None, 0.01, [0, 1, 0, 0]),
        (3, 0.7, [0, 2 / 3, 0, 1 / 3]),
    ],
)
def test_draws_come_from_the_likeliest(top_k: int | None, top_p: float | None, expected: list[float]) -> None:
    found = draw(top_k, top_p)
    np.testing.assert_allclose(found, expected, atol=0.03)
    np.testing.assert_array_equal(found > 0, np.array(expected) > 0)


def test_temperature_sharpens() -> None:
    sharp = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose(draw(None, None, temperature=0.5), sharp / sharp.sum(), atol=0.03)


def test_what_does_not_fit_is_refused_in_words(params: Params) -> None:
    model = ConsynLMHeadModel.from_parameters(CONFIG, params)
    with pytest.raises(UserError, match="prompt is empty"):
        model.generate(jnp.zeros((1, 0), jnp.int32), 4)
    with pytest.raises(UserError, match=r"A prompt of 5 and 28 new tokens are above the model's context of 32\. Ask for 27 at most\."):
        model.generate(PROMPT, 28)
