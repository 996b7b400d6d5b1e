"""The update rule, and which parameters decay."""

from __future__ import annotations

from typing import Any

import jax
import optax

Axes = tuple[str | None, ...]


def decay_mask(logical_axes: Any) -> Any:
    """True for matrices (two or more axes beside `layers`), False for norms: the tree of logical axes with booleans for leaves."""
    return jax.tree.map(lambda axes: len([a for a in axes if a != "layers"]) > 1, logical_axes, is_leaf=lambda a: isinstance(a, tuple))


def build_optimizer(
    name: str, schedule: optax.ScalarOrSchedule, *, beta1: float, beta2: float, weight_decay: float, mask: Any, eps: float = 1e-8
) -> optax.GradientTransformation:
    """The optimizer `name` with decoupled weight decay where `mask` is true.

    Moments are float32 and lie where their parameter lies.
    """
    if name != "adamw":
        raise ValueError(f"Optimizer {name!r} is not known; known: adamw.")
    return optax.adamw(schedule, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=mask)
