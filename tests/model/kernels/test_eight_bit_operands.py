"""The kernels that write 8-bit operands, interpreted, against their references."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.fp8.operands import (
    norm_gradients,
    norm_in_8_bits,
    rotation_gradients_in_8_bits,
    swiglu_gradients_in_8_bits,
    swiglu_in_8_bits,
)
from consyn_jax.model.fp8.quantisation import FORWARD, GRADIENT, Quantised, quantise
from consyn_jax.model.fp8.slots import slot_for
from consyn_jax.model.kernels.document_attention import document_attention
from consyn_jax.model.kernels.eight_bit.eight_bit_attention import eight_bit_attention
from consyn_jax.model.kernels.eight_bit.eight_bit_norm import eight_bit_norm
from consyn_jax.model.kernels.eight_bit.eight_bit_norm_gradients import eight_bit_norm_gradients
from consyn_jax.model.kernels.eight_bit.eight_bit_norm_rope import eight_bit_rotation_gradients
from consyn_jax.model.kernels.eight_bit.eight_bit_swiglu import (
    eight_bit_swiglu,
    eight_bit_swiglu_gradients,
)
from consyn_jax.model.kernels.reference_attention import documents
from consyn_jax.model.rope import rope_table

pytestmark = pytest.mark.usefixtures("interpreted")

EPS = 1e-5


def numbers(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def check_equal(found: Any, expected: Any) -> None:
    """Equal but for the rounding of float32: a few elements are the next 8-bit number.

    The compiler options of tests let CPUs approximate an inverse square root to 2^-12.
    """
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        got, want = (np.asarray(a, np.float32).ravel() for a in (got, want))
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        got, want = np.nan_to_num(got), np.nan_to_num(want)
        assert np.mean(got != want) <= (0.01 if got.size > 1 else 1)
        np.testing.assert_allclose(got, want, rtol=0.25 if got.size > 1 else 2**-12, atol=1e-6)


# Dimensions that fill tiles, and others; scales that hold all values, and that clip some.
SHAPES = [(2, 32, 256), (3, 7, 80), (1, 33, 320)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [2.0**-5, 2.0**-9])
@pytest.mark.parametrize("is_added", [False, True])
def test_the_norm(shape: tuple[int, int, int], scale: float, is_added: bool) -> None:
    x, added = numbers(0, *shape), numbers(1, *shape) if is_added else None
    given = x, numbers(2, shape[-1], dtype=jnp.float32), EPS, jnp.float32(scale), added
    found, expected = eight_bit_norm(*given), norm_in_8_bits(*given)
    check_equal(found, expected)
    top = np.abs(np.asarray(found[1].values, np.float32)).max()
    assert (top == 448) == (scale == 2.0**-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [2.0**-12, 2.0**-15])
@pytest.mark.parametrize("uses", [1, 3])
def test_the_gradients_of_the_norm(uses: int, shape: tuple[int, int, int], scale: float) -> None:
    x, dx, *dnormed = (numbers(i, *shape) for i in range(2 + uses))
    slot = slot_for(x, jnp.float32(scale))
    given = x, numbers(9, shape[-1], dtype=jnp.float32), EPS, dx, tuple(dnormed), slot
    found, expected = eight_bit_norm_gradients(*given), norm_gradients(*given)
    for got, want in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=0.01, atol=1e-4
        )
    check_equal(found[2], expected[2])
    # The 8-bit gradient is that of the rounded one, bit for bit.
    values, largest = quantise(found[0], GRADIENT, slot.scale)
    for got, want in zip(found[2][:3], (*values[:2], largest), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    top = np.abs(np.asarray(found[2].values, np.float32)).max()
    assert (top == 57344) == (float(largest) / scale >= 57344)


# Rows, tokens, heads and their width: whole tiles of tokens, and others.
HEADS = [(2, 32, 3, 64), (3, 7, 2, 16), (1, 33, 1, 128)]


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("scale", [2.0**-9, 2.0**-16])
def test_the_gradients_of_queries_and_keys(shape: tuple[int, int, int, int], scale: float) -> None:
    given = rotation(*shape)
    found, expected = (
        jax.jit(f, static_argnums=(3, 4))(*given, jnp.float32(scale))
        for f in (eight_bit_rotation_gradients, rotation_gradients_in_8_bits)
    )
    check_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=2**-10, atol=1e-4)
    top = np.abs(np.asarray(found[0][0].values, np.float32)).max()
    assert (top == 57344) == (scale == 2.0**-16)


def rotation(B: int, T: int, N: int, H: int) -> tuple[Any, ...]:
    positions = jnp.asarray(np.random.default_rng(3).integers(0, 64, (B, T)), jnp.int32)
    scale_H = 1 + numbers(1, H, dtype=jnp.float32) / 8
    heads, gradient = numbers(0, B, T, N, H), numbers(2, B, T, N, H)
    return heads, scale_H, rope_table(positions, 64, H, 1e4), EPS, "heads", gradient


# Tokens, heads, key heads and their width: whole tiles, and others.
ATTENTION = [(64, 4, 2, 32), (45, 2, 1, 24)]


@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize(("scale", "dscale"), [(2.0**-4, 2.0**-8), (2.0**-9, 2.0**-16)])
def test_attention(shape: tuple[int, int, int, int], scale: float, dscale: float) -> None:
    """All results are those of 16 bits, cast afterwards, bit for bit."""
    given = attention_of(2, *shape)
    out, written, slot = jax.jit(in_8_bits)(*given, jnp.float32(scale), jnp.float32(dscale))
    exact, dq, dk, dv = jax.jit(in_16_bits)(*given)
    for got, want in zip(out, (exact, dq, dk, dv), strict=True):
        np.testing.assert_array_equal(got, want)
    out8, largest = quantise(exact.reshape(2, shape[0], -1), FORWARD, jnp.float32(scale))
    dv8, dlargest = quantise(dv.reshape(2, shape[0], -1), GRADIENT, jnp.float32(dscale))
    for got, want in ((written[0], out8.values), (written[1], out8.transposed)):
        np.testing.assert_array_equal(got, want)
    for got, want in ((slot.values, dv8.values), (slot.transposed, dv8.transposed)):
        np.testing.assert_array_equal(got, want)
    assert (written[2].shape, slot.largest.shape) == ((2, shape[1]), (2, shape[2]))
    assert (np.max(written[2]), np.max(slot.largest)) == (largest, dlargest)
    assert (np.abs(np.asarray(out8.values, np.float32)).max() == 448) == (scale == 2.0**-9)


def attention_of(B: int, T: int, N: int, K: int, H: int) -> tuple[Any, ...]:
    """Queries, keys, values and the gradient of the output, for two documents a row."""
    heads = [numbers(i, B, T, n, H) for i, n in enumerate((N, K, K, N))]
    segments = jnp.asarray(np.repeat([[0, 1]], [T // 3, T - T // 3], axis=1), jnp.int32)
    return *heads, documents(jnp.broadcast_to(segments, (B, T)))


def in_16_bits(q: Any, k: Any, v: Any, dout: Any, inside: Any) -> Any:
    out, pull = jax.vjp(lambda *heads: document_attention(*heads, *inside), q, k, v)
    return out, *pull(dout)


def in_8_bits(q: Any, k: Any, v: Any, dout: Any, inside: Any, scale: Any, dscale: Any) -> Any:
    """Output and gradients, the output in 8 bits, and the slot with the gradient of the values."""
    slot = slot_for(v.reshape(*v.shape[:2], -1), dscale)
    slot = slot._replace(largest=jnp.zeros((v.shape[0], v.shape[2])))
    (out, written), pull = jax.vjp(
        lambda q, k, v, slot: eight_bit_attention(q, k, v, *inside, scale, slot), q, k, v, slot
    )
    *gradients, slot = pull((dout, jax.tree.map(jnp.zeros_like, written)))
    return (out, *gradients), written, slot


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [2.0**-4, 2.0**-8])
def test_swiglu(shape: tuple[int, int, int], scale: float) -> None:
    given = numbers(0, *shape), 3 * numbers(1, *shape), jnp.float32(scale)
    check_equal(eight_bit_swiglu(*given), swiglu_in_8_bits(*given))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [2.0**-9, 2.0**-16])
def test_the_gradients_of_swiglu(shape: tuple[int, int, int], scale: float) -> None:
    arrays = (numbers(i, *shape) for i in range(3))
    given = *arrays, (jnp.float32(scale), jnp.float32(2 * scale))
    check_equal(eight_bit_swiglu_gradients(*given), swiglu_gradients_in_8_bits(*given))


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_nonfinite_values_are_not_hidden(wrong: float) -> None:
    gate, up, dhidden = (numbers(i, 1, 4, 64).at[0, 1, 2].set(wrong) for i in range(3))
    one = jnp.float32(1)
    _, normed, _ = eight_bit_norm(gate, jnp.ones(64), EPS, one)
    hidden, _ = eight_bit_swiglu(gate, up, one)
    (dgate, _), (dup, _) = eight_bit_swiglu_gradients(gate, up, dhidden, (one, one))
    slot = slot_for(gate, one)
    _, _, dx = eight_bit_norm_gradients(gate, jnp.ones(64), EPS, up, (dhidden,), slot)
    q, *others, dout = rotation(1, 4, 2, 32)
    dout = dout.at[0, 1, 0, 2].set(wrong)
    (dq, _), _ = eight_bit_rotation_gradients(q, *others, dout, one)
    *heads, dattended, inside = attention_of(1, 32, 1, 1, 64)
    heads[2] = heads[2].at[0, 1, 0, 2].set(wrong)
    _, attended, dv = in_8_bits(*heads, dattended.at[0, 1, 0, 2].set(wrong), inside, one, one)
    attended = Quantised(attended[0], attended[1], one)
    for written in (normed, hidden, dgate, dup, dx, dq, attended, dv):
        assert np.isnan(np.asarray(written.values, np.float32)[0, 1, 2])
        assert np.isnan(np.asarray(written.transposed, np.float32)[2, 0, 1])


def test_values_whose_quotient_overflows_are_clipped() -> None:
    gate, up = jnp.full((1, 4, 64), 1e15), jnp.full((1, 4, 64), -3e18)
    given = gate, up, jnp.float32(2.0**-60)
    found = eight_bit_swiglu(*given)
    check_equal(found, swiglu_in_8_bits(*given))
    assert np.all(np.asarray(found[0].values, np.float32) == -448)


@pytest.mark.slow
def test_on_eight_devices_both_layouts_and_maxima_are_those_of_whole_arrays() -> None:
    mesh = build_mesh(dict.fromkeys(AXES, 1) | {"data": 2, "context": 2, "tensor": 2})
    one = jnp.float32(2.0**-7)

    def all_kernels(x: Any, gate: Any, up: Any, dhidden: Any, q: Any, cos: Any, sin: Any) -> Any:
        turned = q, 1 + jnp.arange(32) / 32, (cos, sin), EPS, "heads", jnp.sin(q)
        dx, dnorm, slot = eight_bit_norm_gradients(
            x, jnp.ones(64), EPS, x, (x, x), slot_for(x, one)
        )
        dq, dq_norm = eight_bit_rotation_gradients(*turned, one)
        written = (
            eight_bit_norm(x, jnp.ones(64), EPS, one, x),
            (dx, slot),
            eight_bit_swiglu(gate, up, one),
            eight_bit_swiglu_gradients(gate, up, dhidden, (one, one)),
            dq,
        )
        return written, (dnorm, dq_norm)

    q, _, rope, *_ = rotation(4, 8, 2, 32)
    arrays = [*(numbers(i, 4, 8, 64) for i in range(4)), q, *rope]
    alone = all_kernels(*arrays)
    tokens = "batch", "sequence"
    axes = [(*tokens, None), *[(*tokens, "mlp")] * 3, (*tokens, "heads", None)]
    axes += [(*tokens, None, None)] * 2
    placed = [
        jax.device_put(value, sharding(mesh, names))
        for value, names in zip(arrays, axes, strict=True)
    ]
    with jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(all_kernels)(*placed))
    check_equal(found[0], jax.device_get(alone[0]))
    for got, want in zip(found[1], alone[1], strict=True):  # sums over tokens, in another order
        np.testing.assert_allclose(got, want, rtol=1e-5)
