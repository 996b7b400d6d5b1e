"""What a run says of itself before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax

from consyn_jax.data.mixture import Mixture
from consyn_jax.training.optimizer import describe_groups, lr_warning
from consyn_jax.training.program import Built
from consyn_jax.training.run_directory import run_path

if TYPE_CHECKING:
    from consyn_jax.training.trainer import ConsynTrainer

Row = tuple[str, str]


def header(trainer: ConsynTrainer, built: Built) -> list[Row]:
    """Names and values: model, devices, what was chosen for them and why, data and budget."""
    run, layout, config, source = trainer.run, built.program.layout, trainer.model.config, trainer.train_source
    split = ", ".join(f"{axis}={size}" for axis, size in built.program.mesh.shape.items() if size > 1) or "no split"
    if len(built.program.mesh.devices.flat) > 1 and run.hardware.mesh == "auto":
        split += f": {built.mesh.reason}"
    sizes = f"{layout.num_parameters:,} parameters, {config.num_layers} layers, {config.hidden_dim} wide, vocabulary {config.vocab_size:,}"
    epochs = f", {trainer.total_steps * trainer.sequences_per_step / source.sequences:.3g} epochs" if source.sequences else ""
    rows = [
        ("model", f"{run.model.model}: {sizes}"),
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind} ({split})"),
        ("attention", f"{built.attention.backend}: {built.attention.reason}"),
        ("precision", built.precision.reason),
        ("optimizer", describe_groups(run.optimizer, layout.shapes, layout.logical_axes)),
        *trainer.notes,
        *_shares(trainer),
        ("budget", f"{trainer.total_steps:,} steps of {trainer.sequences_per_step} x {run.data.max_tokens} tokens{epochs}"),
        ("output", str(run_path(run))),
    ]
    if trainer.cache_refusal is not None:
        rows.append(("compiled programs", trainer.cache_refusal))
    if run.optimizer.decay_from is not None:
        rows.append(("decays", f"from step {run.optimizer.decay_from:,} of the run in {run.saving.output}"))
    return rows


def _shares(trainer: ConsynTrainer) -> list[Row]:
    """For a mixture, what the run takes from each source."""
    order, total = trainer.train_source.order, trainer.total_steps * trainer.sequences_per_step
    if not isinstance(order, Mixture):
        return []
    taken = [f"{name} {n:,} ({n / total:.1%}, {n / len(order.datasets[name]):.3g} epochs)" for name, n in order.counts(total).items()]
    return [("mixture", f"sequences of {', '.join(taken)}")]


def warnings(trainer: ConsynTrainer, built: Built) -> Iterator[str]:
    """Sentences about what is allowed, and rarely meant."""
    run, source = trainer.run, trainer.train_source
    if warning := lr_warning(run.optimizer.lr or 0.0, run.optimizer.optimizer, run.model.checkpoint is not None):
        yield warning
    if built.attention.backend == "xla" and jax.default_backend() == "gpu":
        yield f"Attention falls back to XLA: {built.attention.reason}."
    if run.budget.total_tokens is None and source.sequences is not None and run.budget.batch_size > source.sequences:
        yield f"One batch of {run.budget.batch_size} sequences is more than the {source.sequences} of the whole data."
