"""The table of update rules, and the optimizer that the options of a run describe.

Weight decay, multipliers and the learning rate are applied in this module, for all rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import schedule_free

from consyn_jax.model.parameters import Params
from consyn_jax.optimizer_config import OPTIMIZERS, OptimizerOptions
from consyn_jax.training.optim.adafactor import adafactor
from consyn_jax.training.optim.adam import adam, scaled_gradients
from consyn_jax.training.optim.cautious_adamw import cautious_adamw
from consyn_jax.training.optim.groups import decay_mask, rate_multipliers
from consyn_jax.training.optim.muon import muon
from consyn_jax.training.optim.state import scale_by_plateau
from consyn_jax.training.program_arguments import Number, is_used
from consyn_jax.validation import parse_multipliers


def _lion(options: OptimizerOptions, _: Params) -> optax.GradientTransformation:
    """Optax transformation from gradients to Lion's update directions (Chen et al., 2023)."""
    assert options.beta2 is not None
    dtype = jnp.dtype(options.moment_dtype)
    return optax.scale_by_lion(b1=options.beta1, b2=options.beta2, mu_dtype=dtype)


def _sgd(options: OptimizerOptions, _: Params) -> optax.GradientTransformation:
    """Optax transformation from gradients to their momentum; without momentum, the identity."""
    if not is_used(options.momentum_decay):
        return optax.identity()
    dtype = jnp.dtype(options.moment_dtype)
    return optax.trace(decay=options.momentum_decay, accumulator_dtype=dtype)


# Name of each optimizer -> function from its options and the parameters' logical axes to an Optax
# transformation. Every optimizer also has an entry in `optimizer_config.OPTIMIZERS`.
RULES: dict[str, Callable[[OptimizerOptions, Params], optax.GradientTransformation]] = {
    "adamw": lambda options, _: adam(options),
    "adafactor": adafactor,
    "lion": _lion,
    "muon": muon,
    "sgd": _sgd,
    # Averaging of the weights replaces the first moment (Defazio et al., 2024).
    "schedule_free_adamw": lambda options, _: scaled_gradients(options),
    "cautious_adamw": cautious_adamw,
}


def build_optimizer(
    options: OptimizerOptions,
    schedule: optax.ScalarOrSchedule,
    logical_axes: Params,
    rate_factors: Any = None,
    multipliers: Mapping[str, Number] | None = None,
) -> optax.GradientTransformation:
    """Build the optimizer from resolved options.

    The update of a parameter p is -rate x multiplier x (factor x direction + weight_decay x p). The
    decay is decoupled from the gradient (Loshchilov and Hutter, 2019), and applies only to
    matrices.

    Args:
        schedule: Learning rate as a function of the step.
        rate_factors: muP's factor of each parameter, in the structure of `logical_axes`; None
            without muP.
        multipliers: Multiplier of the learning rate by group; None for `options.lr_multipliers`.

    Raises:
        UserError: `--lr_multipliers` names a group that the model does not have.
    """
    assert options.weight_decay is not None
    parts = [RULES[options.optimizer](options, logical_axes)]
    if rate_factors is not None:
        parts.append(_multiplied(rate_factors))
    parts.append(optax.add_decayed_weights(options.weight_decay, decay_mask(logical_axes)))
    if multipliers is None:
        multipliers = parse_multipliers(options.lr_multipliers)
    if multipliers:
        parts.append(_multiplied(rate_multipliers(multipliers, logical_axes)))
    rule = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    if options.rule.averages_weights:
        # `schedule_free` counts steps from 1, but schedules count from 0.
        rate = (lambda count: schedule(count - 1)) if callable(schedule) else schedule
        rule = schedule_free(rule, rate, b1=options.beta1)
    return optax.chain(rule, scale_by_plateau()) if options.scheduler == "plateau" else rule


def _multiplied(factors: Any) -> optax.GradientTransformation:
    """Optax transformation that multiplies each parameter's update by its factor in `factors`."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


def lr_warning(lr: float, optimizer: str, from_weights: bool, factor: float = 1.0) -> str | None:
    """Warn if the peak rate is too low for training from scratch, or too high for fine-tuning.

    Args:
        factor: Factor by which the usual rates are multiplied; above 1 for an adapter.

    >>> lr_warning(3e-5, "adamw", from_weights=False)
    '--lr 3e-05 is low for training from scratch with adamw; 5e-05 or more is usual. Rates as low as
    this are for fine-tuning.'
    """
    bounds = OPTIMIZERS[optimizer].lr_bounds
    if bounds is None:
        return None
    lowest, highest = (factor * bound for bound in bounds)
    if not from_weights and lr < lowest:
        return (
            f"--lr {lr:g} is low for training from scratch with {optimizer}; {lowest:g} or more is "
            "usual. Rates as low as this are for fine-tuning."
        )
    if from_weights and lr > highest:
        return (
            f"--lr {lr:g} is high for fine-tuning with {optimizer}; {highest:g} or less is usual, "
            "so that the model does not forget what it has learned."
        )
    return None
