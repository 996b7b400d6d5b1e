import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.training.optim.muon import ITERATIONS, _newton_schulz, _orthogonal, _together

NUMBERS = {
    "q": MuonDimensionNumbers((1,), (2, 3)),
    "k": MuonDimensionNumbers((1,), (2, 3)),
    "o": MuonDimensionNumbers((1, 2), (3,)),
    "up": MuonDimensionNumbers((1,), (2,)),
    "down": MuonDimensionNumbers((1,), (2,)),
}
SHAPES = {
    "q": (3, 16, 2, 8),
    "k": (3, 16, 1, 8),
    "o": (3, 2, 8, 16),
    "up": (3, 16, 40),
    "down": (3, 40, 16),
}


@pytest.fixture
def gradients() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {
        name: jax.random.normal(key, SHAPES[name]) for key, name in zip(keys, SHAPES, strict=True)
    }


def ours(gradients: Any) -> Any:
    rule = scale_by_muon(ns_steps=0, weight_dimension_numbers=NUMBERS)
    return _orthogonal(rule.update(gradients, rule.init(gradients))[0], NUMBERS)


@pytest.mark.users_compiler
def test_all_matrices_at_once_are_optaxs_one_by_one(gradients: dict[str, jax.Array]) -> None:
    """To the bit on a CPU."""
    rule = scale_by_muon(weight_dimension_numbers=NUMBERS)
    expected, _ = jax.jit(lambda g: rule.update(g, rule.init(g)))(gradients)
    found = jax.jit(ours)(gradients)
    for name, number in NUMBERS.items():
        sides = (np.prod([SHAPES[name][axis] for axis in side]) for side in number)
        factor = 0.2 * float(max(sides)) ** 0.5
        np.testing.assert_array_equal(found[name], factor * expected[name])


def test_equal_shapes_share_their_products() -> None:
    """As on a GPU: queries and outputs, keys, and the two of the feed-forward layer."""
    shapes = [(3, 16, 16), (3, 8, 16), (3, 16, 16), (3, 16, 40), (0, 16, 40), (3, 16, 40)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    matrices = [jax.random.normal(key, s) / 9 for key, s in zip(keys, shapes, strict=True)]
    text = jax.jit(_together).lower(matrices).as_text()
    products = re.findall(r"stablehlo\.dot_general.*-> tensor<(\S+)>", text)
    assert len(products) == 3 * 3 * ITERATIONS
    assert {product[-4:] for product in products} == {"bf16"}
    for found, x in zip(_together(matrices), matrices, strict=True):
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        wide = _newton_schulz(x)
        assert float(jnp.linalg.norm(found - wide)) <= 0.1 * float(jnp.linalg.norm(wide))


def test_devices_share_the_matrices(gradients: dict[str, jax.Array]) -> None:
    with jax.set_mesh(build_mesh(dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": 4})):
        text = jax.jit(ours).lower(gradients).compile().as_text()
        found = jax.jit(ours)(gradients)
    for name, expected in jax.jit(ours)(gradients).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
    # three matrices over eight devices: each multiplies at most one
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    sizes = [[int(size) for size in product.split(",")] for product in products]
    assert {tuple(size[-2:]) for size in sizes} == {(16, 16), (16, 40), (8, 8), (8, 16)}
    assert max(np.prod(size[:-2]) for size in sizes) <= 1


def test_bfloat16_is_precise_enough(gradients: dict[str, jax.Array]) -> None:
    """Rounding moves the update by 5 %; the iteration itself leaves singular values 0.7 to 1.2."""
    x = gradients["up"] / jnp.linalg.norm(gradients["up"], axis=(1, 2), keepdims=True)
    narrow, wide = _newton_schulz(x.astype(jnp.bfloat16)), _newton_schulz(x)
    assert float(jnp.linalg.norm(narrow - wide) / jnp.linalg.norm(wide)) < 0.1
    for found in (narrow, wide):
        values = jnp.linalg.svd(found.astype(jnp.float32), compute_uv=False)
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.25
