"""Learning-rate schedules: the rate at each optimizer step, counted from 0."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from consyn_jax.config import UserError, nearest

WSD_DECAY_SHARE = 0.2  # of the whole run (Hägele et al., 2024)


def warmup_length(total_steps: int, warmup_steps: int | None, warmup_ratio: float) -> int:
    """Steps of warm-up: as given, else a share of the run.

    >>> warmup_length(1000, None, 0.02)
    20
    """
    return round(total_steps * warmup_ratio) if warmup_steps is None else warmup_steps


def build_schedule(name: str, peak: float, total_steps: int, warmup_steps: int, min_ratio: float) -> optax.Schedule:
    """A function from the step to its learning rate.

    In warm-up step s has rate peak x (s + 1) / (warmup + 1), so that no step is lost on a rate of 0. Then with r running from 0 to 1
    over the rest: linear 1 - r, cosine (1 + cos pi r) / 2, both scaled to end at `min_ratio`; constant and constant_with_warmup stay
    (constant has no warm-up at all); wsd stays, and falls linearly over the last fifth of the run.

    Raises:
        UserError: unknown name, or warm-up longer than the run.
    """
    names = ("cosine", "linear", "constant", "constant_with_warmup", "wsd")
    if name not in names:
        raise UserError(f"--scheduler {name!r} is not known{nearest(name, names)} Known: {', '.join(names)}.")
    if name == "constant":
        warmup_steps = 0
    if warmup_steps > total_steps:
        raise UserError(f"Warm-up of {warmup_steps} steps is longer than the run of {total_steps} steps. Lower --warmup_steps.")
    decay_steps = total_steps - warmup_steps
    if name == "wsd":
        decay_steps = min(decay_steps, max(1, round(WSD_DECAY_SHARE * total_steps)))

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)
        done = jnp.clip((step - (total_steps - decay_steps)) / max(decay_steps, 1), 0.0, 1.0)
        shape = {"cosine": (1 + jnp.cos(jnp.pi * done)) / 2, "linear": 1 - done, "wsd": 1 - done}.get(name, jnp.float32(1.0))
        return peak * rise * (min_ratio + (1 - min_ratio) * shape)

    return rate
