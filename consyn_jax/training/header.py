"""The header of a run: a description that is printed before training begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from consyn_jax.config import RunConfig
from consyn_jax.data.mixture import Mixture
from consyn_jax.errors import listed
from consyn_jax.model.arithmetic import counted_parameters, useful_ranks
from consyn_jax.model_config import LORA_TARGETS, LoraOptions, ModelConfig
from consyn_jax.training.logging.console import show
from consyn_jax.training.optim.groups import describe_groups
from consyn_jax.training.optim.optimizers import lr_warning
from consyn_jax.training.optim.schedules import draw_schedule, write_schedule_plot
from consyn_jax.training.program import Built, Program
from consyn_jax.training.run.directory import run_path
from consyn_jax.training.run.recording import Lengths

Row = tuple[str, str]
LORA_RATE = 10.0  # best rate of an adapter / best rate of a full fine-tune (Schulman et al., 2025)


def header(
    run: RunConfig,
    built: Built,
    lengths: Lengths,
    notes: Sequence[Row] = (),
    cache_rows: Sequence[Row] = (),
) -> list[Row]:
    """Make the header's rows, (name, value): model, devices, chosen settings, and budget of a run.

    Args:
        notes: Further rows, about the data.
        cache_rows: Rows about compiled programs.
    """
    program, config = built.program, built.program.config
    sizes = (
        f"{counted_parameters(config)}, {config.num_layers} layers, "
        f"{config.hidden_dim} wide, vocabulary {config.vocab_size:,}"
    )
    groups = describe_groups(run.optimizer, program.layout.shapes, program.layout.logical_axes)
    rows = [
        ("model", f"{run.model.model}: {sizes}"),
        *_adapter(run.lora, program),
        ("devices", _devices(run, built)),
        ("attention", f"{built.attention.backend}: {built.attention.reason}"),
        ("precision", built.precision.reason),
        ("optimizer", groups),
        *_objective(run),
        *notes,
        *_shares(lengths),
        ("budget", _budget(run, lengths)),
        ("output", str(run_path(run))),
        *cache_rows,
    ]
    if run.saving.remote is not None:
        rows.append(("remote", f"a copy of the output is kept at {run.saving.remote}"))
    if run.optimizer.decay_from is not None:
        rows.append(
            ("decays", f"from step {run.optimizer.decay_from:,} of the run in {run.saving.output}")
        )
    return rows


def _adapter(lora: LoraOptions, program: Program) -> list[Row]:
    """Describe the adapter of a run, and the dtype of the frozen weights."""
    if program.base_types is None:
        return []
    names = ", ".join(name for name in LORA_TARGETS if name.removesuffix("_proj") in lora.targets)
    return [
        (
            "adapter",
            f"LoRA of rank {lora.rank} and alpha {lora.scale * lora.rank:g} on {names}: "
            f"{program.layout.num_parameters:,} parameters are trained, the others are frozen "
            f"in {program.base_types.matrices}",
        )
    ]


def _devices(run: RunConfig, built: Built) -> str:
    mesh = built.program.mesh
    split = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    reason = f": {built.mesh.reason}" if mesh.size > 1 and run.hardware.mesh == "auto" else ""
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {kind} ({split or 'no split'}{reason})"


def _budget(run: RunConfig, lengths: Lengths) -> str:
    pairs = "pairs of 2 x " if run.trains_on_pairs else "x "
    budget = (
        f"{lengths.total_steps:,} steps of {lengths.sequences_per_step} {pairs}"
        f"{run.data.max_tokens} tokens"
    )
    if not lengths.sequences_per_epoch:
        return budget
    epochs = lengths.total_steps * lengths.sequences_per_step / lengths.sequences_per_epoch
    return f"{budget}, {epochs:.3g} epochs"


def _objective(run: RunConfig) -> list[Row]:
    """Describe an objective other than next-token prediction."""
    if not run.trains_on_pairs:
        return []
    beta = run.regularisation.dpo_beta
    return [("objective", f"DPO with beta {beta:g}, against the model that the run starts from")]


def _shares(lengths: Lengths) -> list[Row]:
    """Describe how many of the run's sequences each source of a mixture provides."""
    order, total = lengths.order, lengths.total_steps * lengths.sequences_per_step
    if not isinstance(order, Mixture):
        return []
    taken = [
        f"{name} {n:,} ({n / total:.1%}, {n / len(order.datasets[name]):.3g} epochs)"
        for name, n in order.counts(total).items()
    ]
    return [("mixture", f"sequences of {', '.join(taken)}")]


def show_rates(schedule: optax.Schedule, total_steps: int, path: Path) -> None:
    """Draw the learning rates of a run as text, and as schedule.png in the run directory.

    Raises:
        UserError: The picture cannot be written.
    """
    show(draw_schedule(schedule, total_steps))
    picture = path / "schedule.png"
    write_schedule_plot(schedule, total_steps, picture)
    show(f"This is the learning rate by step. A picture of it is in {picture}.")


def _rank_warnings(lora: LoraOptions, config: ModelConfig) -> Iterator[str]:
    """Warn of a LoRA rank above a matrix's full rank; such a rank only costs memory and time."""
    ranks = useful_ranks(config, lora)
    small = [name for name, rank in ranks.items() if lora.rank > rank]
    if small:
        names = listed([name for name in LORA_TARGETS if name.removesuffix("_proj") in small], 7)
        yield (
            f"--lora_rank {lora.rank} is above the full rank of {names}, whose shorter side is "
            f"{min(ranks.values())}. Lower --lora_rank; common ranks are 8 to 64."
        )


def unused_evaluations(
    has_data: bool, run: RunConfig, origins: Mapping[str, str], callbacks: Sequence[Any]
) -> list[str]:
    """Warn of settings that have no effect without evaluation data, in a run started in Python."""
    steps = run.evaluation.eval_steps
    unused = [f"eval_steps={steps}"] if steps and origins["eval_steps"] == "keyword" else []
    heard = [type(each).__name__ for each in callbacks if hasattr(each, "on_evaluate")]
    unused += [f"{name}.on_evaluate" for name in heard]
    if has_data or not unused:
        return []
    return [
        f"{' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect without "
        "evaluation data. Pass it as eval_dataloader, for example get_dataset(PATH, "
        "split='validation')."
    ]


def warnings(run: RunConfig, built: Built, lengths: Lengths) -> Iterator[str]:
    """Yield warnings about settings that are allowed, but rarely intended."""
    rule, from_weights = run.optimizer.optimizer, run.model.checkpoint is not None
    factor = LORA_RATE if run.lora.is_used else 1.0
    if warning := lr_warning(run.optimizer.lr or 0.0, rule, from_weights, factor):
        yield warning
    if run.lora.is_used:
        yield from _rank_warnings(run.lora, built.program.config)
    if built.attention.backend == "xla" and jax.default_backend() == "gpu":
        yield f"Attention falls back to XLA: {built.attention.reason}."
    batch_size, epoch = run.budget.batch_size, lengths.sequences_per_epoch
    if run.budget.total_tokens is None and epoch is not None and batch_size > epoch:
        yield (
            f"One batch has {batch_size} sequences, but the data has only {epoch}, so each "
            "step trains on some of them twice. Lower --batch_size."
        )
