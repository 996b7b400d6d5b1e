"""Read and change the state of an optimizer, and match its arrays to parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from consyn_jax.model.parameters import Params
from consyn_jax.training.step import Batch, Metrics, Step, TrainState


class RateScale(NamedTuple):
    """State of `scale_by_plateau`: the factor that multiplies the updates."""

    scale: Float[Array, ""]


def scale_by_plateau() -> optax.GradientTransformation:
    """Optax transformation that multiplies updates by a factor in its state, initially 1.

    `with_rate_scale` changes the factor.
    """

    def update(updates: Any, state: RateScale, params: Any = None) -> tuple[Any, RateScale]:
        return jax.tree.map(lambda u: u * state.scale, updates), state

    return optax.GradientTransformation(lambda params: RateScale(jnp.ones((), jnp.float32)), update)


def with_rate_scale(opt_state: optax.OptState, scale: float) -> optax.OptState:
    """Replace the factor of `scale_by_plateau`; keep its sharding for the compiled step."""

    def replace(part: Any) -> Any:
        if not isinstance(part, RateScale):
            return part
        return RateScale(jax.device_put(np.float32(scale), part.scale.sharding))

    return jax.tree.map(replace, opt_state, is_leaf=lambda part: isinstance(part, RateScale))


def with_update_count(step: Step) -> Step:
    """Wrap `step` so that its metrics include `updates`, the number of updates before the step.

    The number is the optimizer's own count, which does not include skipped steps. The step does not
    return the learning rate instead, because that would change how XLA compiles the update.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counter = _find(optax.ScaleByScheduleState, state.opt_state)
        after, metrics = step(state, batch)
        return after, metrics | {"updates": counter.count}

    return train_step


def evaluation_params(opt_state: optax.OptState, params: Params) -> Params:
    """Return the parameters to evaluate and to export.

    For schedule-free training, these are the averaged parameters; otherwise they are `params`. The
    average takes a few operations per element, so calls should be compiled.
    """
    average = _find(ScheduleFreeState, opt_state)
    return params if average is None else averaged(params, average.b1, average.z)


def averaged(params: Params, weight: Float[Array, ""], z: Params) -> Params:
    """Compute schedule-free training's average from the trained parameters and the iterate `z`."""
    blank = jnp.zeros(())
    state = ScheduleFreeState(weight, blank, blank, blank, optax.EmptyState(), z)
    return schedule_free_eval_params(state, params)


def _find(kind: type, opt_state: optax.OptState) -> Any:
    """Find the first part of an optimizer's state of type `kind`; None if there is none."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, kind))
    return next((part for part in parts if isinstance(part, kind)), None)


def place_state(
    opt_state: optax.OptState, shapes: Params, shardings: Params, otherwise: Any
) -> optax.OptState:
    """Add shardings to the shapes of an optimizer's state.

    Moments get the sharding of their parameter in `shardings`. All other arrays, such as counts and
    Adafactor's row and column factors, get the sharding `otherwise`.
    """
    places = of_parameters(opt_state, shapes, shardings, otherwise)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        opt_state,
        places,
    )


def of_parameters(opt_state: optax.OptState, shapes: Params, values: Any, otherwise: Any) -> Any:
    """Map each array of an optimizer's state to the value of the parameter that it belongs to.

    An array belongs to a parameter if its path ends with the path of the parameter, and both have
    the same shape.

    Args:
        values: Tree with one value per parameter; a value must not be a tree itself.
        otherwise: Value for arrays that belong to no parameter.

    Returns:
        A tree of values in the structure of `opt_state`.
    """
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    known = {
        path: (leaf.shape, value)
        for (path, leaf), value in zip(paths, jax.tree.leaves(values), strict=True)
    }

    def find(path: Any, leaf: Any) -> Any:
        own = next((known[path[i:]] for i in range(len(path)) if path[i:] in known), None)
        return own[1] if own is not None and own[0] == leaf.shape else otherwise

    return jax.tree_util.tree_map_with_path(find, opt_state)


def new_state(
    rule: optax.GradientTransformation, params: Params, shardings: Any, one_by_one: bool
) -> Any:
    """Create the state of `rule` at step 0.

    Args:
        one_by_one: Whether to create one array at a time, and move it to the host before the next
            array is created.
    """
    if not one_by_one:
        return jax.jit(rule.init, out_shardings=shardings)(params)
    places, tree = jax.tree.flatten(shardings)
    each = (
        jax.jit(lambda p, i=i: jax.tree.leaves(rule.init(p))[i], out_shardings=place)
        for i, place in enumerate(places)
    )
    return jax.tree.unflatten(tree, [make(params) for make in each])
