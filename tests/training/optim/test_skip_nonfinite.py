"""What the device does to the state after a step that is not finite."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.parameters import Params, initial_parameters
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.training import program as module
from consyn_jax.training.loss import LossSums
from consyn_jax.training.optim.skip_nonfinite import HALTED, skip_nonfinite
from consyn_jax.training.optim.state import with_update_count
from consyn_jax.training.precision import make_scaled_train_step, with_loss_scale
from consyn_jax.training.program import TRAIN_AXES, Program
from consyn_jax.training.step import Batch, Step, TrainState, make_train_step

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_dim=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
)
A, B, T = 1, 8, 16
BAD = 99  # a label


def squares(params: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
    """Half the squared distance to each label; NaN for a label `BAD`."""
    labels = batch["labels"].astype(jnp.float32)
    nll = jnp.sum(0.5 * (params["x"] - jnp.where(labels == BAD, jnp.nan, labels)) ** 2)
    return nll, LossSums(nll, jnp.float32(labels.size), jnp.float32(0))


def of(*labels: int) -> Batch:
    return {
        "labels": jnp.array(labels).reshape(1, 1, -1),
        "loss_mask": jnp.ones((1, 1, len(labels)), bool),
    }


def run(
    step: Step, state: TrainState, batches: list[Batch]
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    step = jax.jit(step)
    for batch in batches:
        state, metrics = step(state, batch)
        yield state, {name: float(value) for name, value in metrics.items()}


def start(rule: optax.GradientTransformation) -> TrainState:
    params = {"x": jnp.float32(3.0)}
    return TrainState(jnp.int32(0), params, rule.init(params), jnp.int32(0))


def equal(one: Any, other: Any) -> bool:
    return jax.tree.all(
        jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, other)
    )


ADAM = optax.adamw(0.1)


def test_a_non_finite_step_loses_only_its_update() -> None:
    step = skip_nonfinite(make_train_step(squares, ADAM, 1.0), 5)
    good = list(run(step, start(ADAM), [of(1), of(2)]))
    mixed = list(run(step, start(ADAM), [of(1), of(BAD), of(BAD, 2), of(2)]))
    assert [int(m["nonfinite"]) for _, m in mixed] == [0, 1, 2, 0]
    assert [int(s.step) for s, _ in mixed] == [1, 2, 3, 4]
    assert [int(s.nonfinite) for s, _ in mixed] == [0, 1, 2, 0]
    assert math.isnan(mixed[1][1]["loss"])
    assert mixed[1][1]["clipped"] == 0
    for at in (1, 2):
        assert equal(mixed[at][0].params, mixed[0][0].params)
        assert equal(mixed[at][0].opt_state, mixed[0][0].opt_state)
    assert equal(mixed[3][0]._replace(step=0), good[1][0]._replace(step=0))


@pytest.mark.parametrize("limit", [1, 3])
def test_at_the_limit_the_state_stops_changing(limit: int) -> None:
    step = skip_nonfinite(make_train_step(squares, ADAM, 1.0), limit)
    states = list(run(step, start(ADAM), [of(1), *[of(BAD)] * limit, of(2), of(BAD), of(3)]))
    assert [int(m["nonfinite"]) for _, m in states[: limit + 1]] == list(range(limit + 1))
    before = states[limit - 1][0]
    assert int(before.step) == limit
    for state, _ in states[limit:]:
        assert equal(state, before._replace(nonfinite=np.int32(HALTED)))


def test_a_lower_limit_counts_from_the_next_bad_step() -> None:
    """A run can resume between non-finite steps with a lower limit."""
    (*_, (state, _)) = run(
        skip_nonfinite(make_train_step(squares, ADAM, 1.0), 10),
        start(ADAM),
        [of(1), of(BAD), of(BAD), of(BAD)],
    )
    (after, metrics), (halted, _) = run(
        skip_nonfinite(make_train_step(squares, ADAM, 1.0), 1), state, [of(2), of(BAD)]
    )
    assert (int(after.step), metrics["nonfinite"], int(after.nonfinite)) == (5, 0, 0)
    assert equal(halted, after._replace(nonfinite=np.int32(HALTED)))


def test_an_overflow_that_a_smaller_scale_may_cure_does_not_count() -> None:
    rule = with_loss_scale(ADAM)
    state = start(rule)
    state = state._replace(opt_state=state.opt_state._replace(scale=jnp.float32(4.0)))
    step = skip_nonfinite(make_scaled_train_step(squares, rule, 1.0), 2)
    states = list(run(step, state, [of(BAD), of(BAD), of(BAD), of(BAD), of(1)]))
    assert [m["loss_scale"] for _, m in states] == [4, 2, 1, 1, 1]
    assert [m["nonfinite"] for _, m in states[:4]] == [0, 0, 1, 2]
    assert int(states[2][0].opt_state.skipped_steps) == 2
    assert equal(states[4][0], states[2][0]._replace(nonfinite=np.int32(HALTED)))


def test_the_schedule_counts_only_steps_that_changed_something() -> None:
    rule = optax.sgd(lambda count: 0.1 * (count + 1.0))
    step = with_update_count(skip_nonfinite(make_train_step(squares, rule, 1.0), 5))
    steps = list(run(step, start(rule), [of(1), of(BAD), of(2), of(3)]))
    assert [int(m["updates"]) for _, m in steps] == [0, 1, 1, 2]

    scaled = with_loss_scale(rule)
    step = with_update_count(make_scaled_train_step(squares, scaled, 1.0))
    steps = list(run(step, start(scaled), [of(1), of(BAD), of(2), of(3)]))
    assert [int(m["updates"]) for _, m in steps] == [0, 1, 1, 2]


# ----------------------------------------------------------------------- whole steps of the decoder


def program(rule: optax.GradientTransformation, **axes: int) -> Program:
    mesh = build_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: math.prod(axes.values())])
    return Program(CONFIG, Compute(), rule, 1.0, mesh)


def batch_of(seed: int, p: Program) -> dict[str, jax.Array]:
    ids = np.random.default_rng(seed).integers(0, 259, (A, B, T + 1)).astype(np.int32)
    whole = {
        "input_ids": ids[..., :-1],
        "labels": ids[..., 1:],
        "segment_ids": np.ones((A, B, T), np.int32),
        "loss_mask": np.ones((A, B, T), bool),
    }
    return {
        name: jax.device_put(values, sharding(p.mesh, TRAIN_AXES)) for name, values in whole.items()
    }


@pytest.mark.slow
@pytest.mark.exhaustive
def test_with_finite_steps_the_policy_changes_no_bit_and_copies_no_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    halting = program(optax.adamw(3e-3), fsdp=2)
    skipping = replace(halting, max_nonfinite_steps=10)
    halt, skip = (p.lower_train_step(A, B, T).compile() for p in (halting, skipping))
    states = [halting.initial_state(initial_parameters(CONFIG, 0, halting.mesh)) for _ in range(2)]
    for seed in range(4):
        batch = batch_of(seed, halting)
        (states[0], expected), (states[1], found) = halt(states[0], batch), skip(states[1], batch)
        assert equal(found, expected)
    assert equal(states[0], states[1])
    monkeypatch.setattr(module, "skip_nonfinite", lambda step, limit, keeps_state: step)
    before, after = (
        halting.lower_train_step(A, B, T).compile().memory_analysis(),
        halt.memory_analysis(),
    )
    assert (
        after.alias_size_in_bytes == before.alias_size_in_bytes > 0
    )  # all of the state is donated
    # XLA on CPUs keeps the old moments until the weights are written, at worst; on GPUs one kernel
    # does all three, and nothing is kept
    assert after.temp_size_in_bytes - before.temp_size_in_bytes < 0.7 * before.alias_size_in_bytes
