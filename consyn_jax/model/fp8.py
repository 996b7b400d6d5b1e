"""Matrix products in 8-bit floats, with one scale per array.

The forward pass uses e4m3, and gradients use e5m2 (Micikevicius et al., 2022).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
SMALLEST_EXPONENT = -60  # of a scale; the product of two scales then fits float32


class Quantised(NamedTuple):
    """An array in 8-bit floats; its elements are `values` times `scale`."""

    values: jax.Array
    scale: Float[Array, ""]


def scale_of(x: Float[Array, "..."], dtype: Any) -> Float[Array, ""]:
    """The smallest power of two by which to divide `x`, so that it fits the range of `dtype`.

    Division by a power of two does not round. So quantising an array a second time, or after a
    lossless cast, gives the same values. The scale is NaN if `x` is not finite, because some
    devices would round infinity to the largest finite number.
    """
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    digits, exponent = jnp.frexp(largest)
    most_digits, most_exponent = jnp.frexp(jnp.float32(jnp.finfo(dtype).max))
    exponent = jnp.maximum(exponent - most_exponent + (digits > most_digits), SMALLEST_EXPONENT)
    return jnp.where(jnp.isfinite(largest), jnp.ldexp(jnp.float32(1), exponent), jnp.nan)


def quantise(
    x: Float[Array, "*shape"], dtype: Any, scale: Float[Array, ""] | None = None
) -> Quantised:
    """Divide `x` by `scale` and round to nearest in `dtype`.

    By default, the scale is `scale_of(x, dtype)`, computed from the global array.
    """
    scale = scale_of(x, dtype) if scale is None else scale
    return Quantised((x.astype(jnp.float32) * (1 / scale)).astype(dtype), scale)


def _product(
    a: Quantised, b: Quantised, axes: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any
) -> jax.Array:
    """Multiply the 8-bit values, then apply both scales, so that XLA always uses 8-bit kernels."""
    product = jax.lax.dot_general(
        a.values, b.values, (axes, ((), ())), preferred_element_type=dtype
    )
    return product * (a.scale * b.scale).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def fp8_linear(
    x: Float[Array, "*B D"], w: Float[Array, "..."], recast: bool = False
) -> Float[Array, "*B F"]:
    """`linear` in 8-bit floats: `x` and `w` in e4m3, the gradient of the output in e5m2.

    Each of these arrays is quantised once. `x` is saved in 8 bits for the backward pass.
    """
    return _forward(x, w, recast)[0]


def _forward(x: jax.Array, w: jax.Array, recast: bool) -> Any:
    matrix = w.reshape(x.shape[-1], -1)
    x8, w8 = quantise(x, FORWARD), quantise(matrix, FORWARD)
    y = _product(x8, w8, ((x.ndim - 1,), (0,)), x.dtype)
    return y, (x8, w if recast else w8.values, w8.scale, jax.ShapeDtypeStruct(w.shape, w.dtype))


def _backward(recast: bool, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x8, w, scale, like = kept
    w8 = (
        quantise(w.reshape(x8.values.shape[-1], -1), FORWARD, scale)
        if recast
        else Quantised(w, scale)
    )
    dy8, rows = quantise(dy, GRADIENT), tuple(range(dy.ndim - 1))
    dw = _product(x8, dy8, (rows, rows), jnp.float32)
    return _product(dy8, w8, ((dy.ndim - 1,), (1,)), dy.dtype), dw.reshape(like.shape)


fp8_linear.defvjp(_forward, _backward)
