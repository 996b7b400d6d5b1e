"""The kernels of attention inside documents, interpreted, against the reference."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.model.kernels.document_attention import Tile, Tiles, document_attention
from consyn_jax.model.kernels.reference_attention import attend, attention_mask, documents

pytestmark = pytest.mark.usefixtures("interpreted")

# programs that hold more queries than they read keys at once, and the reverse
WIDE = Tiles(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2))
NARROW = Tiles(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2))

Inputs = tuple[jax.Array, ...]


def rows(num_tokens: int, *lengths: int) -> np.ndarray:
    """Segment ids [2, num_tokens] of documents of these lengths and the rest; row 1 is reversed."""
    ids = np.repeat(np.arange(len(lengths) + 1), [*lengths, num_tokens - sum(lengths)])
    return np.stack([ids, ids[::-1]]).astype(np.int32)


def inputs(T: int, S: int, N: int, K: int, H: int, dtype: Any = jnp.float32) -> Inputs:
    """Queries, keys, values and the gradient of the output."""
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(size=(2, length, heads, H)), dtype)
        for length, heads in ((T, N), (S, K), (S, K), (T, N))
    )


def both(
    given: Inputs, segments: np.ndarray, window: int | None, first: int, tiles: Tiles | None
) -> tuple[Inputs, Inputs]:
    """Output and gradients of q, k and v from the kernels, and from the reference in float32."""
    T, S = given[0].shape[1], given[1].shape[1]
    inside, queries, keys = documents(jnp.asarray(segments)), first + jnp.arange(T), jnp.arange(S)
    first_key, last_query = inside.first_BT[:, first : first + T], inside.last_BT
    mask = attention_mask(queries, keys, first_key, window)
    if window is not None:
        first_key, last_query = (
            jnp.maximum(first_key, queries - window + 1),
            jnp.minimum(last_query, keys + window - 1),
        )

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return document_attention(q, k, v, first_key, last_query, jnp.int32(first), tiles)

    def theirs(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, mask)

    def run(function: Any, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Inputs:
        out, gradients = jax.vjp(function, q, k, v)
        return (out, *gradients(dout))

    exact = (x.astype(jnp.float32) for x in given)
    return jax.jit(partial(run, ours))(*given), jax.jit(partial(run, theirs))(*exact)


def errors(found: Inputs, expected: Inputs) -> list[float]:
    return [
        float(np.linalg.norm(np.asarray(f, np.float32) - e) / np.linalg.norm(e))
        for f, e in zip(found, expected, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "N", "K", "H", "lengths", "window", "tiles"),
    [
        pytest.param(64, 2, 2, 16, (), None, None, id="one document", marks=pytest.mark.slow),
        pytest.param(
            96,
            6,
            2,
            16,
            (33, 16, 1, 16),
            20,
            WIDE,
            id="documents, window, grouped heads, wide tiles",
        ),
        pytest.param(
            61,
            2,
            1,
            24,
            (1, 1, *[2] * 8),
            None,
            NARROW,
            id="short documents, one key head, a length and a width that no tile divides",
        ),
    ],
)
def test_output_and_gradients_equal_the_reference(
    T: int, N: int, K: int, H: int, lengths: Any, window: int | None, tiles: Tiles | None
) -> None:
    found, expected = both(inputs(T, T, N, K, H), rows(T, *lengths), window, 0, tiles)
    assert max(errors(found, expected)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("first", "window", "tiles"), [(0, None, WIDE), (60, 31, NARROW)])
def test_part_of_the_queries_gives_its_part_of_the_gradients(
    first: int, window: int | None, tiles: Tiles | None
) -> None:
    """As on a mesh with a `context` axis: 32 queries and 96 keys."""
    found, expected = both(inputs(32, 96, 4, 2, 16), rows(96, 20, 50), window, first, tiles)
    assert max(errors(found, expected)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 6e-3), (jnp.float16, 8e-4)])
def test_half_precision_rounds_each_intermediate_once(dtype: Any, bound: float) -> None:
    """Weights and gradients of scores are rounded before their products, and results at the end.

    Unit roundoffs are 2^-9 and 2^-12, and three or four of them add up.
    """
    found, expected = both(inputs(64, 64, 4, 2, 32, dtype), rows(64, 5, 30), None, 0, None)
    assert all(x.dtype == dtype for x in found)
    assert max(errors(found, expected)) < bound


def test_keys_that_no_query_sees_are_not_read() -> None:
    """NaN in the keys of one document and the gradients of another does not reach a third one."""
    T, nan = 96, jnp.nan
    q, k, v, dout = inputs(T, T, 4, 2, 16)
    poisoned = q, k.at[:, :32].set(nan), v.at[:, :32].set(nan), dout.at[:, 64:].set(nan)
    segments = np.stack([np.repeat([0, 1, 2], 32)] * 2).astype(np.int32)
    out, dq, dk, dv = both(poisoned, segments, None, 0, None)[0]
    assert jnp.isfinite(out[:, 32:]).all()
    assert not jnp.isfinite(out[:, :32]).any()
    for gradient in (dq, dk, dv):
        assert jnp.isfinite(gradient[:, 32:64]).all()
        assert not jnp.isfinite(gradient[:, 64:]).all()
