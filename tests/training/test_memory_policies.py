"""Rematerialisation changes no result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from consyn_jax.config import REMAT_POLICIES
from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.program import Program
from consyn_jax.training.step import accumulate

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=32,
    context=16,
)
LAYOUT = layout(CONFIG)
ONE = build_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])


def numbers(seed: int, size: float) -> Params:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32), LAYOUT.shapes
    )


def batch(accumulation: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(2).integers(0, 50, (accumulation, 2, 17)).astype(np.int32)
    ones = np.ones((accumulation, 2, 16), np.int32)
    return {
        "input_ids": ids[..., :-1],
        "labels": ids[..., 1:],
        "segment_ids": ones,
        "loss_mask": ones > 0,
    }


def gradients(remat: str) -> tuple[Any, Params]:
    program = Program(CONFIG, Compute(remat=remat), optax.sgd(0.1), 1.0, ONE)
    run = jax.jit(lambda p, b: accumulate(program.objective, p, b)[:2])
    return run(numbers(0, 0.2), batch(2))


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Params]:
    return gradients("none")


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT_POLICIES[1:])
def test_every_policy_gives_the_same_loss_and_gradients(
    remat: str, plain: tuple[Any, Params]
) -> None:
    (sums, found), (expected_sums, expected) = gradients(remat), plain
    assert float(sums.nll) == pytest.approx(float(expected_sums.nll), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)
