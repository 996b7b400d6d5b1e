"""Reports of steps whose loss or gradients are not finite.

The device decides whether such a step changes the state (training/optim/skip_nonfinite.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from consyn_jax.errors import Diverged, UserError
from consyn_jax.training.diagnostics.bundle import BUNDLES, Incident, sample_names, write_bundle
from consyn_jax.training.program import Program
from consyn_jax.training.run.directory import CONFIG
from consyn_jax.training.run.recording import Recorder
from consyn_jax.training.step import Batch, TrainState


def report_skipped_step(recorder: Recorder, values: dict[str, float], limit: int) -> None:
    """Record that the update of the current step was skipped.

    Args:
        values: Metrics of the step.
        limit: Number of consecutive skipped steps that ends the run.
    """
    recorder.progress.left_out += 1
    recorder.event("nonfinite", {"action": "skip", **_details(values)})
    recorder.console.warn(
        f"{_sentence(recorder, values)}; the update is skipped. Skipped updates in a row: "
        f"{int(values['nonfinite'])}; at {limit}, the run ends."
    )


def report_divergence(
    recorder: Recorder,
    values: dict[str, float],
    batch: Batch,
    state: TrainState,
    program: Program,
    directory: Path,
) -> Diverged:
    """Record the step at which the run diverged, and write the replay bundle.

    Every process of a run must call this function.

    Args:
        values: Metrics of the step.
        state: State before the step.
        directory: The run directory.

    Returns:
        The error to raise.
    """
    step, lengths = recorder.progress.step, recorder.lengths
    try:
        details = _details(values) | {"bundle": f"{BUNDLES}/{step}"}
        recorder.event("nonfinite", {"action": "halt", **details})
    except UserError as refused:  # a full disk must not hide that the run has diverged
        recorder.console.warn(str(refused))
    A, B, _ = batch["labels"].shape
    samples = sample_names(lengths.order, step, A, B)
    diagnosis = write_bundle(
        directory / BUNDLES / str(step),
        program,
        state,
        batch,
        Incident(step, values, lengths.total_steps, samples),
        directory / CONFIG,
        recorder.console.warn,
    )
    skip = (
        ", or skip such steps with --on_nonfinite skip" if program.max_nonfinite_steps == 1 else ""
    )
    return Diverged(
        f"{_sentence(recorder, values)}; training has diverged. Lower --lr, or raise "
        f"--warmup_steps{skip}. {diagnosis}"
    )


def _details(values: dict[str, float]) -> dict[str, Any]:
    return {
        "loss": values["loss"],
        "grad_norm": values["grad_norm"],
        "in_a_row": int(values["nonfinite"]),
    }


def _sentence(recorder: Recorder, values: dict[str, float]) -> str:
    return (
        f"Step {recorder.progress.step:,}: loss {values['loss']:g}, gradient norm "
        f"{values['grad_norm']:g}"
    )
