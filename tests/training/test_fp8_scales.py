"""The scales of fp8 in the training state: equal in any split of a batch, and exact on resume."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.errors import UserError
from consyn_jax.model.fp8.quantisation import ARRAYS, first_scales
from consyn_jax.model.parameters import initial_parameters
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.checkpointing import restoring
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.program import TRAIN_AXES, Program
from consyn_jax.training.step import TrainState

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=16,
    tie_embeddings=True,
)
ROWS, T = 8, 16


def program(fp8: bool = True, dtype: Any = jnp.bfloat16, **mesh: int) -> Program:
    sizes = dict.fromkeys(AXES, 1) | mesh
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    compute = Compute(dtype, fp8=fp8)
    return Program(CONFIG, compute, optax.adam(1e-2), 1.0, build_mesh(sizes, devices))


def begin(program: Program) -> TrainState:
    return program.initial_state(initial_parameters(CONFIG, 0, program.mesh))


def train(program: Program, state: TrainState, steps: range, accumulation: int = 1) -> TrainState:
    state = jax.tree.map(jnp.copy, state)  # because the step donates it
    step = program.lower_train_step(accumulation, ROWS // accumulation, T).compile()
    for number in steps:
        ids = np.random.default_rng(number).integers(0, 50, (ROWS, T + 1)).astype(np.int32)
        ones = np.ones((ROWS, T), np.int32)
        batch = {
            "input_ids": ids[:, :-1],
            "labels": ids[:, 1:],
            "segment_ids": ones,
            "loss_mask": ones > 0,
        }
        place = sharding(program.mesh, TRAIN_AXES)
        arrays = {k: v.reshape(accumulation, -1, T) for k, v in batch.items()}
        state, _ = step(state, jax.device_put(arrays, place))
    return state


@pytest.fixture(scope="module")
def trained() -> TrainState:
    one = program()
    return train(one, begin(one), range(4))


@pytest.mark.slow
def test_every_array_has_its_own_scale_after_a_step(trained: TrainState) -> None:
    (scales,) = trained.scales
    assert scales.shape == (CONFIG.num_layers, len(ARRAYS))
    assert bool(jnp.all(scales < first_scales(CONFIG.num_layers)))  # a tiny model's are smaller
    np.testing.assert_array_equal(np.frexp(scales)[0], 0.5)


@pytest.mark.slow
def test_micro_batches_and_meshes_do_not_change_the_scales() -> None:
    """In float32, and as powers of two, they hide the last places, in which sums differ."""
    found = []
    for mesh, accumulation in ({}, 1), ({}, 4), ({"data": 2, "fsdp": 2, "tensor": 2}, 1):
        made = program(dtype=jnp.float32, **mesh)
        found.append(train(made, begin(made), range(1), accumulation).scales[0])
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(trained: TrainState, tmp_path: Path) -> None:
    one = program()
    state = train(one, begin(one), range(2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, {})
    checkpoints.wait()
    state, _ = checkpoints.restore(2, one.state_like)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, train(one, state, range(2, 4)), trained)


class StateBeforeScales(NamedTuple):
    """The state that earlier versions saved."""

    step: Any
    params: Any
    opt_state: Any
    nonfinite: Any


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    found = Checkpoints(tmp_path)
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_checkpoints_without_scales_are_restored(fp8: bool, checkpoints: Checkpoints) -> None:
    wanted = program(fp8)
    state = begin(wanted)
    save: Any = inspect.unwrap(Checkpoints.save)  # without the check of types
    save(checkpoints, 1, StateBeforeScales(*state[:4]), {})
    checkpoints.wait()
    found, _ = checkpoints.restore(1, wanted.state_like)
    jax.tree.map(np.testing.assert_array_equal, found, state)


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_orbax_checks_the_structure(
    fp8: bool, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial restore, as of checkpoints without the field `scales`, leaves arrays out."""
    state = begin(program(fp8))
    params = state.params | {"more": {"part": jnp.ones(3)}}
    checkpoints.save(1, state._replace(params=params), {})
    checkpoints.wait()
    monkeypatch.setattr(restoring, "check_model", lambda *_: None)
    with pytest.raises(UserError, match="cannot be restored"):
        checkpoints.restore(1, program(fp8).state_like)


@pytest.mark.slow
def test_scales_are_left_out_where_the_precision_has_none(checkpoints: Checkpoints) -> None:
    """As when a step of an fp8 run is repeated in bfloat16."""
    state = begin(program())
    checkpoints.save(1, state, {})
    checkpoints.wait()
    found, _ = checkpoints.restore(1, program(fp8=False).state_like)
    assert found.scales == ()
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)


def test_scales_that_are_left_out_are_read_where_the_step_is() -> None:
    """Without a place, Orbax asks for the devices of the run that saved them."""
    like = program(fp8=False, fsdp=2).state_like
    stored = restoring._stored_scales(program().state_like.scales, like)
    assert [leaf.sharding for leaf in stored] == [like.step.sharding]


@pytest.mark.slow
def test_a_nonfinite_step_keeps_the_scales(trained: TrainState) -> None:
    """The activations of the blocks are finite, so the step alone would change their scales."""
    one = program()
    broken = trained.params | {"norm": trained.params["norm"] * jnp.nan}
    after = train(one, begin(one)._replace(params=broken, scales=trained.scales), range(1))
    assert after.nonfinite == -1
    np.testing.assert_array_equal(after.scales[0], trained.scales[0])
