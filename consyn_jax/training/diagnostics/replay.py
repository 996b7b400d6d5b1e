"""Repeat the step of a replay bundle."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from consyn_jax.config import RunConfig
from consyn_jax.distributed.mesh import sharding
from consyn_jax.flags import with_flags
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.diagnostics.bundle import STATES, Bundle
from consyn_jax.training.diagnostics.first_nonfinite import (
    Diagnosis,
    diagnose,
    locate_first_nonfinite,
)
from consyn_jax.training.inputs.initial_model import DeferredModel, base_on
from consyn_jax.training.optim.schedules import build_schedule
from consyn_jax.training.program import TRAIN_AXES, build_program
from consyn_jax.training.step import Batch


@dataclass(frozen=True)
class RepeatedStep:
    """The result of repeating the step of a bundle.

    Attributes:
        metrics: Metrics of the train step, which is compiled as in the run.
        mesh: Mesh on which the step was repeated. If it is not the run's mesh, the last digits of
            the metrics differ.
        text: Sentences about the first non-finite value.
    """

    metrics: dict[str, float]
    diagnosis: Diagnosis
    mesh: dict[str, int]
    text: str


def repeat_step(
    bundle: Bundle, run: RunConfig, under_adapter: DeferredModel | None = None
) -> RepeatedStep:
    """Repeat the step of a bundle on the local devices.

    Args:
        run: Configuration in the bundle, possibly with another mesh or precision.
        under_adapter: The model with the frozen weights, for an adapter run.

    Raises:
        UserError: The state is damaged, belongs to another model, or does not fit the devices.
    """
    A, B, T = bundle.batch["labels"].shape
    length = T // 2 if run.trains_on_pairs else T
    sizes = {"batch_size": B, "gradient_accumulation_steps": A, "max_tokens": length}
    run = with_flags(run, sizes)
    schedule = build_schedule(run.optimizer, bundle.total_steps)
    program = build_program(
        bundle.model,
        run.budget,
        run.hardware,
        run.optimizer,
        run.regularisation,
        lora=run.lora,
        length=T,
        schedule=schedule,
        devices=jax.devices(),
    ).program
    checkpoints = Checkpoints(bundle.path / STATES)
    try:
        state, _ = checkpoints.restore(bundle.step, program.state_like)
    finally:
        checkpoints.close()
    batch: Batch = {
        name: jax.make_array_from_callback(
            values.shape, sharding(program.mesh, TRAIN_AXES[: values.ndim]), values.__getitem__
        )
        for name, values in bundle.batch.items()
    }
    if under_adapter is not None:
        batch |= base_on(under_adapter, None, program.base_types, program.mesh)
    diagnosis = diagnose(program, state, batch)
    # The train step comes last, because it donates the state.
    _, metrics = program.lower_train_step(A, B, T).compile()(state, batch)
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    _, text = locate_first_nonfinite(diagnosis, bundle.samples)
    return RepeatedStep(values, diagnosis, dict(program.mesh.shape), text)
