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
from consyn_jax.model.fp8 import FORWARD, GRADIENT, fp8_linear, quantise, scale_of
from consyn_jax.model.parameters import initial_parameters
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


@pytest.mark.parametrize("recast", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_both_gradients_equal_numpy(dtype: Any, recast: bool) -> None:
    x, w, dy = (
        numbers(0, 2, 5, 16).astype(dtype),
        numbers(1, 16, 4, 6),
        numbers(2, 2, 5, 24).astype(dtype),
    )
    y, pull = jax.vjp(lambda x, w: fp8_linear(x, w, recast), x, w)
    dx, dw = pull(dy)
    x8, w8, dy8 = rounded(x, FORWARD), rounded(w, FORWARD).reshape(16, 24), rounded(dy, GRADIENT)
    expected = x8 @ w8, dy8 @ w8.T, np.einsum("btd,btf->df", x8, dy8).reshape(w.shape)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    for got, want in zip((y, dx, dw), expected, strict=True):
        last_place = 2.0**-8 if got.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=last_place, atol=1e-6 * np.abs(want).max()
        )


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
@pytest.mark.parametrize("largest", [1.0, 0.9, 1.1, 1e-30, 1e30, 0.0])
def test_the_scale_is_the_smallest_power_of_two_that_holds_all(dtype: Any, largest: float) -> None:
    top = float(jnp.finfo(dtype).max)
    x = np.float32(largest * top) * jnp.asarray([0.1, -1.0, 0.0])
    found = quantise(x, dtype)
    values, scale = np.asarray(found.values, np.float64), float(found.scale)
    assert math.frexp(scale)[0] == 0.5
    assert np.all(np.isfinite(values))
    assert largest == 0 or scale == 2.0**-60 or top / 2 <= np.abs(values).max() <= top
    np.testing.assert_allclose(
        values * scale, x, rtol=1 / 16 if dtype == FORWARD else 1 / 8, atol=1e-20
    )


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_nonfinite_values_are_not_hidden(wrong: float) -> None:
    """A GPU converts infinity to the largest 8-bit number; a NaN scale shows in every product."""
    x = jnp.ones((4, 16)).at[1, 2].set(wrong)
    assert np.isnan(scale_of(x, FORWARD))
    assert np.all(np.isnan(fp8_linear(x, jnp.ones((16, 16)))))


def test_on_eight_devices_scales_are_those_of_whole_arrays() -> None:
    mesh = build_mesh(dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2})
    x, w, dy = numbers(0, 4, 5, 16), numbers(1, 16, 24), numbers(2, 4, 5, 24)

    @jax.jit
    def all_three(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(fp8_linear, x, w)
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
        assert not jax.tree.leaves(program.state_like.opt_state), "fp8 has no state"
        found[name] = jax.jit(jax.grad(lambda p, program=program: program.objective(p, batch)[0]))(
            params
        )

    def distance(one: str, other: str) -> float:
        return float(
            optax.tree.norm(optax.tree.sub(found[one], found[other])) / optax.tree.norm(found[one])
        )

    assert 1e-3 < distance("bfloat16", "fp8") < 0.15
    assert distance("fp8", "recomputed") < 0.02
