from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Params, initial_parameters, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import OPTIMIZERS, OptimizerOptions
from consyn_jax.resolve import resolve
from consyn_jax.training import program as program_module
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.optim.offload import layerwise_update
from consyn_jax.training.optim.optimizers import build_optimizer
from consyn_jax.training.program import TRAIN_AXES, Program, build_program
from consyn_jax.training.step import TrainState

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


def adam(dtype: str = "float32", name: str = "adamw") -> optax.GradientTransformation:
    options = OptimizerOptions(optimizer=name, beta2=0.95, weight_decay=0.1, moment_dtype=dtype)
    return build_optimizer(options, 0.1, LAYOUT.logical_axes)


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


def on_host(rule: optax.GradientTransformation) -> Program:
    return Program(CONFIG, Compute(), rule, 1.0, ONE, host_moments=True)


def kinds(state: Any) -> set[str]:
    """Where the moments are; Muon also has 15 constants."""
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.size > 15}


def updated(rule: optax.GradientTransformation) -> Any:
    """`layerwise_update` as a function of gradients, state and parameters."""

    def update(
        gradients: Params, opt_state: Any, params: Params, norm: float
    ) -> tuple[Params, Any]:
        state = TrainState(jnp.int32(0), params, opt_state, jnp.int32(0))
        return layerwise_update(rule, LAYOUT)(
            gradients,
            jnp.float32(1),
            state,
            {"loss": jnp.float32(1), "grad_norm": jnp.float32(norm)},
        )

    return update


def test_a_layer_is_updated_with_its_own_number_and_the_scaled_gradients() -> None:
    """The rule adds the number of the layer to the gradient; it keeps nothing in between."""

    def change(updates: Any, state: Any, _: Any = None, *, layer: Any) -> tuple[Any, Any]:
        number = 50.0 if layer is None else layer
        return jax.tree.map(lambda u: u + number, updates), state

    rule = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), change)
    axes = {"layers": {"w": ("layers", "embed")}, "norm": ("embed",)}
    like = {
        "layers": {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32)},
        "norm": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    own = LAYOUT._replace(shapes=like, logical_axes=axes)
    params, gradients = (
        jax.tree.map(
            lambda leaf, seed=seed: jax.random.normal(jax.random.key(seed), leaf.shape), like
        )
        for seed in (0, 1)
    )
    state = TrainState(jnp.int32(0), params, rule.init(params), jnp.int32(0))
    finite = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}
    found, _ = jax.jit(layerwise_update(rule, own))(gradients, jnp.float32(0.25), state, finite)
    number = {"layers": {"w": jnp.arange(3.0)[:, None]}, "norm": 50.0}
    jax.tree.map(
        lambda ours, p, g, n: np.testing.assert_allclose(ours, p + 0.25 * g + n, rtol=1e-6),
        *(found, params, gradients, number),
    )


def test_the_step_has_the_limits_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made, skipping = Mock(), Mock()
    monkeypatch.setattr(program_module, "make_step", made)
    monkeypatch.setattr(program_module, "skip_nonfinite", skipping)
    replace(on_host(adam()), max_grad_norm=0.7, max_nonfinite_steps=4).train_step()
    assert made.call_args.args[2] == 0.7
    skipping.assert_called_once_with(made.return_value, 4, keeps_state=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "muon" else [])
        for name, rule in OPTIMIZERS.items()
        if rule.layerwise
    ],
)
def test_updating_layer_by_layer_is_updating_all_at_once(name: str) -> None:
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
    for ours, theirs in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves((expected, usual)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    after = update(numbers(3, 1.0), state, params, jnp.inf)
    jax.tree.map(np.testing.assert_array_equal, after, (params, state))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_each_layer_draws_its_own_numbers_to_round_its_moments() -> None:
    rule = adam("bfloat16")
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), LAYOUT.shapes)
    state = on_host(rule).initial_state(params).opt_state
    _, state = jax.jit(updated(rule))(jax.tree.map(lambda p: 0.3 * p, params), state, params, 1.0)
    first, second = np.asarray(state[0].nu["layers"]["gate"]).astype(np.float32)
    assert np.mean(first != second) > 0.1
    np.testing.assert_allclose(first.mean(), 0.05 * 0.09, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_with_moments_on_the_host_is_saved_and_continues(tmp_path: Path) -> None:
    mesh = build_mesh(dict.fromkeys(AXES, 1) | {"fsdp": 2}, jax.devices()[:2])
    taken = {
        name: jax.device_put(values, sharding(mesh, TRAIN_AXES))
        for name, values in batch(2).items()
    }
    states, losses = {}, {}
    for host in (False, True):
        program = Program(CONFIG, Compute(), adam(), 1.0, mesh, host_moments=host)
        step, state = (
            program.lower_train_step(2, 2, 16).compile(),
            program.initial_state(initial_parameters(CONFIG, 1, mesh)),
        )
        for number in range(4):
            if host and number == 2:
                with_two = Checkpoints(tmp_path)
                with_two.save(2, state, {})
                with_two.wait()
                state, _ = with_two.restore(2, program.state_like)
                with_two.close()
            state, metrics = step(state, taken)
            losses[host, number] = float(metrics["loss"])
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
            lambda leaf: leaf.sharding, program.state_like
        )
        states[host] = jax.device_get(state)
    assert kinds(state.opt_state) == {"pinned_host"}
    for number in range(4):
        assert losses[True, number] == pytest.approx(losses[False, number], rel=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(states[True]), jax.tree.leaves(states[False]), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    bad = jax.tree.map(lambda p: p * jnp.nan, state.params)
    before = jax.device_get(state.opt_state)
    state, metrics = step(state._replace(params=bad), taken)
    assert int(metrics["nonfinite"]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"optimizer": "adafactor"},
            "--optimizer_memory host is for adamw, lion, muon, sgd, cautious_adamw, not for "
            "adafactor",
        ),
        ({"optimizer": "schedule_free_adamw"}, "not for schedule_free_adamw"),
        ({"mixed_precision": "fp16"}, "does not work with float16"),
    ],
)
def test_rules_that_cannot_update_by_layer_are_refused(
    changes: dict[str, Any], sentence: str
) -> None:
    run, _ = resolve({"model": "haiku", "max_tokens": 16, "optimizer_memory": "host", **changes})
    with pytest.raises(UserError, match=sentence):
        build_program(
            CONFIG,
            run.budget,
            run.hardware,
            run.optimizer,
            run.regularisation,
            length=run.length,
            schedule=optax.constant_schedule(1.0),
            devices=jax.devices()[:1],
        )
