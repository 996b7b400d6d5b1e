"""One optimizer step as a pure function from a training state to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt

from consyn_jax.model.fp8.quantisation import first_scales, next_scales
from consyn_jax.model.parameters import Params
from consyn_jax.training.loss import LossSums
from consyn_jax.training.preference.pair_loss import PairSums
from consyn_jax.training.program_arguments import Number, is_used


class TrainState(NamedTuple):
    """All values that change from step to step and are saved.

    Attributes:
        nonfinite: Number of consecutive steps, up to the last one, whose loss or gradients were not
            finite (training/optim/skip_nonfinite.py).
        scales: In fp8, a tuple of one array: the scale of each 8-bit array in each block. Otherwise
            empty.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    nonfinite: Int[Array, ""]
    scales: tuple[Float[Array, "L arrays"], ...] = ()


def new_scales(like: tuple[Any, ...]) -> tuple[Float[Array, "L arrays"], ...]:
    """Create the `scales` of a state before its first step.

    Args:
        like: Shape and sharding of each array; empty without fp8.
    """
    return tuple(
        jax.jit(first_scales, static_argnums=0, out_shardings=leaf.sharding)(leaf.shape[0])
        for leaf in like
    )


# input_ids, labels, segment_ids and loss_mask, each [A, B, T]: A micro-batches of B sequences.
Batch = dict[str, Any]
BASE = "base"  # key of the frozen weights in the batches of a run that trains an adapter
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Sums = LossSums | PairSums
# Maps parameters, one micro-batch [B, T] and, in fp8, the state's scales to the objective, summed
# over its terms (tokens or pairs), and the sums to report. The "gradient" of the objective with
# respect to the scales is the largest magnitude of each array (model/fp8/products.py).
Objective = Callable[..., tuple[Float[Array, ""], Sums]]
# Maps (summed gradients, factor, state, the step's metrics so far) to new parameters and optimizer
# state. The gradients times the factor are clipped means. The update multiplies them where it reads
# them, which saves writing them to memory once more.
Update = Callable[[Params, Float[Array, ""], TrainState, Metrics], tuple[Params, optax.OptState]]

_DROPOUT = 0x0D409  # sets these random numbers apart from others with the same seed


def clip_factor(norm: Float[Array, ""], max_norm: Number) -> Float[Array, ""]:
    """Return the factor that scales gradients of global norm `norm` down to at most `max_norm`.

    A `max_norm` of 0 turns clipping off. As in `torch.nn.utils.clip_grad_norm_`, 1e-6 is added to
    `norm`.
    """
    if not is_used(max_norm):
        return jnp.ones_like(norm)
    return jnp.minimum(1.0, max_norm / (norm + 1e-6))


def accumulate(
    objective: Objective, params: Params, batch: Batch, scales: tuple[jax.Array, ...] = ()
) -> tuple[Any, Params, tuple[jax.Array, ...]]:
    """Sum the loss and the gradients of the objective over micro-batches, one at a time.

    This needs memory for one set of gradients. The caller divides both sums by the total number of
    target tokens (or pairs), so that each token has the same weight, however padding is distributed
    over the micro-batches.

    Returns:
        The sums of `objective` to report, the summed gradients, and the largest magnitude of each
        8-bit array, in the form of `scales`.
    """
    first = jax.tree.map(lambda x: x[0], batch)
    if batch["labels"].shape[0] == 1:
        arguments = 0, *range(2, 2 + len(scales))
        differentiated = jax.value_and_grad(objective, arguments, has_aux=True)
        (_, sums), (gradients, *largest) = differentiated(params, first, *scales)
        return sums, gradients, tuple(largest)
    totals = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)

    def micro(carry: Any, part: Batch) -> tuple[Any, None]:
        pull: Any
        value, pull, own = jax.vjp(
            lambda p, *s: objective(p, part, *s), params, *scales, has_aux=True
        )
        # A layer's gradient is added to its total as soon as it is known. Scales have no
        # references, so their "gradients" are returned.
        found = pull.with_refs(totals, *scales)(jnp.ones_like(value))[1:]
        sums, largest = carry
        return (
            jax.tree.map(jnp.add, sums, own),
            jax.tree.map(jnp.maximum, largest, tuple(found)),
        ), None

    sums_like = jax.eval_shape(objective, params, first, *scales)[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (sums_like, scales))
    (sums, largest), _ = jax.lax.scan(micro, zeros, batch)
    return sums, jax.tree.map(jax.freeze, totals), largest


def make_step(objective: Objective, update: Update, max_grad_norm: Number) -> Step:
    """Make `step(state, batch) -> (state, {"loss", "tokens", "grad_norm", "clipped"})`.

    The loss is in nats per token. If rows are pairs of answers, it is a mean over pairs, and there
    are further metrics (`PairSums.means`). `grad_norm` is taken before clipping. `clipped` is 1 if
    the gradients were scaled down, otherwise 0. Wrappers in program.py add `nonfinite`, `updates`
    and other metrics.
    """
    largest = max_grad_norm if is_used(max_grad_norm) else jnp.inf

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        sums, gradients, magnitudes = accumulate(objective, state.params, batch, state.scales)
        terms = jnp.maximum(sums.terms, 1.0)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients) / terms
            metrics = {
                **sums.means(terms),
                "tokens": sums.tokens,
                "grad_norm": norm,
                "clipped": (norm > largest).astype(jnp.float32),
            }
            factor = clip_factor(norm, max_grad_norm) / terms
            params, opt_state = update(gradients, factor, state, metrics)
        scales = jax.tree.map(next_scales, state.scales, magnitudes)
        return TrainState(state.step + 1, params, opt_state, state.nonfinite, scales), metrics

    return train_step


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, max_grad_norm: Number
) -> Step:
    """Make a step as `make_step` does, with an optimizer that updates all parameters at once."""

    def update(
        gradients: Params, factor: Float[Array, ""], state: TrainState, _: Metrics
    ) -> tuple[Params, optax.OptState]:
        gradients = jax.tree.map(lambda g: g * factor, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    return make_step(objective, update, max_grad_norm)


def with_dropout(step: Step, seed: int | UInt[Array, ""]) -> Step:
    """Wrap `step` so that its batch includes `dropout_key` [A], a random key per micro-batch."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = dropout_keys(seed, state.step, batch["labels"].shape[0])
        return step(state, {**batch, "dropout_key": keys})

    return train_step


def dropout_keys(
    seed: int | UInt[Array, ""], step: int | Int[Array, ""], accumulation: int
) -> jax.Array:
    """Return the dropout keys [A] of a step, one for each micro-batch.

    Args:
        step: Number of steps before this step.
        accumulation: Number of micro-batches, A.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DROPOUT), step)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(accumulation))
