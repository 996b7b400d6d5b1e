"""Splash attention, interpreted, against the reference: values and gradients to 1e-5."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.model.attention import causal_attention
from consyn_jax.model.kernels.reference_attention import documents

pytestmark = pytest.mark.usefixtures("interpreted")

Arrays = tuple[jax.Array, ...]


def inputs(T: int, N: int, K: int, H: int) -> Arrays:
    """Queries, keys, values and the gradient of the output."""
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(size=(2, T, heads, H)), jnp.float32) for heads in (N, K, K, N)
    )


def segments(T: int) -> jax.Array:
    """Documents of several lengths, one of them a single token; row 1 is reversed."""
    cuts = [T // 5, T // 5 + 1, T // 2 + 3, T - 7]
    ids = np.searchsorted(cuts, np.arange(T), side="right")
    return jnp.asarray(np.stack([ids, ids[::-1]]), jnp.int32)


def run(backend: str, given: Arrays, ids: jax.Array | None, **window: Any) -> Arrays:
    """Output and gradients of q, k and v, on the mesh in context."""

    def all_of_them(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        inside = None if ids is None else documents(ids)
        attend = partial(causal_attention, inside=inside, backend=backend, **window)
        out, gradients = jax.vjp(attend, q, k, v)
        return out, *gradients(dout)

    return jax.jit(all_of_them)(*given)


def check(found: Arrays, expected: Arrays) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_documents_grouped_heads_and_a_window() -> None:
    """A length that blocks do not divide."""
    given, ids = inputs(200, 4, 2, 16), segments(200)
    check(run("splash", given, ids, sliding_window=50), run("xla", given, ids, sliding_window=50))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1, 130, 1000])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("T", "N", "K", "H"), [(640, 2, 2, 64), (256, 4, 1, 32), (1, 2, 1, 16)])
def test_values_and_gradients(
    T: int, N: int, K: int, H: int, packed: bool, window: int | None
) -> None:
    given, ids = inputs(T, N, K, H), segments(T) if packed else None
    check(
        run("splash", given, ids, sliding_window=window),
        run("xla", given, ids, sliding_window=window),
    )


@pytest.mark.slow
@pytest.mark.parametrize("has_window", [False, True])
@pytest.mark.parametrize("context", [1, 2])
def test_layers_of_which_some_have_a_window(context: int, has_window: bool) -> None:
    """The program learns only when it runs whether the layer has the window."""
    given, ids = inputs(384, 4, 2, 16), segments(384)
    window = {"sliding_window": 70, "has_window": jnp.asarray(has_window)}
    expected = run("xla", given, ids, sliding_window=70 if has_window else None)
    mesh = build_mesh(dict.fromkeys(AXES, 1) | {"context": context}, jax.devices()[:context])
    with jax.set_mesh(mesh):
        check(run("splash", given, ids, **window), expected)


MESHES = [
    (d, f, c, 8 // (d * f * c))
    for d in (1, 2, 4, 8)
    for f in (1, 2, 4, 8)
    for c in (1, 2, 4, 8)
    if d * f * c <= 8
]
# Rows are split over data and fsdp alike, so one pair of sizes stands for each number of parts.
PAIRS = ((1, 1), (1, 2), (2, 2), (4, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "meshes"),
    [
        (264, [sizes for sizes in MESHES if sizes[:2] in PAIRS]),
        pytest.param(264, MESHES, marks=pytest.mark.exhaustive),
        pytest.param(512, MESHES, marks=pytest.mark.exhaustive),
    ],
    ids=["264", "264 everywhere", "512 everywhere"],
)
def test_every_mesh_of_8_devices(length: int, meshes: list[tuple[int, ...]]) -> None:
    """With documents and a window; 264 / 8 is no multiple of a block."""
    rng = np.random.default_rng(1)
    given = tuple(
        jnp.asarray(rng.normal(size=(8, length, heads, 16)), jnp.float32) for heads in (8, 8, 8, 8)
    )
    ids = jnp.tile(segments(length), (4, 1))
    expected = run("xla", given, ids, sliding_window=100)
    assert len(meshes) == (20 if meshes is MESHES else 10)
    for sizes in meshes:
        with jax.set_mesh(build_mesh(dict(zip(AXES, sizes, strict=True)))):
            check(run("splash", given, ids, sliding_window=100), expected)
