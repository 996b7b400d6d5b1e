"""Quantise arrays to 8-bit floats, with one scale per array.

The forward pass uses e4m3, and gradients use e5m2 (Micikevicius et al., 2022). The scales of a step
are computed from the largest magnitudes in the previous step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
SMALLEST_EXPONENT = -60  # of a scale, so that the product of two scales fits float32
# The activations and gradients of a block that matmuls read. `DOUBLINGS` is how many times the
# largest element of each may double from one step to the next before it is clipped. Gradients have
# more room, because they grow fast in the first steps, when the output embedding is small.
ACTIVATIONS = ("attention_input", "o_input", "mlp_input", "down_input")
GRADIENTS = ("q", "k", "v", "o", "gate", "up", "down")  # with respect to these matmuls' outputs
ARRAYS = (*ACTIVATIONS, *GRADIENTS)
DOUBLINGS = np.array([1] * len(ACTIVATIONS) + [4] * len(GRADIENTS))

Scale = Float[Array, ""]
Scales = Float[Array, " arrays"]  # of a block, in the order of `ARRAYS`


class Quantised(NamedTuple):
    """An array in 8-bit floats; its elements are `values` times `scale`.

    Attributes:
        values: The array, [*rows, D].
        transposed: The same values, [D, *rows], for a matmul that sums over the rows: the tensor
            cores of Hopper read 8-bit operands only with the summed axis last.
    """

    values: jax.Array
    transposed: jax.Array
    scale: Scale


def largest_in(x: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest magnitude in `x`, in float32."""
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def scale_for(largest: Float[Array, ""], dtype: Any) -> Scale:
    """The smallest power of two s for which `largest / s` fits the range of `dtype`.

    Division by a power of two does not round, so quantising a quantised array again changes no
    value. The scale is NaN if `largest` is not finite, because some devices would
    round infinity to the largest finite number.
    """
    exponent = _exponent(largest, float(jnp.finfo(dtype).max))
    return jnp.where(jnp.isfinite(largest), jnp.ldexp(jnp.float32(1), exponent), jnp.nan)


def _exponent(largest: jax.Array, top: Any) -> jax.Array:
    """The smallest exponent e for which `largest / 2**e` is at most `top`."""
    digits, exponent = jnp.frexp(largest)
    top_digits, top_exponent = np.frexp(np.asarray(top, np.float32))
    exponent = exponent - top_exponent + (digits > top_digits)
    return jnp.maximum(exponent, SMALLEST_EXPONENT)


def first_scales(num_layers: int) -> Float[Array, "L arrays"]:
    """Scales before any step: 1/4 for activations, and 2^-8 for gradients.

    The range of e4m3 then covers activations up to 112, and the range of e5m2 covers gradients from
    1e-7 to 224. Normed activations of width D are at most sqrt(D). The objective is a sum over
    tokens, so its gradients do not depend on the batch size.
    """
    scales = [0.25] * len(ACTIVATIONS) + [2.0**-8] * len(GRADIENTS)
    return jnp.tile(jnp.array(scales, jnp.float32), (num_layers, 1))


def next_scales(
    scales: Float[Array, "*L arrays"], largest: Float[Array, "*L arrays"]
) -> Float[Array, "*L arrays"]:
    """Scales of the next step, from the largest magnitudes in this step.

    A scale is a power of two. The largest element may double `DOUBLINGS` times before it
    exceeds the range of the 8-bit type. As in Transformer Engine, an array that is zero or not
    finite keeps its scale.
    """
    types = [FORWARD] * len(ACTIVATIONS) + [GRADIENT] * len(GRADIENTS)
    exponent = _exponent(largest, [float(jnp.finfo(dtype).max) for dtype in types]) + DOUBLINGS
    is_known = jnp.isfinite(largest) & (largest > 0)
    return jnp.where(is_known, jnp.ldexp(jnp.float32(1), exponent), scales)


def narrowed(x: Float[Array, "*shape"], inverse: Scale, dtype: Any) -> Float[Array, "*shape"]:
    """Multiply `x` by the inverse of a scale and round to nearest in `dtype`.

    Finite values outside the range become the largest finite number, even if the product overflows.
    Infinity becomes NaN. If the scale is NaN, all values become NaN. So the check for non-finite
    steps still detects such arrays.
    """
    top = float(jnp.finfo(dtype).max)
    # Check `x` and the scale and not `y`, because Triton's minimum and maximum ignore NaN.
    is_finite = (jnp.abs(x) < jnp.inf) & ~jnp.isnan(inverse)
    y = jnp.clip(x.astype(jnp.float32) * inverse, -top, top)
    return jnp.where(is_finite, y, jnp.nan).astype(dtype)


def quantise(
    x: Float[Array, "*rows D"], dtype: Any, scale: Scale | None = None
) -> tuple[Quantised, Float[Array, ""]]:
    """Divide `x` by `scale` and round to nearest in `dtype`.

    Args:
        scale: The scale; None to compute it from the largest magnitude in the global array.

    Returns:
        The 8-bit array, and the largest magnitude in `x`, in float32.
    """
    largest = largest_in(x)
    scale = scale_for(largest, dtype) if scale is None else scale
    values = narrowed(x, 1 / scale, dtype)
    return Quantised(values, jnp.moveaxis(values, -1, 0), scale), largest


def scale_in(scales: Scales | None, name: str) -> Scale | None:
    """The scale of the array `name`, one of `ARRAYS`; None if there are no scales."""
    return None if scales is None else scales[ARRAYS.index(name)]


def in_order(scales: Scales | None, largest: dict[str, Float[Array, ""]]) -> Scales | None:
    """Largest magnitudes in the order of `ARRAYS`, with 0 for missing arrays."""
    if scales is None:
        return None
    return jnp.stack([largest.get(name, jnp.zeros((), jnp.float32)) for name in ARRAYS])
