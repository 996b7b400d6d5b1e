"""The matmuls of a block in 8-bit floats, each with a backward pass written by hand.

A matmul is differentiated together with the function that writes its operands, because an 8-bit
array cannot carry a gradient of another dtype. Every function takes the scales of the block. Its
backward pass returns the largest magnitudes of all quantised arrays as the "gradient" of the
scales. The forward pass cannot return them, because some of the arrays are gradients. The gradients
of the outputs of o and down come in slots (`slots.py`), and that of v where attention writes it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from consyn_jax.distributed.mesh import constrain
from consyn_jax.model.fp8.operands import (
    REFERENCE,
    Writers,
    rotation_gradients,
    swiglu_gradients,
)
from consyn_jax.model.fp8.quantisation import (
    FORWARD,
    GRADIENT,
    Quantised,
    Scales,
    in_order,
    largest_in,
    narrowed,
    quantise,
    scale_for,
    scale_in,
)
from consyn_jax.model.fp8.slots import Slot, content, slot_for
from consyn_jax.model.linear import MlpWeights, QkvWeights, add_bias, heads_of
from consyn_jax.model.norms import Rotate, norm_then_rope, rotated
from consyn_jax.model.rope import Rope


class How(NamedTuple):
    """Constants of the matmuls.

    Attributes:
        recast: Whether the backward pass casts float32 weights again, as in `linear`.
        eps: Epsilon of the norm.
        writers: Functions that write 8-bit operands.
        rotate: Norms and rotates queries or keys, from `attention.Backend.norms`.
    """

    recast: bool = False
    eps: float = 1e-5
    writers: Writers = REFERENCE
    rotate: Rotate = norm_then_rope


PLAIN_CASTS = How()
# --------------------------------------------------------------------------------------- one matmul


Written = tuple[Quantised, Float[Array, ""]]  # an array in 8 bits, and its largest magnitude


class _Weight(NamedTuple):
    """A matrix as the backward pass needs it: in 8 bits, or in float32 to be cast again."""

    matrix: jax.Array
    scale: jax.Array


def _scaled_dot(
    a: jax.Array, b: jax.Array, axes: Any, scale: Float[Array, ""], dtype: Any
) -> jax.Array:
    """Multiply 8-bit values, then the scale, so that XLA always uses 8-bit kernels.

    Args:
        scale: Product of the scales of `a` and `b`.
    """
    product = jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)
    return product * scale.astype(dtype)


def _times(
    x8: Quantised, w: Float[Array, "..."], dtype: Any, recast: bool
) -> tuple[jax.Array, _Weight]:
    """Return x @ w, and the weight in the form that the backward pass needs."""
    matrix = w.reshape(x8.values.shape[-1], -1)
    scale = scale_for(largest_in(matrix), FORWARD)
    w8 = narrowed(matrix, 1 / scale, FORWARD)
    axes = (x8.values.ndim - 1,), (0,)
    y = _scaled_dot(x8.values, w8, axes, x8.scale * scale, dtype)
    return y, _Weight(w if recast else w8, scale)


def _input_gradient(dy8: Quantised, kept: _Weight, dtype: Any) -> jax.Array:
    w8 = kept.matrix
    if w8.dtype != FORWARD:
        w8 = narrowed(w8.reshape(-1, dy8.values.shape[-1]), 1 / kept.scale, FORWARD)
    axes = (dy8.values.ndim - 1,), (1,)
    return _scaled_dot(dy8.values, w8, axes, dy8.scale * kept.scale, dtype)


def _weight_gradient(
    x8T: jax.Array, x_scale: jax.Array, dy8: Quantised, shape: tuple[int, ...]
) -> jax.Array:
    rows = tuple(range(1, x8T.ndim))
    scale = x_scale * dy8.scale
    dw = _scaled_dot(x8T, dy8.transposed, (rows, rows), scale, jnp.float32)
    return dw.reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def fp8_linear(
    x: Float[Array, "*B D"],
    w: Float[Array, "..."],
    scales: Scales | None = None,
    x_name: str = "o_input",
    y_name: str = "o",
    how: How = PLAIN_CASTS,
    written: Written | None = None,
) -> tuple[Float[Array, "*B F"], Slot]:
    """`linear` in 8-bit floats: `x` and `w` in e4m3, the gradient of the output in e5m2.

    Each of these arrays is quantised once. `x` is saved in 8 bits for the backward pass.

    Args:
        w: [D, F], where D or F may stand for several dimensions, as for heads.
        scales: Scales of the block; None for scales computed from the arrays themselves.
        x_name: The name of `x` in `ARRAYS`.
        y_name: The name of the output, whose gradient is quantised.
        written: `x` in 8 bits if a kernel has written it; None to cast it here.

    Returns:
        The output, and the slot for its gradient: the backward pass reads only that.
    """
    return _linear_forward(x, w, scales, x_name, y_name, how, written)[0]


def _linear_forward(
    x: Any, w: Any, scales: Any, x_name: str, y_name: str, how: How, written: Any
) -> Any:
    x8, largest = written or quantise(x, FORWARD, scale_in(scales, x_name))
    y, kept = _times(x8, w, x.dtype, how.recast)
    like = jax.ShapeDtypeStruct(w.shape, w.dtype)
    slot = slot_for(y, scale_in(scales, y_name))
    likes = like, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), written)
    return (y, slot), (x8.transposed, x8.scale, largest, kept, likes, scales)


def _linear_backward(x_name: str, y_name: str, how: How, saved: Any, gradients: Any) -> Any:
    x8T, x_scale, largest, kept, (like, written), scales = saved
    dy, slot = gradients
    dy8, dy_largest = content(slot, scale_in(scales, y_name))
    dx = _input_gradient(dy8, kept, dy.dtype)
    dw = _weight_gradient(x8T, x_scale, dy8, like.shape)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), written)
    return dx, dw, in_order(scales, {x_name: largest, y_name: dy_largest}), nothing


fp8_linear.defvjp(_linear_forward, _linear_backward)


# --------------------------------------------------------------------------- a norm and its matmuls


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def fp8_normed_qkv(
    x_BTD: Float[Array, "B T D"],
    slot: Slot | None,
    qkv: QkvWeights,
    rope: Rope,
    scales: Scales | None,
    how: How,
) -> tuple[Float[Array, "B T D"], tuple[Array, Array, Array], Slot | None]:
    """Return x, the heads that attention reads, and the slot for the gradient of the values.

    The heads are queries and keys after rotation, and values. There is a slot if attention writes 8
    bits. The gradient of the values is then read from it; only biases use the 16-bit one.

    Args:
        slot: Slot of the matmul whose output was added to `x` last; None for none.
        rope: Cosines and sines, which get no gradient.
    """
    return _qkv_forward(x_BTD, slot, qkv, rope, scales, how)[0]


def _qkv_forward(x: Any, slot: Any, qkv: QkvWeights, rope: Any, scales: Any, how: How) -> Any:
    x, x8, largest = how.writers.norm(x, qkv.norm, how.eps, scale_in(scales, "attention_input"))
    weights = (qkv.q, qkv.q_bias), (qkv.k, qkv.k_bias), (qkv.v, qkv.v_bias)
    made = [_times(x8, w, x.dtype, how.recast) for w, _ in weights]
    kept = [own for _, own in made]
    q, k, v = (heads_of(y, *own) for (y, _), own in zip(made, weights, strict=True))
    likes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), qkv)
    small = qkv.norm, qkv.q_norm, qkv.k_norm
    saved = (x, slot, small, q, k, rope, x8.transposed, x8.scale, largest, kept, likes, scales)
    v_slot = None
    if how.writers.in_attention:
        v_slot = slot_for(made[2][0], scale_in(scales, "v"))
        v_slot = v_slot._replace(largest=jnp.zeros((v.shape[0], v.shape[2]), jnp.float32))
    q = rotated(q, qkv.q_norm, rope, how.eps, "heads", how.rotate)
    k = rotated(k, qkv.k_norm, rope, how.eps, "kv_heads", how.rotate)
    return (x, (q, k, v), v_slot), saved


def _qkv_backward(how: How, saved: Any, gradients: Any) -> Any:
    x, slot, (norm, q_norm, k_norm), q, k, rope, x8T, x_scale, largest, kept, likes, scales = saved
    dx, (dq, dk, dv), v_slot = gradients
    # Without a norm, one pass of XLA rotates and casts.
    turn = (REFERENCE if q_norm is None else how.writers).rotation_gradients
    given = (q, q_norm, rope, how.eps), (k, k_norm, rope, how.eps)
    dq8, dq_norm = turn(*given[0], "heads", dq, scale_in(scales, "q"))
    dk8, dk_norm = turn(*given[1], "kv_heads", dk, scale_in(scales, "k"))
    v_scale = scale_in(scales, "v")
    if v_slot is not None:
        dv8 = content(v_slot, v_scale)
    else:
        dv8 = quantise(dv.reshape(*dv.shape[:2], -1), GRADIENT, v_scale)
    biases: tuple[Any, ...] = (None, None, None)
    if likes.q_bias is not None:
        # The kernel writes only gradients that are rounded to 8 bits; biases get exact ones.
        exact = rotation_gradients(*given[0], dq)[0], rotation_gradients(*given[1], dk)[0], dv
        biases = tuple(jnp.sum(dy.astype(jnp.float32), axis=(0, 1)) for dy in exact)
    found, dweights, dnormed = {"attention_input": largest}, [], []
    for name, (dy8, found[name]), own in zip("qkv", (dq8, dk8, dv8), kept, strict=True):
        dnormed.append(_input_gradient(dy8, own, x.dtype))
        # XLA would join the three matmuls, and copy the three gradients into one array for that.
        apart, dyT = jax.lax.optimization_barrier((x8T, dy8.transposed))
        dy8 = dy8._replace(transposed=dyT)
        dweights.append(_weight_gradient(apart, x_scale, dy8, getattr(likes, name).shape))
    dx, dnorm, dslot = how.writers.norm_gradients(x, norm, how.eps, dx, tuple(dnormed), slot)
    dqkv = (dnorm, *dweights, *biases, dq_norm, dk_norm)
    return dx, dslot, QkvWeights(*dqkv), None, in_order(scales, found)


fp8_normed_qkv.defvjp(_qkv_forward, _qkv_backward)


# ------------------------------------------------------------------------------------------ the MLP


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def fp8_normed_mlp(
    x_BTD: Float[Array, "B T D"],
    added_BTD: Float[Array, "B T D"],
    slot: Slot | None,
    mlp: MlpWeights,
    scales: Scales | None,
    how: How,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Slot]:
    """Return y = x + added, and the MLP of the RMS norm of y, without the bias of the output.

    Args:
        slot: Slot of the matmul whose output is `added`; None for none.

    Returns:
        y, the output of the MLP, and the slot for its gradient: the backward pass reads only that.
    """
    return _mlp_forward(x_BTD, added_BTD, slot, mlp, scales, how)[0]


def _mlp_forward(x: Any, added: Any, slot: Any, mlp: MlpWeights, scales: Any, how: How) -> Any:
    writers, dtype = how.writers, x.dtype
    x, x8, x_largest = writers.norm(x, mlp.norm, how.eps, scale_in(scales, "mlp_input"), added)
    gate, gate_kept = _times(x8, mlp.gate, dtype, how.recast)
    up, up_kept = _times(x8, mlp.up, dtype, how.recast)
    if mlp.gate_bias is not None and mlp.up_bias is not None:
        gate, up = add_bias(gate, mlp.gate_bias), add_bias(up, mlp.up_bias)
    hidden8, largest = writers.swiglu(gate, up, scale_in(scales, "down_input"))
    values = constrain(hidden8.values, "batch", "sequence", "mlp")
    out, down_kept = _times(hidden8._replace(values=values), mlp.down, dtype, how.recast)
    found = {"mlp_input": x_largest, "down_input": largest}
    likes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), mlp)
    kept = gate_kept, up_kept, down_kept
    operands = x8.transposed, x8.scale, hidden8.transposed, hidden8.scale
    own_slot = slot_for(out, scale_in(scales, "down"))
    return (x, out, own_slot), (x, slot, mlp.norm, operands, gate, up, kept, likes, scales, found)


def _mlp_backward(how: How, saved: Any, gradients: Any) -> Any:
    x, slot, norm, operands, gate, up, kept, likes, scales, found = saved
    x8T, x_scale, hidden8T, hidden_scale = operands
    gate_kept, up_kept, down_kept = kept
    dx, dout, own_slot = gradients
    dout8, found["down"] = content(own_slot, scale_in(scales, "down"))
    ddown = _weight_gradient(hidden8T, hidden_scale, dout8, likes.down.shape)
    dhidden = _input_gradient(dout8, down_kept, dout.dtype)
    own = scale_in(scales, "gate"), scale_in(scales, "up")
    written = how.writers.swiglu_gradients(gate, up, dhidden, own)
    (dgate8, found["gate"]), (dup8, found["up"]) = written
    biases: tuple[Any, ...] = (None, None)
    if likes.gate_bias is not None:
        # The kernel writes only gradients that are rounded to 8 bits; biases get exact ones.
        exact = swiglu_gradients(gate, up, dhidden)
        biases = tuple(jnp.sum(dy, axis=(0, 1)) for dy in exact)
    dnormed = (
        _input_gradient(dgate8, gate_kept, x.dtype),
        _input_gradient(dup8, up_kept, x.dtype),
    )
    dgate, dup = (
        _weight_gradient(x8T, x_scale, dy8, like.shape)
        for dy8, like in ((dgate8, likes.gate), (dup8, likes.up))
    )
    dx, dnorm, dslot = how.writers.norm_gradients(x, norm, how.eps, dx, dnormed, slot)
    return dx, dx, dslot, MlpWeights(dnorm, dgate, dup, ddown, *biases), in_order(scales, found)


fp8_normed_mlp.defvjp(_mlp_forward, _mlp_backward)
