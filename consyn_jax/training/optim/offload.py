"""Optimizer offload: keep the moments in host memory, and move them to devices layer by layer."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Layout, Params, map_axes
from consyn_jax.optimizer_config import OPTIMIZERS
from consyn_jax.training.optim.skip_nonfinite import updates_state
from consyn_jax.training.optim.state import of_parameters
from consyn_jax.training.step import Metrics, TrainState, Update

# Kinds of arrays: for a parameter stacked over layers, for another parameter, for no parameter.
LAYERS, REST, SHARED = "layers", "rest", "shared"


def check_offload(optimizer: str, dtype: Any, platform: str) -> None:
    """Check that the parameters of a run can be updated layer by layer.

    Args:
        platform: Platform of the devices, as in `jax.Device.platform`.

    Raises:
        UserError: The run is on TPUs, for which the update does not compile; or the optimizer needs
            all layers at once; or the run computes in float16, whose loss scale needs a copy of the
            whole state.
    """
    if platform == "tpu":
        raise UserError(
            "--optimizer_memory host does not work on TPUs. Use --optimizer_memory device, with "
            "more chips or --moment_dtype bfloat16 if the moments do not fit."
        )
    if not OPTIMIZERS[optimizer].layerwise:
        usable = [name for name, rule in OPTIMIZERS.items() if rule.layerwise]
        raise UserError(
            f"--optimizer_memory host is for {', '.join(usable)}, not for {optimizer}. Use one of "
            "these optimizers, or --optimizer_memory device."
        )
    if dtype == jnp.float16:
        raise UserError(
            "--optimizer_memory host does not work with float16. Use --mixed_precision bf16 or no, "
            "or --optimizer_memory device."
        )


def in_host_memory(place: NamedSharding) -> NamedSharding:
    """Return the same sharding, but in host memory."""
    kind = "pinned_host"
    there = place.with_memory_kind(kind)
    if there.memory_kind == kind:
        return there
    # For described devices, JAX drops the kind of memory from a sharding, unless the sharding has
    # an abstract mesh.
    return NamedSharding(place.mesh.abstract_mesh, place.spec, memory_kind=kind)


class _Part(NamedTuple):
    """The parameters that one update changes: a layer, or all parameters outside the layers.

    Attributes:
        number: Index of the layer; None for all parameters outside the layers.
    """

    number: Any

    @property
    def kind(self) -> str:
        return REST if self.number is None else LAYERS

    def cut(self, kind: str, x: jax.Array) -> jax.Array:
        """Select the elements of `x` for this update: one layer, all, or none (an empty array)."""
        if kind not in (self.kind, SHARED):
            return jnp.zeros((0, *x.shape[1:]), x.dtype)
        return jax.lax.dynamic_slice_in_dim(x, self.number, 1) if kind == LAYERS else x

    def paste(self, kind: str, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return `x` with the updated elements replaced by `new`.

        An array of kind `SHARED`, such as a step counter, changes only in the update of the
        parameters outside the layers.
        """
        if (kind == LAYERS) != (self.kind == LAYERS):
            return x
        if kind == LAYERS:
            return jax.lax.dynamic_update_slice_in_dim(x, new, self.number, 0)
        return new


def layerwise_update(rule: optax.GradientTransformation, layout: Layout) -> Update:
    """Make an update that applies `rule` to one layer at a time, then to the other parameters.

    The moments of `rule` are in host memory. The device holds the moments of one layer at a time,
    or of all parameters outside the layers. In each call, the rule gets a tree with the structure
    of the whole model, where arrays that are not updated have size 0. So the update of a layer must
    not depend on other layers. If a step does not change the state, nothing is copied between host
    and device.
    """
    rule = optax.with_extra_args_support(rule)
    kinds = map_axes(lambda axes: LAYERS if LAYERS in axes else REST, layout.logical_axes)
    state_like = jax.eval_shape(rule.init, layout.shapes)
    state_kinds = of_parameters(state_like, layout.shapes, kinds, SHARED)
    num_layers = jax.tree.leaves(layout.shapes["layers"])[0].shape[0]

    def move(space: Any, kind: str, x: jax.Array) -> jax.Array:
        return x if kind == SHARED else jax.device_put(x, space)

    to_device = partial(move, jax.memory.Space.Device)
    to_host = partial(move, jax.memory.Space.Host)

    def change(
        part: _Part, gradients: Params, factor: Float[Array, ""], carry: tuple[Params, Any]
    ) -> tuple[Params, Any]:
        params, state = carry
        before = jax.tree.map(
            lambda kind, x: to_device(kind, part.cut(kind, x)), state_kinds, state
        )
        own = jax.tree.map(part.cut, kinds, params)
        scaled = jax.tree.map(lambda kind, g: part.cut(kind, g) * factor, kinds, gradients)
        updates, after = rule.update(scaled, before, own, layer=part.number)
        after = jax.tree.map(to_host, state_kinds, after)
        params = jax.tree.map(part.paste, kinds, params, optax.apply_updates(own, updates))
        return params, jax.tree.map(part.paste, state_kinds, state, after)

    def update(
        gradients: Params, factor: Float[Array, ""], state: TrainState, metrics: Metrics
    ) -> tuple[Params, optax.OptState]:
        carry, changes = (state.params, state.opt_state), updates_state(state, metrics)
        layers, rest = jnp.where(changes, num_layers, 0), jnp.where(changes, 1, 0)
        carry = jax.lax.fori_loop(
            0, layers, lambda i, carry: change(_Part(i), gradients, factor, carry), carry
        )
        return jax.lax.fori_loop(
            0, rest, lambda _, carry: change(_Part(None), gradients, factor, carry), carry
        )

    return update
