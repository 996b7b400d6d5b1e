"""What saves memory changes no result: recomputation, gradients added up in place, moments in the host's memory."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from consyn_jax.config import REMAT_POLICIES, ModelConfig, UserError
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model import transformer
from consyn_jax.model.parameters import Params, initial_parameters, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpoint import Checkpoints
from consyn_jax.training.host_state import streamed
from consyn_jax.training.optimizer import build_optimizer, decay_mask
from consyn_jax.training.program import TRAIN_AXES, Program, build_program
from consyn_jax.training.step import TrainState, accumulate

CONFIG = ModelConfig(vocab_size=50, hidden_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, context=16)
LAYOUT = layout(CONFIG)
ONE = build_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])


def adam(dtype: str = "float32", name: str = "adamw") -> optax.GradientTransformation:
    axes = LAYOUT.logical_axes
    return build_optimizer(name, 0.1, beta1=0.9, beta2=0.95, weight_decay=0.1, mask=decay_mask(axes), moment_dtype=dtype, logical_axes=axes)


def numbers(seed: int, size: float) -> Params:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32), LAYOUT.shapes)


def batch(accumulation: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(2).integers(0, 50, (accumulation, 2, 17)).astype(np.int32)
    ones = np.ones((accumulation, 2, 16), np.int32)
    return {"input_ids": ids[..., :-1], "labels": ids[..., 1:], "segment_ids": ones, "loss_mask": ones > 0}


# -------------------------------------------------------------------------------------------------------------------- recomputation


def gradients(remat: str) -> tuple[Any, Params]:
    program = Program(CONFIG, Compute(remat=remat), adam(), 1.0, ONE)
    return jax.jit(lambda p, b: accumulate(program.objective, p, b))(numbers(0, 0.2), batch(2))


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Params]:
    return gradients("none")


@pytest.mark.parametrize("remat", REMAT_POLICIES[1:])
def test_every_policy_gives_the_same_loss_and_gradients(remat: str, plain: tuple[Any, Params]) -> None:
    (sums, found), (expected_sums, expected) = gradients(remat), plain
    assert float(sums.nll) == pytest.approx(float(expected_sums.nll), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


def test_all_names_are_known() -> None:
    assert {"none", *transformer.REMAT_POLICIES} == set(REMAT_POLICIES)


# ------------------------------------------------------------------------------------------------------------------- host's memory


def on_host(rule: optax.GradientTransformation) -> Program:
    return Program(CONFIG, Compute(), rule, 1.0, ONE, host_moments=True)


def kinds(state: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.size > 15}  # Muon has 15 constants


def updated(rule: optax.GradientTransformation) -> Any:
    """`streamed` by itself."""

    def update(gradients: Params, opt_state: Any, params: Params, norm: float) -> tuple[Params, Any]:
        state = TrainState(jnp.int32(0), params, opt_state, jnp.int32(0))
        return streamed(rule, LAYOUT)(gradients, jnp.float32(1), state, {"loss": jnp.float32(1), "grad_norm": jnp.float32(norm)})

    return update


@pytest.mark.parametrize("name", ["adamw", "lion", pytest.param("muon", marks=pytest.mark.slow), "sgd"])
def test_layers_one_by_one_are_updated_as_all_at_once(name: str) -> None:
    rule, params = adam(name=name), numbers(0, 0.2)
    program = on_host(rule)
    state = program.initial_state(params).opt_state
    assert kinds(state) == {"pinned_host"}

    def at_once(gradients: Params, state: Any, params: Params) -> tuple[Params, Any]:
        updates, state = rule.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    expected, usual, update = params, rule.init(params), jax.jit(updated(rule))
    for step in range(2):
        expected, usual = jax.jit(at_once)(numbers(step + 1, 1.0), usual, expected)
        params, state = update(numbers(step + 1, 1.0), state, params, 1.0)
    assert kinds(state) == {"pinned_host"}
    for ours, theirs in zip(jax.tree.leaves((params, state)), jax.tree.leaves((expected, usual)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    after = update(numbers(3, 1.0), state, params, jnp.inf)
    jax.tree.map(np.testing.assert_array_equal, after, (params, state))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_each_layer_rounds_its_moments_with_numbers_of_its_own() -> None:
    rule = adam("bfloat16")
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), LAYOUT.shapes)
    state = on_host(rule).initial_state(params).opt_state
    _, state = jax.jit(updated(rule))(jax.tree.map(lambda p: 0.3 * p, params), state, params, 1.0)
    first, second = np.asarray(state[0].nu["layers"]["gate"]).astype(np.float32)
    assert np.mean(first != second) > 0.1
    np.testing.assert_allclose(first.mean(), 0.05 * 0.09, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_with_moments_on_the_host_is_saved_and_goes_on(tmp_path: Path) -> None:
    mesh = build_mesh(dict.fromkeys(AXES, 1) | {"fsdp": 2}, jax.devices()[:2])
    taken = {name: jax.device_put(values, sharding(mesh, TRAIN_AXES)) for name, values in batch(2).items()}
    states, losses = {}, {}
    for host in (False, True):
        program = Program(CONFIG, Compute(), adam(), 1.0, mesh, host_moments=host)
        step, state = program.lower_train_step(2, 2, 16).compile(), program.initial_state(initial_parameters(CONFIG, 1, mesh))
        for number in range(4):
            if host and number == 2:
                with_two = Checkpoints(tmp_path)
                with_two.save(2, state, {})
                with_two.wait()
                state, _ = with_two.restore(2, program.state_like)
                with_two.close()
            state, metrics = step(state, taken)
            losses[host, number] = float(metrics["loss"])
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, program.state_like)
        states[host] = jax.device_get(state)
    assert kinds(state.opt_state) == {"pinned_host"}
    for number in range(4):
        assert losses[True, number] == pytest.approx(losses[False, number], rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(states[True]), jax.tree.leaves(states[False]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    bad = jax.tree.map(lambda p: p * jnp.nan, state.params)
    before = jax.device_get(state.opt_state)
    state, metrics = step(state._replace(params=bad), taken)
    assert int(metrics["nonfinite"]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": "adafactor"}, "--optimizer_memory host is for adamw, lion, muon, sgd, not for adafactor"),
        ({"optimizer": "schedule_free_adamw"}, "not for schedule_free_adamw"),
        ({"mixed_precision": "fp16"}, "does not go with float16"),
    ],
)
def test_what_has_no_update_by_layers_is_refused(changes: dict[str, Any], sentence: str) -> None:
    run, _ = resolve({"model": "haiku", "max_tokens": 16, "optimizer_memory": "host", **changes})
    with pytest.raises(UserError, match=sentence):
        build_program(CONFIG, run, optax.constant_schedule(1.0), jax.devices()[:1])
