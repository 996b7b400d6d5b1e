"""Whole blocks in fp8: with interpreted kernels, on meshes, in a loop, and with dropout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.fp8.quantisation import ARRAYS
from consyn_jax.model.parameters import initial_parameters
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    context=16,
    qk_norm=True,
    tie_embeddings=False,
)
ROWS, T = 4, 16
SCALES = jnp.full((CONFIG.num_layers, len(ARRAYS)), 2.0**-6)


def gradients(compute: Compute, dropout: Dropout | None = None, **sizes: int) -> Any:
    """Gradients of a sum over the hidden states, and the largest magnitudes of all arrays."""
    axes = dict.fromkeys(AXES, 1) | sizes
    mesh = build_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 64, (ROWS, T)), jnp.int32)
    weight = jnp.asarray(rng.normal(size=(ROWS, T, CONFIG.hidden_dim)), jnp.float32)

    def total(params: Any, scales: jax.Array) -> jax.Array:
        model = ConsynLMHeadModel.from_parameters(CONFIG, params)
        return jnp.sum(weight * model.hidden(ids, None, compute, dropout, scales))

    with jax.set_mesh(mesh):
        params = initial_parameters(CONFIG, 0, mesh)
        return jax.device_get(jax.jit(jax.grad(total, argnums=(0, 1)))(params, SCALES))


def check_near(found: Any, expected: Any, most: float = 1e-3) -> None:
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(got - want) <= most * np.linalg.norm(want)


@pytest.fixture(scope="module")
def expected() -> Any:
    found = gradients(Compute(fp8=True, unroll=True))
    assert np.all(found[1] > 0)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "sizes",
    [{}, {"fsdp": 2, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2}],
    ids=str,
)
def test_kernels_give_the_gradients_of_their_references(expected: Any, sizes: Any) -> None:
    """Sums in another order put few elements on the next 8-bit number."""
    check_near(gradients(Compute(attention="fused", fp8=True), **sizes), expected, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"unroll": False}, {"remat": "minimal"}, {"remat": "full"}])
def test_a_loop_and_recomputation_change_no_gradient(expected: Any, how: dict[str, Any]) -> None:
    check_near(gradients(Compute(fp8=True, **how)), expected)


@pytest.mark.slow
def test_dropout_of_nothing_changes_no_gradient(expected: Any) -> None:
    """With dropout, XLA casts the gradients of o and down after the gradient of dropout."""
    check_near(gradients(Compute(fp8=True), Dropout(jax.random.key(0), 0.0)), expected)
