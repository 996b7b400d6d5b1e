"""Moments in the host's memory: each update takes them to the device and back, one layer at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from consyn_jax.config import UserError
from consyn_jax.model.parameters import Layout, Params
from consyn_jax.training.guard import counts
from consyn_jax.training.optimizer import of_parameters
from consyn_jax.training.step import Metrics, TrainState, Update

HOST_RULES = ("adamw", "lion", "muon", "sgd")
LAYERS, REST, SHARED = "layers", "rest", "shared"  # of what an array is: of all layers, of anything else, of no parameter


def check_rule(optimizer: str, dtype: Any) -> None:
    """Raise UserError for what has no update by layers: an optimizer whose state is more than moments, or float16's scale of the loss."""
    if optimizer not in HOST_RULES:
        raise UserError(f"--optimizer_memory host is for {', '.join(HOST_RULES)}, not for {optimizer}. Use one of them, or --optimizer_memory device.")
    if dtype == jnp.float16:
        raise UserError("--optimizer_memory host does not go with float16. Use --mixed_precision bf16 or no, or --optimizer_memory device.")


def in_host_memory(place: NamedSharding) -> NamedSharding:
    """The same part of an array, in the memory of the host."""
    kind = "pinned_host"
    there = place.with_memory_kind(kind)
    # JAX drops the kind of memory for devices that are only described; by the abstract mesh the program is compiled for it all the same
    return there if there.memory_kind == kind else NamedSharding(place.mesh.abstract_mesh, place.spec, memory_kind=kind)


def streamed(rule: optax.GradientTransformation, layout: Layout) -> Update:
    """The update by `rule`, whose moments lie in the host's memory. A step that does not count (`guard.counts`) moves nothing.

    At any time the device holds the moments of one layer, or of all that is in no layer. `rule` is applied to the tree of the whole model,
    in which all layers but one, or all but the layers, have size 0; so what it does to a layer must not depend on the others.
    """
    rule = optax.with_extra_args_support(rule)
    kinds = jax.tree.map(lambda axes: LAYERS if LAYERS in axes else REST, layout.logical_axes, is_leaf=lambda a: isinstance(a, tuple))
    state_kinds = of_parameters(jax.eval_shape(rule.init, layout.shapes), layout.shapes, kinds, SHARED)
    num_layers = next(shape.shape[0] for shape, kind in zip(jax.tree.leaves(layout.shapes), jax.tree.leaves(kinds), strict=True) if kind == LAYERS)

    def change(own: str, gradients: Params, factor: Float[Array, ""], number: Any, carry: tuple[Params, Any]) -> tuple[Params, Any]:
        params, state = carry

        def cut(kind: str, x: jax.Array) -> jax.Array:
            if kind not in (own, SHARED):
                return jnp.zeros((0, *x.shape[1:]), x.dtype)
            return jax.lax.dynamic_slice_in_dim(x, number, 1) if kind == LAYERS else x

        def paste(kind: str, x: jax.Array, new: jax.Array) -> jax.Array:
            if (kind == LAYERS) != (own == LAYERS):  # what is shared changes with the rest, once
                return x
            return jax.lax.dynamic_update_slice_in_dim(x, new, number, 0) if kind == LAYERS else new

        def move(space: Any, kind: str, x: jax.Array) -> jax.Array:
            return x if kind == SHARED else jax.device_put(x, space)

        before = jax.tree.map(lambda kind, x: move(jax.memory.Space.Device, kind, cut(kind, x)), state_kinds, state)
        part = jax.tree.map(cut, kinds, params)
        scaled = jax.tree.map(lambda kind, g: cut(kind, g) * factor, kinds, gradients)
        updates, after = rule.update(scaled, before, part, layer=number if own == LAYERS else None)
        after = jax.tree.map(partial(move, jax.memory.Space.Host), state_kinds, after)
        return jax.tree.map(paste, kinds, params, optax.apply_updates(part, updates)), jax.tree.map(paste, state_kinds, state, after)

    def update(gradients: Params, factor: Float[Array, ""], state: TrainState, metrics: Metrics) -> tuple[Params, optax.OptState]:
        carry, taken = (state.params, state.opt_state), counts(state, metrics)
        for own, times in ((LAYERS, num_layers), (REST, 1)):
            carry = jax.lax.fori_loop(0, jnp.where(taken, times, 0), partial(change, own, gradients, factor), carry)
        return carry

    return update
