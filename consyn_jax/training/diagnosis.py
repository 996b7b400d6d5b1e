"""Where in a step values stopped being finite: statistics of every layer's activations, gradients and weights, and what they say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from consyn_jax.model.arithmetic import LOGITS_AT_ONCE
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.parameters import Layout
from consyn_jax.model.transformer import BLOCK_PARTS, Decoder
from consyn_jax.training.precision import ScaledState
from consyn_jax.training.program import TRAIN_AXES, Program
from consyn_jax.training.step import Batch, Params, TrainState, dropout_keys

# ------------------------------------------------------------------------------------------------------------------ on the device


class Statistics(NamedTuple):
    """Of an array, or of each of a stack of arrays, float32.

    Attributes:
        rms, largest: root mean square and largest magnitude of what is finite.
        nonfinite: how many elements are not.
    """

    rms: Float[Array, "*stack"]
    largest: Float[Array, "*stack"]
    nonfinite: Float[Array, "*stack"]


def statistics(x: Float[Array, "..."], stacked: bool = False) -> Statistics:
    """Of `x`, or of each x[i] of a stack. Squares neither overflow nor vanish."""
    axes = tuple(range(int(stacked), x.ndim))
    finite = jnp.isfinite(x)
    sizes = jnp.where(finite, jnp.abs(x.astype(jnp.float32)), 0.0)
    largest = jnp.max(sizes, axis=axes, keepdims=True)
    factor = jnp.where(largest > 2.0**40, 2.0**-90, jnp.where(largest < 2.0**-40, 2.0**70, 1.0))
    count = jnp.sum(finite, axis=axes, dtype=jnp.float32)
    mean = jnp.sum(jnp.square(sizes * factor), axis=axes) / jnp.maximum(count, 1.0)
    rms = jnp.sqrt(mean) / factor.reshape(mean.shape)
    return Statistics(rms, largest.reshape(mean.shape), jnp.sum(~finite, axis=axes, dtype=jnp.float32))


class Observed(NamedTuple):
    """What a step shows, all of it in every process.

    Attributes:
        activations: by part. Those of the blocks are [A, L]; the others [A], those of the head [A, chunks of tokens].
        sequences: the activations of a sequence are not all finite.
        gradients, weights: as the parameters; of stacked ones [L].
        devices: of each device of the mesh, whether all that it holds of the weights is finite. Copies should be alike, and may not be.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    activations: dict[str, Statistics]
    sequences: Bool[Array, "A B"]
    gradients: Any
    weights: Any
    devices: Bool[Array, " devices"]


def lower_observation(program: Program, accumulation: int, batch_size: int, length: int) -> jax.stages.Lowered:
    """`observe(state, batch [A, B, T]) -> Observed`: the step's forward and backward pass once more, without an update.

    Gradients are those of the mean loss in front of clipping, as the train step has them.
    """

    def observe(state: TrainState, batch: Batch) -> Observed:
        looking = optax.GradientTransformation(lambda params: (), partial(_look, program.layout))
        after, metrics = program.step(looking, 0.0)(state, batch)
        seen: Any = after.opt_state
        if program.regularisation.dropout:
            batch = batch | {"dropout_key": dropout_keys(program.seed, state.step, accumulation)}
        activations, sequences = jax.lax.map(partial(_activations, program, state.params), batch)
        gradients = seen.optimizer if isinstance(seen, ScaledState) else seen
        weights, devices = _of_parameters(program.layout, state.params), _finite_by_device(program, state.params)
        return Observed(metrics["loss"], metrics["grad_norm"], activations, sequences, gradients, weights, devices)

    everywhere = NamedSharding(program.mesh, PartitionSpec())
    with jax.set_mesh(program.mesh), jax.threefry_partitionable(True):
        like = program.batch_like((accumulation, batch_size, length), TRAIN_AXES)
        return jax.jit(observe, out_shardings=everywhere).lower(program.state_like, like)


def _look(shapes: Layout, gradients: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
    """An optimizer's update that changes nothing, and whose state is what the gradients look like."""
    seen = _of_parameters(shapes, gradients)
    return jax.tree.map(jnp.zeros_like, gradients), state._replace(optimizer=seen) if isinstance(state, ScaledState) else seen


def _of_parameters(shapes: Layout, tree: Params) -> Any:
    return jax.tree.map(lambda axes, x: statistics(x, "layers" in axes), shapes.logical_axes, tree, is_leaf=lambda a: isinstance(a, tuple))


def _finite_by_device(program: Program, params: Params) -> Bool[Array, " devices"]:
    def local(own: Params) -> Bool[Array, " one"]:
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(own)]), keepdims=True)

    places = jax.tree.map(lambda where: where.spec, program.layout.shardings(program.mesh))
    return jax.shard_map(local, in_specs=(places,), out_specs=PartitionSpec(program.mesh.axis_names), check_vma=False)(params)


def _activations(program: Program, params: Params, batch: Batch) -> tuple[dict[str, Statistics], Bool[Array, " B"]]:
    """The forward pass of one micro-batch [B, T]: its parts, and which sequences are not finite at its end."""
    rate = program.regularisation.dropout
    model: Decoder = nnx.merge(program.layout.graphdef, params)
    dropout = Dropout(batch["dropout_key"], rate) if rate else None
    x_BTD, parts = model.traced(batch["input_ids"], batch["segment_ids"], program.compute, dropout, statistics)
    parts |= {"final norm": statistics(x_BTD), "head": _logits(x_BTD, model.head_VD, program.config.vocab_size)}
    return parts, ~jnp.all(jnp.isfinite(x_BTD), axis=(1, 2))


def _logits(x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"], vocab_size: int) -> Statistics:
    """The logits, in chunks of positions, so that not all of them are there at once."""
    B, T, D = x_BTD.shape
    length = next((n for n in range(T, 1, -1) if T % n == 0 and B * n * head_VD.shape[0] <= LOGITS_AT_ONCE), 1)
    weight = head_VD.astype(x_BTD.dtype)

    def chunk(part_BTD: jax.Array) -> Statistics:
        return statistics(jnp.einsum("BTD,VD->BTV", part_BTD, weight, preferred_element_type=jnp.float32)[..., :vocab_size])

    return jax.lax.map(chunk, x_BTD.reshape(B, T // length, length, D).swapaxes(0, 1))


# ---------------------------------------------------------------------------------------------------------------- what it comes to


@dataclass(frozen=True)
class Row:
    """The statistics of one place: a part of the forward pass, or a parameter, of one layer where there are layers (counted from 0)."""

    place: str
    rms: float
    largest: float
    nonfinite: int


@dataclass(frozen=True)
class Diagnosis:
    """What a step shows, every list in the order of the forward pass.

    Attributes:
        sequences: (micro-batch, row) of those whose activations are not all finite.
        devices: those on which a weight is not finite.
    """

    loss: float
    grad_norm: float
    activations: tuple[Row, ...]
    gradients: tuple[Row, ...]
    weights: tuple[Row, ...]
    sequences: tuple[tuple[int, int], ...]
    num_sequences: int
    devices: tuple[str, ...]
    num_devices: int


def diagnose(program: Program, state: TrainState, batch: Batch) -> Diagnosis:
    """Look at the step that `state` and `batch` [A, B, T] lead to. Every process of a run must ask; the state stays as it is.

    Raises:
        jax.errors.JaxRuntimeError: a device refuses, for want of memory for example.
    """
    observe = lower_observation(program, *batch["labels"].shape).compile()
    seen: Observed = jax.device_get(observe(state, batch))
    A, B = seen.sequences.shape
    devices = list(program.mesh.devices.flat)
    return Diagnosis(
        float(seen.loss),
        float(seen.grad_norm),
        tuple(_activation_rows(seen.activations)),
        tuple(_parameter_rows(seen.gradients)),
        tuple(_parameter_rows(seen.weights)),
        tuple((a, b) for a in range(A) for b in range(B) if seen.sequences[a, b]),
        A * B,
        tuple(f"{device} of process {device.process_index}" for device, finite in zip(devices, seen.devices, strict=True) if not finite),
        len(devices),
    )


def _activation_rows(parts: dict[str, Statistics]) -> Iterable[Row]:
    """Micro-batches and chunks as one."""
    layers = parts[BLOCK_PARTS[0]].rms.shape[1]
    yield _row("embedding", parts["embedding"])
    for layer in range(layers):
        for part in BLOCK_PARTS:
            yield _row(f"layer {layer} {part}", Statistics(*(values[:, layer] for values in parts[part])))
    yield _row("final norm", parts["final norm"])
    yield _row("head", parts["head"])


# The order in which the forward pass comes by the parameters; those of the blocks once in every layer.
BLOCK_PARAMETERS = ("attention_norm", "q", "k", "v", "q_norm", "k_norm", "o", "mlp_norm", "gate", "up", "down")


def _parameter_rows(tree: dict[str, Any]) -> Iterable[Row]:
    blocks = {name: tree["layers"][name] for name in BLOCK_PARAMETERS if name in tree["layers"]}
    yield _row("embedding", tree["embedding"])
    for layer in range(len(blocks["q"].rms)):
        for name, values in blocks.items():
            yield _row(f"layer {layer} {name}", Statistics(*(value[layer] for value in values)))
    for name in ("norm", "output"):
        if name in tree:
            yield _row(name, tree[name])


def _row(place: str, parts: Statistics) -> Row:
    rms, largest, nonfinite = (np.asarray(values, np.float64) for values in parts)
    return Row(place, float(np.sqrt(np.mean(np.square(rms)))), float(largest.max()), round(nonfinite.sum()))


def began(found: Diagnosis, samples: list[list[str]] | None = None) -> tuple[str | None, str]:
    """The place where values stopped being finite, None where they are, and sentences about it for people.

    Args:
        samples: what each sequence of the batch is called, [A, B].
    """
    activation = next((row for row in found.activations if row.nonfinite), None)
    gradient = next((row for row in reversed(found.gradients) if row.nonfinite), None)
    weights = [row for row in found.weights if row.nonfinite]
    largest = max(found.activations, key=lambda row: row.largest)
    steepest = max(found.gradients, key=lambda row: row.largest)
    if activation is not None:
        place, text = activation.place, f"It began in the forward pass: {activation.place} has {_values(activation)}."
    elif gradient is not None:
        place, text = gradient.place, f"The forward pass is finite; it began in the backward pass: the gradient of {gradient.place} has {_values(gradient)}."
    elif weights:
        place, text = weights[0].place, f"Nothing that this step computes comes by it, but the weight {weights[0].place} has {_values(weights[0])}."
    elif not math.isfinite(found.loss):
        place, text = "loss", f"All activations are finite, up to {largest.largest:.3g} in {largest.place}; it began in the loss."
    elif not math.isfinite(found.grad_norm):
        place, text = "gradient norm", f"All gradients are finite, up to {steepest.largest:.3g} in {steepest.place}; their norm is beyond float32."
    else:
        return None, (
            "Repeated, this step is finite. Neither the data nor the weights bring it about, so suspect the device or its memory: "
            "go on from the last checkpoint on another."
        )
    if activation is not None and weights:
        more = f", and {len(weights) - 1} more" if len(weights) > 1 else ""
        text += f" The weight {weights[0].place} came to this step with {_values(weights[0])}{more}."
    if 0 < len(found.devices) < found.num_devices:
        text += f" Of {found.num_devices} devices, such weights are on {', '.join(found.devices[:3])}{' and others' if len(found.devices) > 3 else ''}."
    if 0 < len(found.sequences) < found.num_sequences:
        named = "" if samples is None else f": {', '.join(samples[a][b] for a, b in found.sequences[:3])}{' and so on' if len(found.sequences) > 3 else ''}"
        text += f" Of {found.num_sequences} sequences, {len(found.sequences)} {'has' if len(found.sequences) == 1 else 'have'} it{named}."
    return place, text


def _values(row: Row) -> str:
    return f"{row.nonfinite:,} value{'' if row.nonfinite == 1 else 's'} that {'is' if row.nonfinite == 1 else 'are'} not finite"
