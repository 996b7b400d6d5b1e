"""Adam's update directions, with an option for second moments in bfloat16."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.program_arguments import Number


def adam(options: OptimizerOptions) -> optax.GradientTransformation:
    """Optax transformation from gradients to Adam's update directions (Kingma and Ba, 2015)."""
    dtype = jnp.dtype(options.moment_dtype)
    rule = optax.scale_by_adam(
        b1=options.beta1, b2=_beta2(options), eps=options.eps, mu_dtype=dtype
    )
    return _narrow_second_moment(rule, dtype)


def scaled_gradients(options: OptimizerOptions) -> optax.GradientTransformation:
    """Optax transformation that divides gradients by Adam's denominator, without first moments."""
    rule = optax.scale_by_rms(
        decay=_beta2(options), eps=options.eps, eps_in_sqrt=False, bias_correction=True
    )
    return _narrow_second_moment(rule, jnp.dtype(options.moment_dtype))


def _beta2(options: OptimizerOptions) -> Number:
    assert options.beta2 is not None
    return options.beta2


def _narrow_second_moment(rule: Any, dtype: Any) -> optax.GradientTransformation:
    """Wrap `rule` so that its second moments are stored in `dtype`, with stochastic rounding.

    With rounding to nearest, a second moment would freeze once its change per step is below half of
    bfloat16's last digit (0.2 %). First moments change faster, and Optax rounds them to nearest.

    Args:
        rule: Optax transformation whose state has the fields `nu` and `count`.
    """
    if dtype == jnp.float32:
        return rule

    def cast(tree: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to), tree)

    def init(params: Any) -> Any:
        state = rule.init(params)
        return state._replace(nu=cast(state.nu, dtype))

    def update(
        updates: Any, state: Any, params: Any = None, *, layer: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        """Update all parameters, or those of layer `layer`.

        The random numbers for rounding differ between steps and layers.
        """
        updates, state = rule.update(
            updates, state._replace(nu=cast(state.nu, jnp.float32)), params
        )
        leaves, tree = jax.tree.flatten(state.nu)
        # The key depends only on the step and the layer, so a resumed run draws the same numbers.
        key = jax.random.fold_in(jax.random.key(0), state.count)
        key = key if layer is None else jax.random.fold_in(key, layer)
        keys = jax.random.split(key, len(leaves))
        rounded = [round_stochastically(x, key) for x, key in zip(leaves, keys, strict=True)]
        return updates, state._replace(nu=jax.tree.unflatten(tree, rounded))

    return optax.GradientTransformationExtraArgs(init, update)


def round_stochastically(x: Float[Array, "*shape"], key: jax.Array) -> Float[Array, "*shape"]:
    """Round finite float32 values to bfloat16, randomly up or down; the expected value is exact.

    Source: Gupta et al. (2015).
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
