"""The norm kernels of the residual stream, interpreted, against the norm and autodiff."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.kernels.branched_norm import ROWS, branched_norm
from consyn_jax.model.norms import rms_norm

pytestmark = pytest.mark.usefixtures("interpreted")

EPS = 1e-5

Arrays = tuple[jax.Array, ...]


def inputs(B: int, T: int, D: int, uses: int, dtype: Any = jnp.float32) -> Arrays:
    """The scale, the stream, and the gradients of the residual and of each use."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(0.5, 2, D), jnp.float32), *(
        jnp.asarray(rng.normal(size=(B, T, D)), dtype) for _ in range(2 + uses)
    )


def kernels(scale: jax.Array, x: jax.Array, *given: jax.Array) -> Arrays:
    """All outputs and the gradients of x and scale."""
    out, gradients = jax.vjp(
        lambda x, scale: branched_norm(x, scale, EPS, len(given) - 1), x, scale
    )
    return *out, *gradients(given)


@jax.jit
def reference(scale: jax.Array, *arrays: jax.Array) -> Arrays:
    """In float32, whatever the inputs are."""
    x, *given = (a.astype(jnp.float32) for a in arrays)
    out, gradients = jax.vjp(
        lambda x, scale: (x, *[rms_norm(x, scale, EPS)] * (len(given) - 1)), x, scale
    )
    return *out, *gradients(tuple(given))


def errors(found: Arrays, expected: Arrays) -> list[float]:
    return [
        float(np.linalg.norm(np.asarray(f, np.float32) - e) / np.linalg.norm(e))
        for f, e in zip(found, expected, strict=True)
    ]


def collectives(program: Any) -> list[str]:
    """Shapes of what the devices exchange, which may be tuples."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", program.as_text())
    return sorted(shape for shapes in found for shape in re.findall(r"\w+\[[\d,]*\]", shapes))


@pytest.mark.slow
@pytest.mark.parametrize("uses", [2, 3])
@pytest.mark.parametrize(
    ("B", "T", "D"),
    [
        pytest.param(2, ROWS, 64, id="whole programs"),
        pytest.param(3, ROWS // 2 + 3, 48, id="padded rows and columns"),
        pytest.param(1, 1, 64, id="one token"),
    ],
)
def test_outputs_and_gradients_equal_the_reference(B: int, T: int, D: int, uses: int) -> None:
    given = inputs(B, T, D, uses)
    assert max(errors(jax.jit(kernels)(*given), reference(*given))) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_branch_that_is_added_is_added_before_the_norm(dtype: Any) -> None:
    """Sum and norm have the bits of the two steps; the branch has the gradient of the stream."""
    scale, x, added, *given = inputs(2, ROWS // 2 + 3, 48, 2, dtype)
    given.append(given[0] * 2)

    def together(x: jax.Array, added: jax.Array, scale: jax.Array) -> Arrays:
        return branched_norm(x, scale, EPS, 2, added)

    def apart(x: jax.Array, added: jax.Array, scale: jax.Array) -> Arrays:
        return branched_norm(x + added, scale, EPS, 2)

    found, pull = jax.vjp(together, x, added, scale)
    expected, pull_apart = jax.vjp(apart, x, added, scale)
    gradients = tuple(given)
    for a, b in (
        *zip(found, expected, strict=True),
        *zip(pull(gradients), pull_apart(gradients), strict=True),
    ):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_half_precision_is_rounded_once() -> None:
    """Results are rounded at the end, with unit roundoff 2^-9; sums are not rounded."""
    given = inputs(2, 35, 48, 3, jnp.bfloat16)
    found = jax.jit(kernels)(*given)
    assert [a.dtype for a in found] == [*[jnp.bfloat16] * 5, jnp.float32]
    *rounded, dscale = errors(found, reference(*given))
    assert max(rounded) < 2e-3
    assert dscale < 1e-6


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"tensor": 8},
    ],
    ids=str,
)
def test_a_mesh_changes_nothing_and_exchanges_only_the_gradient_of_the_scale(
    axes: dict[str, int],
) -> None:
    given = inputs(4, 18, 48, 3)
    mesh = build_mesh(dict.fromkeys(AXES, 1) | axes)
    tokens, whole = sharding(mesh, ("batch", "sequence", None)), sharding(mesh, (None,))
    placed = [jax.device_put(a, whole if a.ndim == 1 else tokens) for a in given]
    with jax.set_mesh(mesh):
        program = jax.jit(kernels).lower(*placed).compile()
    found = program(*placed)
    assert all(a.sharding.is_equivalent_to(tokens, 3) for a in found[:-1])
    assert max(errors(jax.device_get(found), reference(*given))) < 1e-6
    assert collectives(program) == ["f32[48]"] * (axes != {"tensor": 8})


@pytest.mark.parametrize(("axis", "gradients"), [("context", 3), ("tensor", 1)])
def test_readers_split_by_a_mesh_are_summed_before_the_kernel(axis: str, gradients: int) -> None:
    """So that XLA for GPUs sums over devices once; XLA for CPUs would do it three times anyway."""
    with jax.set_mesh(build_mesh(dict.fromkeys(AXES, 1) | {"fsdp": 4, axis: 2})):
        traced = jax.make_jaxpr(kernels)(*inputs(4, 18, 48, 3))
    _, backward = (equation for equation in traced.eqns if equation.primitive.name == "shard_map")
    assert len(backward.invars) == len(("scale", "x", "residual")) + gradients
