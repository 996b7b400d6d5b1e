import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.loss import LossSums
from consyn_jax.training.program import Program
from consyn_jax.training.step import Batch, TrainState, accumulate, clip_factor, make_train_step

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
)
T = 16


@pytest.fixture(scope="module")
def params() -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32),
        layout(CONFIG).shapes,
    )


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """8 sequences with 16, 1, 0, 9, ... real tokens, some of two documents."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 50, (8, T)).astype(np.int32)
    real = np.array([16, 1, 0, 9, 16, 3, 0, 12])[:, None]
    at = np.arange(T)
    segments = np.where(at < real, 1 + (at >= 5), 0).astype(np.int32)
    return {
        "input_ids": ids,
        "labels": rng.integers(0, 50, (8, T)).astype(np.int32),
        "segment_ids": segments,
        "loss_mask": at < real,
    }


def gradients(
    params: Params, batch: dict[str, np.ndarray], accumulation: int
) -> tuple[LossSums, Params]:
    program = Program(
        CONFIG,
        Compute(),
        optax.sgd(1.0),
        0.0,
        build_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1]),
    )
    parts = {
        name: jnp.asarray(values.reshape(accumulation, -1, T)) for name, values in batch.items()
    }
    return jax.jit(lambda p, b: accumulate(program.objective, p, b)[:2])(params, parts)


@pytest.fixture(scope="module")
def at_once(params: Params, batch: dict[str, np.ndarray]) -> tuple[LossSums, Params]:
    return gradients(params, batch, 1)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_weighs_real_tokens_alike(
    accumulation: int,
    params: Params,
    batch: dict[str, np.ndarray],
    at_once: tuple[LossSums, Params],
) -> None:
    whole, expected = at_once
    sums, found = gradients(params, batch, accumulation)
    assert sums.tokens == whole.tokens == 57
    assert sums.correct == whole.correct
    assert float(sums.nll) == pytest.approx(float(whole.nll), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


@pytest.mark.users_compiler
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs(max_norm: float) -> None:
    rng = np.random.default_rng(2)
    values = {
        "a": rng.normal(size=(4, 5)).astype(np.float32),
        "b": rng.normal(size=3).astype(np.float32),
    }
    theirs = [torch.nn.Parameter(torch.zeros(v.shape)) for v in values.values()]
    for parameter, value in zip(theirs, values.values(), strict=True):
        parameter.grad = torch.tensor(value)
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    ours = jax.tree.map(jnp.asarray, values)
    assert float(optax.tree.norm(ours)) == pytest.approx(norm.item(), rel=1e-6)
    factor = clip_factor(optax.tree.norm(ours), max_norm)
    for value, parameter in zip(ours.values(), theirs, strict=True):
        np.testing.assert_allclose(value * factor, parameter.grad, rtol=1e-6)


def test_without_a_maximum_gradients_are_not_scaled() -> None:
    assert clip_factor(jnp.float32(1e7), 0.0) == 1


def squares(params: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
    """A loss of one number: half the squared distance to each label."""
    distance = params["x"] - batch["labels"].astype(jnp.float32)
    nll = jnp.sum(0.5 * distance**2 * batch["loss_mask"])
    return nll, LossSums(nll, jnp.sum(batch["loss_mask"], dtype=jnp.float32), jnp.float32(0))


def one_step(
    labels: list[float], mask: list[bool], max_grad_norm: float
) -> tuple[TrainState, dict[str, jax.Array]]:
    optimizer = optax.sgd(0.1)
    params = {"x": jnp.float32(2.0)}
    state = TrainState(jnp.int32(7), params, optimizer.init(params), jnp.int32(0))
    batch = {
        "labels": jnp.array(labels).reshape(2, 1, -1),
        "loss_mask": jnp.array(mask).reshape(2, 1, -1),
    }
    return make_train_step(squares, optimizer, max_grad_norm)(state, batch)


def test_a_step_is_the_gradient_of_the_mean_over_real_tokens() -> None:
    state, metrics = one_step([1, 5, 0, 9], [True, True, True, False], 0.0)
    assert state.step == 8
    assert float(metrics["loss"]) == pytest.approx((0.5 + 4.5 + 2) / 3)
    assert float(metrics["grad_norm"]) == pytest.approx(0.0, abs=1e-6)
    assert int(metrics["tokens"]) == 3
    state, metrics = one_step([0, 0, 0, 9], [True, True, True, False], 0.0)
    assert float(state.params["x"]) == pytest.approx(2.0 - 0.1 * 2.0)


def test_the_norm_is_reported_before_clipping() -> None:
    state, metrics = one_step([0, 0, 0, 0], [True] * 4, 0.5)
    assert (float(metrics["grad_norm"]), float(metrics["clipped"])) == (pytest.approx(2.0), 1)
    assert float(state.params["x"]) == pytest.approx(2.0 - 0.1 * 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "limit"),
    [([0, 0, 0, 0], 2.0), ([0, 0, 0, 0], 3.0), ([0, 0, 0, -math.inf], 0.0)],
    ids=["at the limit", "below it", "infinite, without a limit"],
)
def test_gradients_that_are_not_scaled_do_not_count_as_clipped(
    labels: list[float], limit: float
) -> None:
    assert float(one_step(labels, [True] * 4, limit)[1]["clipped"]) == 0


def test_a_batch_without_tokens_changes_nothing() -> None:
    state, metrics = one_step([1, 2, 3, 4], [False] * 4, 1.0)
    assert (float(metrics["loss"]), float(metrics["tokens"]), float(metrics["grad_norm"])) == (
        0,
        0,
        0,
    )
    assert float(state.params["x"]) == 2.0
