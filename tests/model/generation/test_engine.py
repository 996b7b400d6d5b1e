"""Continuous batching: each text as it would be alone, whatever is beside it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.errors import UserError
from consyn_jax.model.generation.decoding import attend_to_cache, decode, prefill
from consyn_jax.model.generation.draws import Sampling
from consyn_jax.model.generation.engine import Engine, Request, bucket
from consyn_jax.model.generation.runtime_weights import Int8Matrix, quantised, runtime_weights
from consyn_jax.model.parameters import layout
from consyn_jax.model_config import ModelConfig, RopeScaling

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    context=64,
    eos_token_id=(5, 11),
)
MIXED = replace(CONFIG, sliding_window=6, window_layers=(True, False), rotary_layers=(True, False))
LONGROPE = replace(
    CONFIG,
    rope_scaling=RopeScaling(
        "longrope",
        factor=4.0,
        original_max_position_embeddings=16,
        short_factor=(1.0, 1.1, 1.2, 1.3),
        long_factor=(1.0, 2.0, 3.0, 4.0),
    ),
)
DRAWN = Sampling(0.9, top_k=20, top_p=0.95, repetition_penalty=1.2, seed=3)
REQUESTS = [
    Request(list(range(1 + number, 1 + number + length)), tokens, number // 2, number % 2)
    for number, (length, tokens) in enumerate(
        [(3, 9), (14, 4), (1, 25), (13, 12), (9, 1), (2, 16), (15, 8)]
    )
]


def params(config: ModelConfig) -> dict:
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32),
        layout(config).shapes,
    )


def engine(config: ModelConfig, slots: int, sampling: Sampling = Sampling()) -> Engine:  # noqa: B008
    return Engine(config, runtime_weights(config, params(config), jnp.float32), slots, sampling)


def texts(made: Engine, requests: list[Request], steps: int = 64) -> list[list[int]]:
    found = [[] for _ in requests]
    for piece in made.run(requests, steps):
        found[piece.request] += piece.tokens
    return found


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        (CONFIG, DRAWN),
        (MIXED, Sampling()),
        pytest.param(LONGROPE, DRAWN, marks=pytest.mark.slow),
    ],
    ids=["plain-drawn", "mixed-greedy", "longrope-drawn"],
)
def test_each_text_is_as_it_is_alone(config: ModelConfig, sampling: Sampling) -> None:
    together = texts(engine(config, 3, sampling), REQUESTS, steps=5)
    one = engine(config, 1, sampling)
    assert together == [texts(one, [request])[0] for request in REQUESTS]
    for text, request in zip(together, REQUESTS, strict=True):
        assert 1 <= len(text) <= request.max_tokens
        assert not {5, 11} & set(text[:-1])
        assert len(text) == request.max_tokens or text[-1] in (5, 11)
    assert len({tuple(text) for text in together}) > 4


def test_nothing_is_compiled_for_a_second_prompt_of_a_bucket() -> None:
    made = engine(CONFIG, 1, DRAWN)
    texts(made, [Request([1, 2, 3], 12)])
    before = prefill._cache_size(), decode._cache_size()
    texts(made, [Request([7, 8, 9, 4, 3, 2, 1], 12, prompt=9, sequence=2)])
    again = engine(CONFIG, 1, replace(DRAWN, seed=8, temperature=0.5, top_p=0.7))
    texts(again, [Request([7, 8], 12)])
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_a_request_can_be_stopped() -> None:
    made, seen = engine(replace(CONFIG, eos_token_id=None), 2), [0, 0, 0]
    for piece in made.run([Request([1], 40), Request([2], 6), Request([3], 6)], steps=2):
        seen[piece.request] += len(piece.tokens)
        if piece.request == 0:
            made.stop(0)
    assert seen[0] <= 3
    assert seen[1:] == [6, 6]


def test_what_does_not_fit_is_refused() -> None:
    made = engine(CONFIG, 1)
    with pytest.raises(UserError, match="Prompt 0 is empty"):
        texts(made, [Request([], 4)])
    with pytest.raises(
        UserError, match=r"60 tokens, and with 5 new tokens it exceeds the model's context of 64"
    ):
        texts(made, [Request([1] * 60, 5)])


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_a_mesh_gives_the_same_texts(int8: bool) -> None:
    config, values = CONFIG, params(CONFIG)
    mesh = build_mesh({"data": 1, "fsdp": 4, "context": 1, "tensor": 2})
    placed = jax.device_put(values, layout(config).shardings(mesh))
    found = []
    for given in (values, placed):
        weights = runtime_weights(config, given, jnp.float32, int8)
        found.append(texts(Engine(config, weights, 4, DRAWN), REQUESTS[:4]))
    assert found[0] == found[1]


def test_int8_is_off_by_half_a_step_and_consumes_what_it_is_given() -> None:
    values = params(CONFIG)
    w = values["layers"]["o"][0]
    rounded = quantised(w, 2)
    step = jnp.max(jnp.abs(w), axis=(0, 1)) / 127
    assert jnp.all(jnp.abs(rounded.values * rounded.scale - w) <= 0.501 * step)
    weights = runtime_weights(CONFIG, values, jnp.bfloat16, int8=True, consume=True)
    assert not values
    assert isinstance(weights["layers"][1]["down"], Int8Matrix)
    assert weights["embedding"].dtype == weights["layers"][0]["mlp_norm"].dtype == jnp.bfloat16


def test_buckets_waste_at_most_half() -> None:
    for tokens in range(17, 300):
        assert tokens <= bucket(tokens, 4096) < 1.5 * tokens


def test_attention_to_the_cache_is_attention_under_a_mask() -> None:
    from consyn_jax.model.kernels.reference_attention import attend

    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((3, 1, 4, 8), (3, 2, 10, 8), (3, 2, 10, 8))
    )
    position = jnp.array([0, 4, 9])
    for window in (None, 3):
        distance = position[:, None] - jnp.arange(10)
        mask = (distance >= 0) & (distance < (window or 99))
        expected = attend(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask[:, None, None])
        found = attend_to_cache(q, k, v, position, window)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
