"""Locate the first non-finite value of a step, from statistics of all its arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from consyn_jax.errors import listed
from consyn_jax.model.parameters import forward_order
from consyn_jax.model.transformer import BLOCK_PARTS
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.diagnostics.step_statistics import (
    Statistics,
    StepStatistics,
    lower_step_statistics,
)
from consyn_jax.training.program import Program
from consyn_jax.training.step import BASE, Batch, TrainState


@dataclass(frozen=True)
class Row:
    """Statistics of the activations in one part of the forward pass, or of one parameter.

    Attributes:
        place: Name of the part or parameter; inside a block, it includes the layer's index from 0.
        rms: Root mean square of the finite elements.
        largest: Largest magnitude of the finite elements.
        nonfinite: Number of non-finite elements.
    """

    place: str
    rms: float
    largest: float
    nonfinite: int


@dataclass(frozen=True)
class Diagnosis:
    """Statistics of a step, in the order of the forward pass.

    Attributes:
        sequences: (Micro-batch, row) of each sequence with non-finite activations.
        devices: Names of the devices that hold a non-finite weight.
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
    """Repeat the step from `state` and `batch` [A, B, T], and collect its statistics.

    Every process of a run must call this function. The state is not changed.

    Raises:
        jax.errors.JaxRuntimeError: A device fails, for example because it is out of memory.
    """
    batch = {name: batch[name] for name in (*program.batch_dtypes, BASE) if name in batch}
    observe = lower_step_statistics(program, *batch["labels"].shape).compile()
    found: StepStatistics = jax.device_get(observe(state, batch))
    A, B = found.sequences.shape
    devices = list(program.mesh.devices.flat)
    return Diagnosis(
        float(found.loss),
        float(found.grad_norm),
        tuple(_activation_rows(found.activations)),
        tuple(_parameter_rows(program.config, found.gradients)),
        tuple(_parameter_rows(program.config, found.weights)),
        tuple((a, b) for a in range(A) for b in range(B) if found.sequences[a, b]),
        A * B,
        tuple(
            f"{device} of process {device.process_index}"
            for device, finite in zip(devices, found.devices, strict=True)
            if not finite
        ),
        len(devices),
    )


def _activation_rows(parts: dict[str, Statistics]) -> Iterable[Row]:
    """Make rows for the activations: embedding, parts of each layer, final norm, and head.

    Each row covers all micro-batches and all chunks of the sequence.
    """
    layers = parts[BLOCK_PARTS[0]].rms.shape[1]
    yield _row("embedding", parts["embedding"])
    for layer in range(layers):
        for part in BLOCK_PARTS:
            yield _row(
                f"layer {layer} {part}", Statistics(*(values[:, layer] for values in parts[part]))
            )
    yield _row("final norm", parts["final norm"])
    yield _row("head", parts["head"])


def _parameter_rows(config: ModelConfig, tree: dict[str, Any]) -> Iterable[Row]:
    """Make rows for the trained parameters, or for their gradients."""
    for name, inner in forward_order(config).items():
        if name in tree and not inner:
            yield _row(name, tree[name])
        for layer in range(config.num_layers if inner else 0):
            for parameter in (p for p in inner if p in tree[name]):
                found = tree[name][parameter]
                parts = found.items() if isinstance(found, dict) else [("", found)]
                for part, values in parts:
                    place = f"layer {layer} {parameter} {part}".rstrip()
                    yield _row(place, Statistics(*(v[layer] for v in values)))


def _row(place: str, parts: Statistics) -> Row:
    rms, largest, nonfinite = (np.asarray(values, np.float64) for values in parts)
    return Row(
        place, float(np.sqrt(np.mean(np.square(rms)))), float(largest.max()), round(nonfinite.sum())
    )


def locate_first_nonfinite(
    found: Diagnosis, samples: list[list[str]] | None = None
) -> tuple[str | None, str]:
    """Locate the first non-finite value of a step, and describe it in sentences.

    Args:
        samples: Name of each sequence of the batch, [A, B].

    Returns:
        The name of the part or parameter (None if everything is finite), and the description.
    """
    place, text = _origin(found)
    if place is None:
        return place, text
    weights = _nonfinite(found.weights)
    if weights and _nonfinite(found.activations):
        more = f" (the first of {len(weights)} such weights)" if len(weights) > 1 else ""
        text += (
            f" Before this step, the weight {weights[0].place} already had {_count(weights[0])}"
            f"{more}."
        )
    if 0 < len(found.devices) < found.num_devices:
        text += (
            f" Such weights are on {len(found.devices)} of {found.num_devices} devices: "
            f"{listed(found.devices)}."
        )
    if 0 < len(found.sequences) < found.num_sequences:
        names = [] if samples is None else [samples[a][b] for a, b in found.sequences]
        text += (
            f" Affected sequences: {len(found.sequences)} of {found.num_sequences}"
            f"{f' ({listed(names)})' if names else ''}."
        )
    return place, text


def _origin(found: Diagnosis) -> tuple[str | None, str]:
    """Find the first non-finite value, in the order forward, backward, weights, loss, norm."""
    if rows := _nonfinite(found.activations):
        place = rows[0].place
        return place, f"The first non-finite activations are in {place}: {_count(rows[0])}."
    if rows := _nonfinite(found.gradients):  # the backward pass computes the last row first
        place = rows[-1].place
        return place, (
            "The forward pass is finite. In the backward pass, the first non-finite gradients are "
            f"those of {place}: {_count(rows[-1])}."
        )
    if rows := _nonfinite(found.weights):
        place = rows[0].place
        return place, (
            f"All activations and gradients are finite, but the weight {place} has "
            f"{_count(rows[0])} that this step does not use."
        )
    if not math.isfinite(found.loss):
        return "loss", (
            f"All activations are finite ({_largest(found.activations)}). The loss is the first "
            "non-finite value."
        )
    if not math.isfinite(found.grad_norm):
        return "gradient norm", (
            f"All gradients are finite ({_largest(found.gradients)}), but their norm overflows "
            "float32."
        )
    return None, (
        "This step is finite when it is repeated, so neither the data nor the weights are the "
        "cause. Suspect the device or its memory, and continue from the last checkpoint on "
        "another device."
    )


def _nonfinite(rows: tuple[Row, ...]) -> list[Row]:
    return [row for row in rows if row.nonfinite]


def _largest(rows: tuple[Row, ...]) -> str:
    row = max(rows, key=lambda row: row.largest)
    return f"the largest is {row.largest:.3g}, in {row.place}"


def _count(row: Row) -> str:
    return f"{row.nonfinite:,} non-finite value{'' if row.nonfinite == 1 else 's'}"
