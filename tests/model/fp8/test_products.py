"""Products of 8-bit numbers against NumPy, on one device and on eight, and in a train step."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.fp8.products import How, fp8_linear, fp8_normed_mlp, fp8_normed_qkv
from consyn_jax.model.fp8.quantisation import ARRAYS, FORWARD, GRADIENT, largest_in, scale_for
from consyn_jax.model.fp8.slots import cast_here
from consyn_jax.model.linear import MlpWeights, QkvWeights
from consyn_jax.model.norms import norm_then_rope, rms_norm
from consyn_jax.model.parameters import initial_parameters
from consyn_jax.model.rope import apply_rope, rope_table
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.program import Program

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=32,
    tie_embeddings=False,
)


def rounded(x: Any, dtype: Any) -> np.ndarray:
    """`x` rounded to 8 bits, in float64."""
    x = np.asarray(x, np.float64)
    scale = 2.0 ** math.ceil(math.log2(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)))
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


def numbers(seed: int, *shape: int) -> jax.Array:
    """Numbers over several orders of magnitude, like activations and gradients."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp(3 * rng.normal(size=shape)), jnp.float32)


def linear_alone(*given: Any) -> jax.Array:
    """`fp8_linear`, with the gradient of its output cast on the spot."""
    return cast_here(*fp8_linear(*given))


@pytest.mark.parametrize("recast", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_both_gradients_equal_numpy(dtype: Any, recast: bool) -> None:
    x, w, dy = (
        numbers(0, 2, 5, 16).astype(dtype),
        numbers(1, 16, 4, 6),
        numbers(2, 2, 5, 24).astype(dtype),
    )
    y, pull = jax.vjp(lambda x, w: linear_alone(x, w, None, "o_input", "o", How(recast)), x, w)
    dx, dw = pull(dy)
    x8, w8, dy8 = rounded(x, FORWARD), rounded(w, FORWARD).reshape(16, 24), rounded(dy, GRADIENT)
    expected = x8 @ w8, dy8 @ w8.T, np.einsum("btd,btf->df", x8, dy8).reshape(w.shape)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    for got, want in zip((y, dx, dw), expected, strict=True):
        last_place = 2.0**-8 if got.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=last_place, atol=1e-6 * np.abs(want).max()
        )


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_nonfinite_values_are_not_hidden(wrong: float) -> None:
    """A GPU converts infinity to the largest 8-bit number; a NaN scale shows in every product."""
    x = jnp.ones((4, 16)).at[1, 2].set(wrong)
    assert np.isnan(scale_for(largest_in(x), FORWARD))
    assert np.all(np.isnan(fp8_linear(x, jnp.ones((16, 16)))[0]))


SCALES = dict(zip(ARRAYS, 2.0 ** np.arange(-5, 6), strict=True))
GIVEN = jnp.asarray(list(SCALES.values()), jnp.float32)
HUGE = 1e4  # by which gradients are multiplied, so that every scale clips some
# Matmuls that read an array. Separate ones report its maximum each, and JAX adds up the reports.
READERS = np.array([{"attention_input": 3, "mlp_input": 2}.get(name, 1) for name in ARRAYS])


def narrowed(x: Any, dtype: Any, scale: float) -> np.ndarray:
    """`x` rounded to 8 bits with a given scale, clipped to the range, in float64."""
    top = float(ml_dtypes.finfo(dtype).max)
    values = np.clip(np.asarray(x, np.float64) / scale, -top, top)
    return values.astype(np.float32).astype(dtype).astype(np.float64) * scale


def test_with_the_scales_of_the_step_before_too_large_values_are_clipped() -> None:
    x, w, dy = 300 * numbers(0, 2, 5, 16), numbers(1, 16, 24), 1e4 * numbers(2, 2, 5, 24)
    y, pull = jax.vjp(linear_alone, x, w, GIVEN)
    dx, dw, largest = pull(dy)
    x8, dy8 = narrowed(x, FORWARD, SCALES["o_input"]), narrowed(dy, GRADIENT, SCALES["o"])
    assert np.abs(x8).max() == 448 * SCALES["o_input"] < jnp.max(jnp.abs(x))
    assert np.abs(dy8).max() == 57344 * SCALES["o"] < jnp.max(jnp.abs(dy))
    w8 = rounded(w, FORWARD)
    for got, want in ((y, x8 @ w8), (dx, dy8 @ w8.T), (dw, np.einsum("btd,btf->df", x8, dy8))):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    found = dict(zip(ARRAYS, largest.tolist(), strict=True))
    expected = {"o_input": float(jnp.abs(x).max()), "o": float(jnp.abs(dy).max())}
    assert found == dict.fromkeys(ARRAYS, 0.0) | expected


def block(seed: int, biased: bool) -> tuple[jax.Array, jax.Array, jax.Array, MlpWeights]:
    """Two activations, a norm's scale, and the parameters of an MLP."""
    made = [numbers(seed + i, *shape) for i, shape in enumerate([(2, 5, 16)] * 2 + [(16,)])]
    shapes = (16,), (16, 24), (16, 24), (24, 16), *([(24,)] * 2 if biased else [])
    return *made, MlpWeights(*(numbers(seed + 9 + i, *shape) for i, shape in enumerate(shapes)))


def composed(x: Any, added: Any, mlp: MlpWeights, scales: Any) -> tuple[jax.Array, jax.Array]:
    """The MLP from separate matmuls, differentiated by JAX."""
    x = x + added
    normed = rms_norm(x, mlp.norm, 1e-5)
    gate = linear_alone(normed, mlp.gate, scales, "mlp_input", "gate")
    up = linear_alone(normed, mlp.up, scales, "mlp_input", "up")
    if mlp.gate_bias is not None:
        gate, up = gate + mlp.gate_bias, up + mlp.up_bias
    return x, linear_alone(jax.nn.silu(gate) * up, mlp.down, scales, "down_input", "down")


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("recast", [False, True])
@pytest.mark.parametrize("scales", [None, GIVEN])
def test_the_mlp_equals_its_matmuls(biased: bool, recast: bool, scales: Any) -> None:
    x, added, _, mlp = block(0, biased)
    ours = jax.vjp(lambda *a: mlp_alone(How(recast), *a), x, added, mlp, scales)
    theirs = jax.vjp(composed, x, added, mlp, scales)
    check_equal(ours, theirs, (numbers(30, 2, 5, 16), HUGE * numbers(31, 2, 5, 16)))


def mlp_alone(how: How, x: Any, added: Any, mlp: MlpWeights, scales: Any) -> Any:
    y, out, slot = fp8_normed_mlp(x, added, None, mlp, scales, how)
    return y, cast_here(out, slot)


def qkv(seed: int, biased: bool, normed: bool) -> QkvWeights:
    shapes = [(16,), (16, 4, 6), (16, 2, 6), (16, 2, 6), (4, 6), (2, 6), (2, 6), (6,), (6,)]
    made = [numbers(seed + i, *shape) for i, shape in enumerate(shapes)]
    biases = made[4:7] if biased else [None] * 3
    return QkvWeights(*made[:4], *biases, *(made[7:] if normed else [None] * 2))


ROPE = rope_table(jnp.tile(jnp.arange(5), (2, 1)), 5, 6, 1e4)


@pytest.mark.slow
@pytest.mark.parametrize(("biased", "normed"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("recast", [False, True])
@pytest.mark.parametrize("scales", [None, GIVEN])
def test_queries_keys_and_values_equal_their_matmuls(
    biased: bool, normed: bool, recast: bool, scales: Any
) -> None:
    x, weights = block(0, False)[0], qkv(5, biased, normed)

    def separate(x: Any, weights: QkvWeights, scales: Any) -> Any:
        inputs, heads = rms_norm(x, weights.norm, 1e-5), []
        for name in "qkv":
            w, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
            y = linear_alone(inputs, w, scales, "attention_input", name).reshape(2, 5, -1, 6)
            heads.append(y if bias is None else y + bias)
        q, k, v = heads
        if normed:
            q = norm_then_rope(q, weights.q_norm, ROPE, 1e-5)
            k = norm_then_rope(k, weights.k_norm, ROPE, 1e-5)
        else:
            q, k = apply_rope(q, ROPE), apply_rope(k, ROPE)
        return x, (q, k, v)

    def ours_of(x: Any, weights: QkvWeights, scales: Any) -> Any:
        return fp8_normed_qkv(x, None, weights, ROPE, scales, How(recast))[:2]

    dys = tuple(HUGE * numbers(18 + i, 2, 5, heads, 6) for i, heads in enumerate((4, 2, 2)))
    ours, theirs = (jax.vjp(f, x, weights, scales) for f in (ours_of, separate))
    check_equal(ours, theirs, (numbers(11, 2, 5, 16), dys))


@pytest.mark.slow
@pytest.mark.parametrize("scales", [None, GIVEN])
def test_a_slot_brings_the_gradient_that_its_array_would_get(scales: Any) -> None:
    """The outputs of o and down, each added to the residual stream before the next norm."""
    x, attention, _, mlp = block(0, False)
    weights, o = qkv(5, False, True), numbers(40, 16, 16)

    def both(in_slots: bool, x: Any, o: Any, mlp: MlpWeights, weights: Any, scales: Any) -> Any:
        out, slot = fp8_linear(attention, o, scales)
        if not in_slots:
            out, slot = cast_here(out, slot), None
        x, out, slot = fp8_normed_mlp(x, out, slot, mlp, scales, How())
        if not in_slots:
            out, slot = cast_here(out, slot), None
        return fp8_normed_qkv(x + out, slot, weights, ROPE, scales, How())[:2]

    dys = tuple(HUGE * numbers(18 + i, 2, 5, heads, 6) for i, heads in enumerate((4, 2, 2)))
    found = [
        jax.vjp(lambda *a, s=in_slots: both(s, *a), x, o, mlp, weights, scales)[1](
            (numbers(11, 2, 5, 16), dys)
        )
        for in_slots in (True, False)
    ]
    for ours, expected in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.any(expected != 0)
        np.testing.assert_array_equal(ours, expected)


def check_equal(ours: Any, theirs: Any, gradients: Any) -> None:
    """The results of two `jax.vjp`, and what they give for the same gradients.

    The last argument of both functions is the scales.
    """
    *ours_of, largest = ours[1](gradients)
    *theirs_of, reported = theirs[1](gradients)
    for got, want in zip(
        jax.tree.leaves((ours[0], ours_of)), jax.tree.leaves((theirs[0], theirs_of)), strict=True
    ):
        distance = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        assert distance < 1e-5
    assert (largest is None) == (reported is None)
    if largest is not None:
        np.testing.assert_allclose(largest * READERS, reported, rtol=1e-5)


def test_on_eight_devices_scales_are_those_of_whole_arrays() -> None:
    mesh = build_mesh(dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2})
    x, w, dy = numbers(0, 4, 5, 16), numbers(1, 16, 24), numbers(2, 4, 5, 24)

    @jax.jit
    def all_three(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(linear_alone, x, w)
        return y, *pull(dy)

    axes = ("batch", "sequence", None), ("embed", "mlp"), ("batch", "sequence", "mlp")
    placed = [
        jax.device_put(value, sharding(mesh, names))
        for value, names in zip((x, w, dy), axes, strict=True)
    ]
    for ours, expected in zip(all_three(*placed), all_three(x, w, dy), strict=True):
        np.testing.assert_allclose(
            ours, expected, rtol=1e-5, atol=1e-6 * float(jnp.abs(expected).max())
        )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_gradients_are_near_those_of_bfloat16_whatever_is_recomputed() -> None:
    mesh = build_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 259, (4, 33)), jnp.int32)
    ones = jnp.ones((4, 32), jnp.int32)
    batch = {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "segment_ids": ones,
        "loss_mask": ones > 0,
    }
    params = jax.tree.map(
        lambda p: p + 0.01, initial_parameters(CONFIG, 0, mesh)
    )  # a head of zeros gives no gradient
    found = {}
    for name, how in (
        ("bfloat16", {}),
        ("fp8", {"fp8": True}),
        ("recomputed", {"fp8": True, "remat": "minimal"}),
    ):
        program = Program(CONFIG, Compute(jnp.bfloat16, **how), optax.sgd(0.1), 0.0, mesh)
        found[name] = jax.jit(jax.grad(lambda p, program=program: program.objective(p, batch)[0]))(
            params
        )

    def distance(one: str, other: str) -> float:
        return float(
            optax.tree.norm(optax.tree.sub(found[one], found[other])) / optax.tree.norm(found[one])
        )

    assert 1e-3 < distance("bfloat16", "fp8") < 0.15
    assert distance("fp8", "recomputed") < 0.02
