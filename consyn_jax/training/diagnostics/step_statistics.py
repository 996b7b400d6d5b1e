"""Statistics of the activations, gradients and weights of every layer in one step.

They are computed on the devices.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from consyn_jax.model.arithmetic import LOGITS_AT_ONCE
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.parameters import Layout, map_axes
from consyn_jax.model.transformer import Decoder
from consyn_jax.training.precision import ScaledState
from consyn_jax.training.program import TRAIN_AXES, Program
from consyn_jax.training.step import BASE, Batch, Params, TrainState, dropout_keys


class Statistics(NamedTuple):
    """Float32 statistics of an array, or of each array of a stack.

    Attributes:
        rms: Root mean square of the finite elements.
        largest: Largest magnitude of the finite elements.
        nonfinite: Number of non-finite elements.
    """

    rms: Float[Array, "*stack"]
    largest: Float[Array, "*stack"]
    nonfinite: Float[Array, "*stack"]


def statistics(x: Float[Array, "..."], stacked: bool = False) -> Statistics:
    """Compute the statistics of `x`, or of each x[i] of a stack, without overflow or underflow."""
    axes = tuple(range(int(stacked), x.ndim))
    finite = jnp.isfinite(x)
    sizes = jnp.where(finite, jnp.abs(x.astype(jnp.float32)), 0.0)
    largest = jnp.max(sizes, axis=axes, keepdims=True)
    factor = jnp.where(largest > 2.0**40, 2.0**-90, jnp.where(largest < 2.0**-40, 2.0**70, 1.0))
    count = jnp.sum(finite, axis=axes, dtype=jnp.float32)
    mean = jnp.sum(jnp.square(sizes * factor), axis=axes) / jnp.maximum(count, 1.0)
    rms = jnp.sqrt(mean) / factor.reshape(mean.shape)
    return Statistics(
        rms, largest.reshape(mean.shape), jnp.sum(~finite, axis=axes, dtype=jnp.float32)
    )


class StepStatistics(NamedTuple):
    """Statistics of a step, replicated to every process.

    Attributes:
        activations: Statistics by part of the forward pass, for each of the A micro-batches: [A, L]
            for the blocks, [A, chunks] for the head (chunks of positions), [A] for other parts.
        sequences: Whether each sequence has a non-finite activation.
        gradients, weights: Trees of statistics with the structure of the parameters. For parameters
            stacked over layers, the statistics have shape [L].
        devices: One value for each device of the mesh: whether all weights on it are finite. The
            replicas of a weight should be equal, but those on a faulty device may differ.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    activations: dict[str, Statistics]
    sequences: Bool[Array, "A B"]
    gradients: Any
    weights: Any
    devices: Bool[Array, " devices"]


def lower_step_statistics(
    program: Program, accumulation: int, batch_size: int, length: int
) -> jax.stages.Lowered:
    """Lower the program `observe(state, batch [A, B, T]) -> StepStatistics`.

    The program repeats the forward and backward pass of the step, without an update. The gradients
    are those of the mean loss before clipping, as in the train step.
    """

    def observe(state: TrainState, batch: Batch) -> StepStatistics:
        recorder = optax.GradientTransformation(
            lambda params: (), partial(_record_gradients, program.layout)
        )
        after, metrics = program.step(recorder, 0.0)(state, batch)
        recorded: Any = after.opt_state
        arrays: Any = dict(batch)
        base = arrays.pop(BASE, None)
        if program.draws:
            arrays["dropout_key"] = dropout_keys(program.seed, state.step, accumulation)
        activations, sequences = jax.lax.map(partial(_activations, program, state, base), arrays)
        return StepStatistics(
            metrics["loss"],
            metrics["grad_norm"],
            activations,
            sequences,
            recorded.optimizer if isinstance(recorded, ScaledState) else recorded,
            _parameter_statistics(program.layout, state.params),
            _finite_by_device(program, state.params),
        )

    everywhere = NamedSharding(program.mesh, PartitionSpec())
    with jax.set_mesh(program.mesh), jax.threefry_partitionable(True):
        like = program.batch_like((accumulation, batch_size, length), TRAIN_AXES)
        like |= program.base_like
        return jax.jit(observe, out_shardings=everywhere).lower(program.state_like, like)


def _record_gradients(
    layout: Layout, gradients: Params, state: Any, params: Params | None = None
) -> tuple[Params, Any]:
    """An update rule that changes no parameter, and returns gradient statistics as its state."""
    found = _parameter_statistics(layout, gradients)
    updates = jax.tree.map(jnp.zeros_like, gradients)
    return updates, state._replace(optimizer=found) if isinstance(state, ScaledState) else found


def _parameter_statistics(layout: Layout, tree: Params) -> Any:
    return map_axes(lambda axes, x: statistics(x, "layers" in axes), layout.logical_axes, tree)


def _finite_by_device(program: Program, params: Params) -> Bool[Array, " devices"]:
    def local(own: Params) -> Bool[Array, " one"]:
        return jnp.all(
            jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(own)]), keepdims=True
        )

    places = jax.tree.map(lambda where: where.spec, program.layout.shardings(program.mesh))
    return jax.shard_map(
        local, in_specs=(places,), out_specs=PartitionSpec(program.mesh.axis_names), check_vma=False
    )(params)


def _activations(
    program: Program, state: TrainState, base: Any, batch: Batch
) -> tuple[dict[str, Statistics], Bool[Array, " B"]]:
    """Compute statistics of the activations of a micro-batch.

    Returns:
        The statistics by part of the model, and whether each sequence has a non-finite hidden
        state.
    """
    rate = program.regularisation.dropout
    whole = program.whole(state.params, base, batch.get("dropout_key"))
    model: Decoder = nnx.merge(program.layout.graphdef, whole)
    dropout = Dropout(batch["dropout_key"], rate) if rate else None
    x_BTD, parts = model.traced(
        *(batch["input_ids"], batch["segment_ids"], program.compute, dropout, statistics),
        *state.scales,
    )
    parts |= {
        "final norm": statistics(x_BTD),
        "head": _logits(x_BTD, model.head_VD, program.config.vocab_size),
    }
    return parts, ~jnp.all(jnp.isfinite(x_BTD), axis=(1, 2))


def _logits(
    x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"], vocab_size: int
) -> Statistics:
    """Compute statistics of the logits, in chunks of positions to save memory."""
    B, T, D = x_BTD.shape
    length = next(
        (n for n in range(T, 1, -1) if T % n == 0 and B * n * head_VD.shape[0] <= LOGITS_AT_ONCE), 1
    )
    weight = head_VD.astype(x_BTD.dtype)

    def chunk(part_BTD: jax.Array) -> Statistics:
        return statistics(
            jnp.einsum("BTD,VD->BTV", part_BTD, weight, preferred_element_type=jnp.float32)[
                ..., :vocab_size
            ]
        )

    return jax.lax.map(chunk, x_BTD.reshape(B, T // length, length, D).swapaxes(0, 1))
