"""The kernels of norm and rotary embedding, interpreted, against the reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.kernels.norm_rope import norm_rope
from consyn_jax.model.norms import norm_then_rope
from consyn_jax.model.rope import rope_table

pytestmark = pytest.mark.usefixtures("interpreted")

EPS = 1e-5

Arrays = tuple[jax.Array, ...]


def inputs(B: int, T: int, N: int, H: int, dtype: Any = jnp.float32) -> Arrays:
    """Heads, scale, gradient of the output, cosines and sines; positions differ by row."""
    rng = np.random.default_rng(0)
    x, dout = (jnp.asarray(rng.normal(size=(B, T, N, H)), dtype) for _ in range(2))
    positions = jnp.asarray(rng.integers(0, 64, (B, T)), jnp.int32)
    return (
        x,
        jnp.asarray(rng.uniform(0.5, 2, H), jnp.float32),
        dout,
        *jax.jit(rope_table, static_argnums=(1, 2, 3))(positions, 64, H, 1e4),
    )


def kernels(
    x: jax.Array,
    scale: jax.Array,
    dout: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    heads: str = "heads",
) -> Arrays:
    """The output and the gradients of x and scale."""
    out, gradients = jax.vjp(lambda x, scale: norm_rope(x, scale, (cos, sin), EPS, heads), x, scale)
    return out, *gradients(dout)


@jax.jit
def reference(
    x: jax.Array, scale: jax.Array, dout: jax.Array, cos: jax.Array, sin: jax.Array
) -> Arrays:
    """In float32, whatever the inputs are."""
    out, gradients = jax.vjp(
        lambda x, scale: norm_then_rope(x, scale, (cos, sin), EPS), x.astype(jnp.float32), scale
    )
    return out, *gradients(dout.astype(jnp.float32))


def errors(found: Arrays, expected: Arrays) -> list[float]:
    return [
        float(np.linalg.norm(np.asarray(f, np.float32) - e) / np.linalg.norm(e))
        for f, e in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize(
    ("B", "T", "N", "H"),
    [
        pytest.param(2, 48, 3, 64, id="whole tiles"),
        pytest.param(3, 35, 2, 64, id="a length that no tile divides"),
        pytest.param(1, 1, 1, 16, id="one token, less than a tile"),
        pytest.param(1, 20, 2, 128, id="wide heads"),
    ],
)
def test_output_and_gradients_equal_the_reference(B: int, T: int, N: int, H: int) -> None:
    given = inputs(B, T, N, H)
    assert max(errors(jax.jit(kernels)(*given), reference(*given))) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 2e-3), (jnp.float16, 3e-4)])
def test_half_precision_is_rounded_once(dtype: Any, bound: float) -> None:
    """Results are rounded at the end, with unit roundoff 2^-9 or 2^-12; sums are not rounded."""
    given = inputs(2, 35, 3, 64, dtype)
    found = jax.jit(kernels)(*given)
    assert [a.dtype for a in found] == [dtype, dtype, jnp.float32]
    *rounded, dscale = errors(found, reference(*given))
    assert max(rounded) < bound
    assert dscale < 1e-6


@pytest.mark.parametrize("heads", ["heads", "kv_heads"])
@pytest.mark.parametrize(
    "axes",
    [
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        {"fsdp": 2, "context": 2, "tensor": 2},
    ],
    ids=str,
)
def test_a_mesh_changes_neither_values_nor_gradients(axes: dict[str, int], heads: str) -> None:
    given = inputs(4, 18, 2, 64)
    mesh = build_mesh(dict.fromkeys(AXES, 1) | axes)
    x, rope = (
        sharding(mesh, ("batch", "sequence", heads, None)),
        sharding(mesh, ("batch", "sequence", None, None)),
    )
    placed = [
        jax.device_put(a, where)
        for a, where in zip(given, (x, sharding(mesh, (None,)), x, rope, rope), strict=True)
    ]
    with jax.set_mesh(mesh):
        found = jax.jit(kernels, static_argnames="heads")(*placed, heads=heads)
    assert found[0].sharding.is_equivalent_to(x, 4)
    assert max(errors(jax.device_get(found), reference(*given))) < 1e-6
