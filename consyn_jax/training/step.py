"""One optimizer step as a pure function, and the state it maps to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from consyn_jax.training.loss import LossSums

Params = Any
Batch = dict[str, jax.Array]  # input_ids, labels, segment_ids, loss_mask, each [A, B, T]: A micro-batches of B sequences
# Of one micro-batch [B, T]: what is minimised, summed over its tokens, and the sums that are reported.
Objective = Callable[[Params, Batch], tuple[Float[Array, ""], LossSums]]


_DROPOUT = 0x0D409  # sets these draws apart from others with the same seed


class TrainState(NamedTuple):
    """All that changes from step to step and is saved.

    Attributes:
        nonfinite: steps in a row, the last one included, whose loss or gradients were not finite (training/guard.py).
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    nonfinite: Int[Array, ""]


Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# Of summed gradients, the factor that makes them clipped means, the state, and the step's metrics so far: the parameters and the optimizer's
# state after the step. The factor is applied where the gradients are used, so that they are read there and never written again.
Update = Callable[[Params, Float[Array, ""], TrainState, Metrics], tuple[Params, optax.OptState]]


def clip_factor(norm: Float[Array, ""], max_norm: float) -> Float[Array, ""]:
    """What scales gradients of global norm `norm` down to `max_norm`; 0 leaves them as they are."""
    if not max_norm:
        return jnp.ones_like(norm)
    return jnp.minimum(1.0, max_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_ has the same 1e-6


def accumulate(objective: Objective, params: Params, batch: Batch) -> tuple[LossSums, Params]:
    """Sums of the loss and of the objective's gradients over the micro-batches, one at a time, in the memory of one set of gradients.

    Dividing both by the total token count weighs every real token alike, however the padding is spread over micro-batches.
    """

    first = jax.tree.map(lambda x: x[0], batch)
    if batch["labels"].shape[0] == 1:
        (_, sums), gradients = jax.value_and_grad(objective, has_aux=True)(params, first)
        return sums, gradients
    totals = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)

    def micro(sums: LossSums, part: Batch) -> tuple[LossSums, None]:
        pull: Any
        value, pull, own = jax.vjp(lambda p: objective(p, part), params, has_aux=True)
        pull.with_refs(totals)(jnp.ones_like(value))  # a layer's gradient is added to its total as soon as it is there
        return jax.tree.map(jnp.add, sums, own), None

    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(objective, params, first)[1])
    sums, _ = jax.lax.scan(micro, sums, batch)
    return sums, jax.tree.map(jax.freeze, totals)


def make_train_step(objective: Objective, optimizer: optax.GradientTransformation, max_grad_norm: float) -> Step:
    """The train step of `make_step`, whose optimizer updates all at once, whatever the loss."""

    def update(gradients: Params, factor: Float[Array, ""], state: TrainState, _: Metrics) -> tuple[Params, optax.OptState]:
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * factor, gradients), state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    return make_step(objective, update, max_grad_norm)


def make_step(objective: Objective, update: Update, max_grad_norm: float) -> Step:
    """`step(state, batch) -> (state, {"loss", "tokens", "grad_norm", "clipped"})`.

    The loss is in nats a token, the norm that before clipping, and `clipped` 1 for a step whose gradients were scaled down, else 0.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        sums, gradients = accumulate(objective, state.params, batch)
        tokens = jnp.maximum(sums.tokens, 1.0)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients) / tokens
            clipped = (norm > (max_grad_norm or jnp.inf)).astype(jnp.float32)
            metrics = {"loss": sums.nll / tokens, "tokens": sums.tokens, "grad_norm": norm, "clipped": clipped}
            params, opt_state = update(gradients, clip_factor(norm, max_grad_norm) / tokens, state, metrics)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def with_dropout(step: Step, seed: int) -> Step:
    """`step`, which finds in its batch a key for everything that each micro-batch draws: `dropout_key` [A]."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return step(state, {**batch, "dropout_key": dropout_keys(seed, state.step, batch["labels"].shape[0])})

    return train_step


def dropout_keys(seed: int, step: int | Int[Array, ""], accumulation: int) -> jax.Array:
    """Keys [A] of what each micro-batch draws in the step that follows `step` others."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DROPOUT), step)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(accumulation))
