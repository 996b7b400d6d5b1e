"""8-bit floats with one scale per array, and the scales of the step before.

The forward pass uses e4m3, and gradients use e5m2 (Micikevicius et al., 2022).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
SMALLEST_EXPONENT = -60  # of a scale; the product of two scales then fits float32
# Activations and gradients of a block that matmuls read, with the number of times that the largest
# element may double in a step before it is clipped. A gradient may grow by more, as those of the
# first steps do, when the output embedding is still small; e5m2 has the range for it.
ACTIVATIONS = ("attention_input", "o_input", "mlp_input", "down_input")
GRADIENTS = ("q", "k", "v", "o", "gate", "up", "down")  # of the outputs of these matmuls
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
    """The smallest power of two by which to divide `largest`, so that it is in range of `dtype`.

    Division by a power of two does not round, so quantising an array twice, or from another dtype,
    gives the same values. The scale is NaN if `largest` is not finite, because some devices would
    round infinity to the largest finite number.
    """
    exponent = _exponent(largest, float(jnp.finfo(dtype).max))
    return jnp.where(jnp.isfinite(largest), jnp.ldexp(jnp.float32(1), exponent), jnp.nan)


def _exponent(largest: jax.Array, top: Any) -> jax.Array:
    """The smallest exponent of two by which `largest` is divided to be at most `top`."""
    digits, exponent = jnp.frexp(largest)
    top_digits, top_exponent = np.frexp(np.asarray(top, np.float32))
    exponent = exponent - top_exponent + (digits > top_digits)
    return jnp.maximum(exponent, SMALLEST_EXPONENT)


def first_scales(num_layers: int) -> Float[Array, "L arrays"]:
    """Scales before any step: 1/4 for activations, and 2^-8 for gradients.

    Activations up to 112 are then in the range of e4m3, and gradients from 1e-7 to 224 in that of
    e5m2. Normed activations of width D are at most sqrt(D), and the gradients of the objective,
    which is a sum over tokens, do not depend on the size of a batch.
    """
    scales = [0.25] * len(ACTIVATIONS) + [2.0**-8] * len(GRADIENTS)
    return jnp.tile(jnp.array(scales, jnp.float32), (num_layers, 1))


def next_scales(
    scales: Float[Array, "*L arrays"], largest: Float[Array, "*L arrays"]
) -> Float[Array, "*L arrays"]:
    """Scales of the next step, from the largest magnitudes in this step.

    They are powers of two with room for `DOUBLINGS`. Arrays of zeros, and arrays that are not
    finite, keep their scale, as in Transformer Engine.
    """
    types = [FORWARD] * len(ACTIVATIONS) + [GRADIENT] * len(GRADIENTS)
    exponent = _exponent(largest, [float(jnp.finfo(dtype).max) for dtype in types]) + DOUBLINGS
    is_known = jnp.isfinite(largest) & (largest > 0)
    return jnp.where(is_known, jnp.ldexp(jnp.float32(1), exponent), scales)


def narrowed(x: Float[Array, "*shape"], inverse: Scale, dtype: Any) -> Float[Array, "*shape"]:
    """Multiply `x` by the inverse of a scale and round to nearest in `dtype`.

    Finite values outside the range become the largest number, also those whose product overflows.
    Infinity, and any value with the scale NaN, becomes NaN: it must not look like a finite number,
    or the check for non-finite steps would miss it.
    """
    top = float(jnp.finfo(dtype).max)
    # Asked of `x` and the scale, because in Triton's minimum and maximum a number wins over NaN.
    is_finite = (jnp.abs(x) < jnp.inf) & ~jnp.isnan(inverse)
    y = jnp.clip(x.astype(jnp.float32) * inverse, -top, top)
    return jnp.where(is_finite, y, jnp.nan).astype(dtype)


def quantise(
    x: Float[Array, "*rows D"], dtype: Any, scale: Scale | None = None
) -> tuple[Quantised, Float[Array, ""]]:
    """Divide `x` by `scale` and round to nearest in `dtype`.

    Args:
        scale: The scale; None for the scale for the largest magnitude in the global array.

    Returns:
        The 8-bit array, and the largest magnitude in `x`, in float32.
    """
    largest = largest_in(x)
    scale = scale_for(largest, dtype) if scale is None else scale
    values = narrowed(x, 1 / scale, dtype)
    return Quantised(values, jnp.moveaxis(values, -1, 0), scale), largest


def scale_in(scales: Scales | None, name: str) -> Scale | None:
    """The scale of the array `name`, one of `ARRAYS`; None without scales."""
    return None if scales is None else scales[ARRAYS.index(name)]


def in_order(scales: Scales | None, largest: dict[str, Float[Array, ""]]) -> Scales | None:
    """Largest magnitudes in the order of `ARRAYS`, 0 for those that are missing."""
    if scales is None:
        return None
    return jnp.stack([largest.get(name, jnp.zeros((), jnp.float32)) for name in ARRAYS])
