"""The update rules, which parameters decay, and which rates their groups have.

Every rule is a direction followed by one tail: decoupled decay of the matrices, the multiplier of the group, the rate of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, ScheduleFreeState, scale_by_muon, schedule_free, schedule_free_eval_params

from consyn_jax.config import MOMENTUM, OPTIMIZERS, OptimizerOptions, UserError, nearest
from consyn_jax.validation import parse_multipliers

Axes = tuple[str | None, ...]

UPDATE_RMS = 0.2  # of Muon's directions: that of AdamW's, so that one rate and one decay suit both (Liu et al., 2025, section 2.2)
SMALLEST_FACTORED = 32  # a matrix with a shorter side keeps all of its second moments: they cost nothing (big_vision has the same)


# ---------------------------------------------------------------------------------------------------------------------- groups


def _map_axes(function: Callable[[Axes], Any], logical_axes: Any) -> Any:
    return jax.tree.map(function, logical_axes, is_leaf=lambda a: isinstance(a, tuple))


def _is_matrix(axes: Axes) -> bool:
    """It maps from or to the residual stream; norms and biases do not."""
    own = [a for a in axes if a != "layers"]
    return "embed" in own and len(own) > 1


def decay_mask(logical_axes: Any) -> Any:
    """True for matrices, False for norms and biases: the tree of logical axes with booleans for leaves.

    The embeddings decay as all matrices do, as in nanoGPT and in what it follows (Brown et al., 2020). OLMo 2 (2025) lets them be: to do
    that here costs the decay of a tied output embedding, too.
    """
    return _map_axes(_is_matrix, logical_axes)


def parameter_groups(logical_axes: Any) -> Any:
    """The group of each parameter, one of `config.PARAMETER_GROUPS`: what `--lr_multipliers` names."""

    def group(path: Any, axes: Axes) -> str:
        if not _is_matrix(axes):
            return "norms"
        if "layers" in axes:
            return "mlp" if "mlp" in axes else "attention"
        return "head" if path[-1].key == "output" else "embedding"

    return jax.tree_util.tree_map_with_path(group, logical_axes, is_leaf=lambda a: isinstance(a, tuple))


def _multiplier_tree(multipliers: Mapping[str, float], logical_axes: Any) -> Any:
    groups = parameter_groups(logical_axes)
    present = set(jax.tree.leaves(groups))
    for name in multipliers:
        if name not in present:
            why = ": its output embedding is the input embedding" if name == "head" else ""
            raise UserError(f"--lr_multipliers has {name}, and the model has no such parameters{why}. Its groups are {', '.join(sorted(present))}.")
    return jax.tree.map(lambda name: multipliers.get(name, 1.0), groups)


def describe_groups(options: OptimizerOptions, shapes: Any, logical_axes: Any) -> str:
    """Who is treated how, with counts, for the header of a run.

    Args:
        shapes: the parameters, or their shapes.
    """

    def count(mask: Any) -> str:
        sizes = [leaf.size for leaf, is_in in zip(jax.tree.leaves(shapes), jax.tree.leaves(mask), strict=True) if is_in]
        return f"{len(sizes)} tensor{'' if len(sizes) == 1 else 's'}, {sum(sizes):,} parameters"

    decays = decay_mask(logical_axes)
    parts = [f"decayed: {count(decays)}", f"not decayed: {count(jax.tree.map(lambda d: not d, decays))}"]
    if options.optimizer == "muon":
        parts.append(f"by muon: {count(_map_axes(_is_muons, logical_axes))}")
    groups = parameter_groups(logical_axes)
    for name, factor in parse_multipliers(options.lr_multipliers).items():
        parts.append(f"{name} at {factor:g} x the rate: {count(jax.tree.map(lambda group, name=name: group == name, groups))}")
    return "; ".join(parts)


# ----------------------------------------------------------------------------------------------------------------------- rules


def build_optimizer(
    name: str,
    schedule: optax.ScalarOrSchedule,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    mask: Any,
    eps: float = 1e-8,
    momentum: float | None = None,
    moment_dtype: Any = jnp.float32,
    logical_axes: Any = None,
    multipliers: Mapping[str, float] | None = None,
    plateau: bool = False,
) -> optax.GradientTransformation:
    """The optimizer `name`: p - rate x multiplier x (direction + weight_decay x p, where `mask` is true).

    - adamw: Loshchilov and Hutter (2019). schedule_free_adamw: Defazio et al. (2024), whose decay is that of the parameters trained.
    - adafactor: Shazeer and Stern (2018), without their relative step and parameter scale (as Zhai et al., 2022, section 3.4), so its rate
      is AdamW's; each layer's matrix is factored and clipped by itself, however the layers are stacked.
    - lion: Chen et al. (2023). sgd: with momentum and decoupled decay.
    - muon: Jordan et al. (2024), for the matrices inside the blocks, each layer's as [inputs, outputs], scaled to AdamW's size (Liu et
      al., 2025); AdamW for all else.

    Args:
        momentum: of sgd, muon and adafactor; None for `config.MOMENTUM`.
        moment_dtype: bfloat16 halves both moments. First moments and momentum are rounded to nearest, which Optax does; second moments
            at random, for where they change by less than half of bfloat16's last place (0.2 %) a step, to nearest they would stand still.
        logical_axes: of the parameters; adafactor, muon and `multipliers` need them.
        multipliers: by group, 1 where a group is not in it.
        plateau: the updates are also multiplied by a scale in the state, which `with_rate_scale` sets.

    Raises:
        UserError: unknown name, or a multiplier of a group that the model has not.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer {name!r} is not known{nearest(name, OPTIMIZERS)} Known: {', '.join(OPTIMIZERS)}.")
    momentum = MOMENTUM.get(name, 0.0) if momentum is None else momentum
    dtype = jnp.dtype(moment_dtype)

    def adam() -> optax.GradientTransformation:
        return _small_second_moment(optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=dtype), dtype)

    if name == "schedule_free_adamw":  # its average is the first moment
        direction = _small_second_moment(optax.scale_by_rms(decay=beta2, eps=eps, eps_in_sqrt=False, bias_correction=True), dtype)
    elif name == "adamw":
        direction = adam()
    elif name == "lion":
        direction = optax.scale_by_lion(b1=beta1, b2=beta2, mu_dtype=dtype)
    elif name == "sgd":
        direction = optax.trace(decay=momentum, accumulator_dtype=dtype) if momentum else optax.identity()
    else:
        assert logical_axes is not None, name
        direction = _adafactor(logical_axes, momentum, dtype) if name == "adafactor" else _muon(logical_axes, momentum, dtype, adam())
    chain = [direction, optax.add_decayed_weights(weight_decay, mask)]
    if multipliers:
        assert logical_axes is not None
        factors = _multiplier_tree(multipliers, logical_axes)
        chain.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)))
    rule = optax.chain(*chain, optax.scale_by_learning_rate(schedule))
    if name == "schedule_free_adamw":
        # its own count begins at 1, that of the rule inside at 0
        rate = (lambda count: schedule(count - 1)) if callable(schedule) else schedule
        rule = schedule_free(rule, rate, b1=beta1)
    return optax.chain(rule, _rate_scale()) if plateau else rule


def configured_optimizer(options: OptimizerOptions, schedule: optax.ScalarOrSchedule, logical_axes: Any) -> optax.GradientTransformation:
    """The optimizer that resolved options describe.

    Raises:
        UserError: a multiplier of a group that the model has not.
    """
    assert options.beta2 is not None
    assert options.weight_decay is not None
    return build_optimizer(
        options.optimizer,
        schedule,
        beta1=options.beta1,
        beta2=options.beta2,
        weight_decay=options.weight_decay,
        mask=decay_mask(logical_axes),
        eps=options.eps,
        momentum=options.momentum,
        moment_dtype=options.moment_dtype,
        logical_axes=logical_axes,
        multipliers=parse_multipliers(options.lr_multipliers),
        plateau=options.scheduler == "plateau",
    )


def _is_muons(axes: Axes) -> bool:
    return "layers" in axes and _is_matrix(axes)


def _muon(logical_axes: Any, momentum: float, dtype: Any, rest: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon's directions inside the blocks, `rest` elsewhere."""
    labels = _map_axes(lambda axes: "muon" if _is_muons(axes) else "adamw", logical_axes)
    numbers = _map_axes(lambda axes: MuonDimensionNumbers(*_sides(axes)) if _is_muons(axes) else optax.MaskedNode(), logical_axes)

    def resize(updates: Any, params: Any) -> Any:
        def scaled(x: jax.Array, number: MuonDimensionNumbers) -> jax.Array:
            longest = max(np.prod([x.shape[axis] for axis in side]) for side in number)
            return x * (UPDATE_RMS * float(longest) ** 0.5)

        return jax.tree.map(scaled, updates, numbers)

    directions = optax.chain(scale_by_muon(beta=momentum, mu_dtype=dtype, weight_dimension_numbers=numbers), optax.stateless(resize))
    return optax.partition({"muon": directions, "adamw": rest}, labels)


def _sides(axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of a matrix's inputs and of its outputs: the residual stream is one side, everything beside it the other.

    >>> _sides(("layers", "embed", "heads", "head_dim")), _sides(("layers", "heads", "head_dim", "embed"))
    (((1,), (2, 3)), ((1, 2), (3,)))
    """
    stream = axes.index("embed")
    others = tuple(i for i, axis in enumerate(axes) if axis not in ("embed", "layers"))
    return ((stream,), others) if stream < others[0] else (others, (stream,))


def _adafactor(logical_axes: Any, momentum: float, dtype: Any) -> optax.GradientTransformation:
    """Optax's factored second moments and Adafactor's clipping, per layer and of weights as [inputs, outputs]."""

    def as_matrix(axes: Axes, x: jax.Array) -> jax.Array:
        if not _is_matrix(axes):
            return x
        layers = x.shape[:1] if "layers" in axes else ()
        return x.reshape(*layers, *(int(np.prod([x.shape[i] for i in side])) for side in _sides(axes)))

    def clip(axes: Axes, x: jax.Array) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(range("layers" in axes, x.ndim)), keepdims=True))
        return x / jnp.maximum(1.0, rms)

    def over(function: Callable[..., Any], *trees: Any) -> Any:
        return jax.tree.map(function, logical_axes, *trees, is_leaf=lambda a: isinstance(a, tuple))

    def factored(params: Any) -> optax.GradientTransformation:
        layers = max(jax.tree.leaves(over(lambda axes, x: x.shape[0] if "layers" in axes else 0, params)))
        return optax.scale_by_factored_rms(min_dim_size_to_factor=max(SMALLEST_FACTORED, layers + 1))  # never over the layers

    def init(params: Any) -> Any:
        return factored(params).init(over(as_matrix, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        directions, state = factored(params).update(over(as_matrix, updates), state, over(as_matrix, params))
        directions = over(clip, directions)
        return jax.tree.map(lambda d, p: d.reshape(p.shape), directions, params), state

    rule = optax.GradientTransformation(init, update)
    return optax.chain(rule, optax.ema(momentum, debias=False, accumulator_dtype=dtype)) if momentum else rule


# --------------------------------------------------------------------------------------------------------------- small moments


def _small_second_moment(rule: Any, dtype: Any) -> optax.GradientTransformation:
    """`rule`, whose state has `nu` and `count`, with `nu` kept in `dtype` and rounded at random between steps; each `layer` draws its own
    where it is updated by itself."""
    if dtype == jnp.float32:
        return rule

    def cast(tree: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to), tree)

    def init(params: Any) -> Any:
        state = rule.init(params)
        return state._replace(nu=cast(state.nu, dtype))

    def update(updates: Any, state: Any, params: Any = None, *, layer: Any = None, **_: Any) -> tuple[Any, Any]:
        updates, state = rule.update(updates, state._replace(nu=cast(state.nu, jnp.float32)), params)
        leaves, tree = jax.tree.flatten(state.nu)
        key = jax.random.fold_in(jax.random.key(0), state.count)  # a resumed run draws the same
        keys = jax.random.split(key if layer is None else jax.random.fold_in(key, layer), len(leaves))
        return updates, state._replace(nu=jax.tree.unflatten(tree, [round_at_random(x, key) for x, key in zip(leaves, keys, strict=True)]))

    return optax.GradientTransformationExtraArgs(init, update)


def round_at_random(x: Float[Array, "*shape"], key: jax.Array) -> Float[Array, "*shape"]:
    """Finite float32 to bfloat16, up or down with the chances that make the mean exact (Gupta et al., 2015)."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


# ----------------------------------------------------------------------------------------------------------- what a state holds

_MOMENTS = {"adamw": 2, "schedule_free_adamw": 1, "lion": 1, "muon": 1, "adafactor": 0, "sgd": 0}  # of a parameter, beside momentum


def moment_bytes(options: OptimizerOptions) -> int:
    """Bytes that the optimizer keeps for one parameter. Muon's are those of the blocks, and factors count as nothing.

    >>> moment_bytes(OptimizerOptions()), moment_bytes(OptimizerOptions(moment_dtype="bfloat16"))
    (8, 4)
    """
    momentum = MOMENTUM.get(options.optimizer, 0.0) if options.momentum is None else options.momentum
    number = _MOMENTS[options.optimizer] + (options.optimizer in ("sgd", "adafactor") and momentum > 0)
    average = 4 if options.optimizer == "schedule_free_adamw" else 0  # always in float32
    return number * jnp.dtype(options.moment_dtype).itemsize + average


class RateScale(NamedTuple):
    """The state of `plateau`: what the updates are multiplied by."""

    scale: Float[Array, ""]


def _rate_scale() -> optax.GradientTransformation:
    def update(updates: Any, state: RateScale, params: Any = None) -> tuple[Any, RateScale]:
        return jax.tree.map(lambda u: u * state.scale, updates), state

    return optax.GradientTransformation(lambda params: RateScale(jnp.ones((), jnp.float32)), update)


def with_rate_scale(opt_state: Any, scale: float) -> Any:
    """`opt_state` with another scale of the rate, laid out as before, so that the compiled step takes it."""

    def replace(part: Any) -> Any:
        if not isinstance(part, RateScale):
            return part
        return RateScale(jax.device_put(np.float32(scale), part.scale.sharding))

    return jax.tree.map(replace, opt_state, is_leaf=lambda part: isinstance(part, RateScale))


def evaluation_params(opt_state: Any, params: Any) -> Any:
    """The parameters to evaluate and to export: the average of schedule-free training, `params` themselves of every other rule.

    It is a few operations an element, to be compiled by the caller.
    """
    for part in jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, ScheduleFreeState)):
        if isinstance(part, ScheduleFreeState):
            return schedule_free_eval_params(part, params)
    return params


def place_state(opt_state: Any, shapes: Any, shardings: Any, elsewhere: Any) -> Any:
    """The shapes of an optimizer's state with the places of its arrays: a moment lies where its parameter lies.

    A moment is known by its path, which ends in its parameter's, and by its shape. All else is `elsewhere`: counts, and Adafactor's
    factors, which are small (a row and a column of each matrix).
    """
    places = of_parameters(opt_state, shapes, shardings, elsewhere)
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), opt_state, places)


def of_parameters(opt_state: Any, shapes: Any, values: Any, otherwise: Any) -> Any:
    """For each array of an optimizer's state the value of its parameter, in the tree of the state; `otherwise` for one that has none.

    Args:
        values: one for each parameter, none of them a tree.
    """
    known = {path: (leaf.shape, value) for (path, leaf), value in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(values), strict=True)}

    def find(path: Any, leaf: Any) -> Any:
        own = next((known[path[i:]] for i in range(len(path)) if path[i:] in known), None)
        return own[1] if own is not None and own[0] == leaf.shape else otherwise

    return jax.tree_util.tree_map_with_path(find, opt_state)


# --------------------------------------------------------------------------------------------------------------------- advice

# The lowest rate that pretraining is known to use, and the highest of full fine-tuning. AdamW: 6e-5 for GPT-3 175B (Brown et al.,
# 2020, table 2.1); 5e-5 for BERT (Devlin et al., 2019), some smaller models up to 3e-4. Lion: 3 to 10 times lower (Chen et al., 2023).
# Schedule-free: as AdamW or up to 10 times higher (Defazio et al., 2024). Adafactor and Muon have AdamW's units here.
_RATES = {"adamw": (5e-5, 3e-4), "adafactor": (5e-5, 3e-4), "muon": (5e-5, 3e-4), "lion": (5e-6, 1e-4), "schedule_free_adamw": (5e-5, 3e-3)}


def lr_warning(lr: float, optimizer: str, from_weights: bool) -> str | None:
    """A sentence if the peak rate looks made for the other kind of training; None if not, or if nothing is known of the rule.

    >>> lr_warning(3e-5, "adamw", from_weights=False)
    '--lr 3e-05 is low for training from scratch with adamw; 5e-05 and more is usual, as low as this for fine-tuning.'
    """
    if optimizer not in _RATES:
        return None
    lowest, highest = _RATES[optimizer]
    if not from_weights and lr < lowest:
        return f"--lr {lr:g} is low for training from scratch with {optimizer}; {lowest:g} and more is usual, as low as this for fine-tuning."
    if from_weights and lr > highest:
        return f"--lr {lr:g} is high for weights that are trained already, with {optimizer}; {highest:g} and less is usual, or they may be forgotten."
    return None
