"""Steps whose loss or gradients are not finite: decided on the device, so that nobody waits to know."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from consyn_jax.training.step import Batch, Metrics, Step, TrainState

HALTED = -1  # the `nonfinite` of a state that no step changes any more


def counts(state: TrainState, metrics: Metrics) -> Bool[Array, ""]:
    """Whether a step with these metrics is to change the state."""
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"]) & (state.nonfinite != HALTED)


def guarded(step: Step, limit: int, chooses: bool = True) -> Step:
    """`step`, of which only what is finite gets into the state.

    A step whose loss or gradient norm is not finite leaves parameters and optimizer as they were, and is counted. `limit` of them in a row
    halt: that step and all behind it give back the state in front of it. The host reads metrics a step late, and so still has the state to
    look at. An overflow that a smaller scale of the loss may mend (training/precision.py) is none of these; at the smallest scale it is.

    The metrics get `nonfinite`, the number of such steps in a row, this one included: 0 for a step that is finite. `clipped` is 0 for one
    that is not.

    Args:
        chooses: False for a step that by `counts` leaves parameters and optimizer as they were itself: here both would have to be held.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        after, metrics = step(state, batch)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        if "loss_scale" in metrics:
            finite |= (metrics["skipped"] > 0) & (metrics["loss_scale"] > 1)
        in_a_row = jnp.where(finite, 0, jnp.maximum(state.nonfinite, 0) + 1)
        halted = (state.nonfinite == HALTED) | (in_a_row >= limit)
        taken = finite & ~halted

        params, opt_state = after.params, after.opt_state
        if chooses:
            params, opt_state = _chosen(taken, params, state.params), _chosen(taken, opt_state, state.opt_state)
        kept = TrainState(jnp.where(halted, state.step, after.step), params, opt_state, jnp.where(halted, HALTED, in_a_row))
        return kept, metrics | {"nonfinite": in_a_row, "clipped": jnp.where(finite, metrics["clipped"], 0.0)}

    return train_step


def _chosen(first: jax.Array, one: Any, other: Any) -> Any:
    with jax.named_scope("optimizer"):
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), one, other)
