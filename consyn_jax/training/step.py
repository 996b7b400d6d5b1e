"""One optimizer step as a pure function, and the state it maps to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from consyn_jax.training.loss import LossSums

Params = Any
Batch = dict[str, jax.Array]  # input_ids, labels, segment_ids, loss_mask, each [A, B, T]: A micro-batches of B sequences
LossFn = Callable[[Params, Batch], LossSums]  # of one micro-batch [B, T]


class TrainState(NamedTuple):
    """All that changes from step to step and is saved."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


def clip_by_norm(gradients: Params, norm: Float[Array, ""], max_norm: float) -> Params:
    """Scale gradients of global norm `norm` down to `max_norm`; 0 leaves them as they are."""
    if not max_norm:
        return gradients
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_ has the same 1e-6
    return jax.tree.map(lambda g: g * scale, gradients)


def accumulate(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[LossSums, Params]:
    """Sums of loss and of its gradients over the micro-batches, one at a time.

    Dividing both by the total token count weighs every real token alike, however the padding is spread over micro-batches.
    """

    def micro(part: Batch) -> tuple[LossSums, Params]:
        def nll(p: Params) -> tuple[jax.Array, LossSums]:
            sums = loss_fn(p, part)
            return sums.nll, sums

        (_, sums), gradients = jax.value_and_grad(nll, has_aux=True)(params)
        return sums, gradients

    first = jax.tree.map(lambda x: x[0], batch)
    if batch["labels"].shape[0] == 1:
        return micro(first)

    def body(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, micro(part)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro, first))
    return jax.lax.scan(body, zeros, batch)[0]


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, max_grad_norm: float
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) -> (state, {"loss", "tokens", "grad_norm"})`: loss in nats a token, the norm before clipping."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        sums, gradients = accumulate(loss_fn, state.params, batch)
        tokens = jnp.maximum(sums.tokens, 1.0)
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(clip_by_norm(gradients, norm, max_grad_norm), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), {"loss": sums.nll / tokens, "tokens": sums.tokens, "grad_norm": norm}

    return train_step
