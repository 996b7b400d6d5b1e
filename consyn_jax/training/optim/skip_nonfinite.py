"""Skip the update of a step whose loss or gradients are not finite.

The decision is made on the device, so the host need not wait for the values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from consyn_jax.training.step import Batch, Metrics, Step, TrainState

HALTED = -1  # value of `TrainState.nonfinite` in a frozen state


def is_finite(metrics: Metrics) -> Bool[Array, ""]:
    """Whether the loss and the gradient norm of a step are finite."""
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])


def updates_state(state: TrainState, metrics: Metrics) -> Bool[Array, ""]:
    """Whether a step with these metrics changes the parameters and the optimizer's state."""
    return is_finite(metrics) & (state.nonfinite != HALTED)


def skip_nonfinite(step: Step, limit: int, keeps_state: bool = False) -> Step:
    """Wrap `step` so that non-finite updates are discarded.

    A step whose loss or gradient norm is not finite leaves the parameters and the optimizer's state
    unchanged, and is counted. The `limit`-th such step in a row freezes the state: this step and
    all later steps change nothing, not even the step count. The host reads metrics one step late,
    and can therefore still examine the state before the `limit`-th step. In float16, overflows do
    not count while the loss scale can still be lowered (training/precision.py).

    Two metrics change. `nonfinite` is the number of consecutive non-finite steps up to this one,
    and 0 for a finite step. `clipped` is 0 for a non-finite step.

    Args:
        keeps_state: Whether `step` itself keeps the parameters and the optimizer's state when
            `updates_state` is false. Otherwise this wrapper selects between the old and the new
            arrays, which needs memory for both.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        after, metrics = step(state, batch)
        finite = is_finite(metrics)
        if "loss_scale" in metrics:
            finite |= (metrics["skipped"] > 0) & (metrics["loss_scale"] > 1)
        in_a_row = jnp.where(finite, 0, jnp.maximum(state.nonfinite, 0) + 1)
        halted = (state.nonfinite == HALTED) | (in_a_row >= limit)
        params, opt_state = after.params, after.opt_state
        taken = finite & ~halted
        if not keeps_state:
            params = _where(taken, params, state.params)
            opt_state = _where(taken, opt_state, state.opt_state)
        kept = TrainState(
            jnp.where(halted, state.step, after.step),
            params,
            opt_state,
            jnp.where(halted, HALTED, in_a_row),
            _where(taken, after.scales, state.scales),
        )
        clipped = jnp.where(finite, metrics["clipped"], 0.0)
        return kept, metrics | {"nonfinite": in_a_row, "clipped": clipped}

    return train_step


def _where(condition: jax.Array, one: Any, other: Any) -> Any:
    with jax.named_scope("optimizer"):
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)
