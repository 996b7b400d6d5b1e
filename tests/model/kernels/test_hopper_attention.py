"""The kernels of attention for Hopper, interpreted, against the reference.

Only on JAX 0.12 and newer, whose interpreter runs them (tests/model/conftest.py).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpreted

from consyn_jax.model.kernels.hopper_attention import hopper_attention
from consyn_jax.model.kernels.reference_attention import attend, attention_mask, documents

Arrays = tuple[jax.Array, ...]
BF16 = 4e-3  # unit roundoff 2^-9: weights, gradients of scores and results are rounded once each


def inputs(T: int, S: int, N: int, K: int, H: int, dtype: Any = jnp.bfloat16) -> Arrays:
    """Queries, keys, values and the gradient of the output, of one row."""
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(size=(1, length, heads, H)), dtype)
        for length, heads in ((T, N), (S, K), (S, K), (T, N))
    )


def both(given: Arrays, lengths: Any, window: int | None, first: int) -> tuple[Arrays, Arrays]:
    """Output and gradients of q, k and v from the kernels, and from the reference in float32."""
    T, S = given[0].shape[1], given[1].shape[1]
    ids = np.repeat(np.arange(len(lengths) + 1), [*lengths, S - sum(lengths)])[None]
    inside, queries, keys = documents(jnp.asarray(ids)), first + jnp.arange(T), jnp.arange(S)
    first_key, last_query = inside.first_BT[:, first : first + T], inside.last_BT
    mask = attention_mask(queries, keys, first_key, window)
    if window is not None:
        first_key = jnp.maximum(first_key, queries - window + 1)
        last_query = jnp.minimum(last_query, keys + window - 1)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return hopper_attention(q, k, v, first_key, last_query, jnp.int32(first))

    def theirs(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, mask)

    def run(function: Any, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Arrays:
        out, gradients = jax.vjp(function, q, k, v)
        return (out, *gradients(dout))

    exact = (x.astype(jnp.float32) for x in given)
    with interpreted():
        found = jax.block_until_ready(jax.jit(partial(run, ours))(*given))
    return found, jax.jit(partial(run, theirs))(*exact)


def errors(found: Arrays, expected: Arrays) -> list[float]:
    return [
        float(np.linalg.norm(np.asarray(f, np.float32) - e) / np.linalg.norm(e))
        for f, e in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize(
    ("T", "N", "K", "H", "lengths", "window"),
    [
        pytest.param(384, 2, 1, 64, (100, 33, 1, 150), None, id="documents, grouped heads"),
        pytest.param(256, 1, 1, 128, (), 70, id="heads of 128, one document, window"),
        pytest.param(
            150, 2, 2, 24, (1, 1, 90), None, id="a length and a width that no tile divides"
        ),
    ],
)
def test_output_and_gradients_equal_the_reference(
    T: int, N: int, K: int, H: int, lengths: Any, window: int | None
) -> None:
    """Also, no copy races with an ordinary read or write."""
    found, expected = both(inputs(T, T, N, K, H), lengths, window, 0)
    assert max(errors(found, expected)) < BF16


@pytest.mark.parametrize("first", [0, 200])
def test_part_of_the_queries_gives_its_part_of_the_gradients(first: int) -> None:
    """As with a `context` axis: some keys come after all queries or before their documents."""
    found, expected = both(inputs(128, 384, 2, 1, 64), (170, 100), 90, first)
    assert max(errors(found, expected)) < BF16


def test_float16_is_rounded_once() -> None:
    found, expected = both(inputs(128, 128, 2, 1, 64, jnp.float16), (50,), None, 0)
    assert all(x.dtype == jnp.float16 for x in found)
    assert max(errors(found, expected)) < BF16 / 7  # unit roundoff 2^-12


def test_blocks_that_no_row_sees_are_not_read() -> None:
    """NaN in the keys of one document and the gradients of another does not reach a third one."""
    q, k, v, dout = inputs(384, 384, 1, 1, 64)
    nan = jnp.nan
    poisoned = q, k.at[:, :128].set(nan), v.at[:, :128].set(nan), dout.at[:, 256:].set(nan)
    out, *gradients = both(poisoned, (128, 128), None, 0)[0]
    assert jnp.isfinite(out[:, 128:]).all()
    assert not jnp.isfinite(out[:, :128]).any()
    for gradient in gradients:
        assert jnp.isfinite(gradient[:, 128:256]).all()
        assert not jnp.isfinite(gradient[:, 256:]).all()
