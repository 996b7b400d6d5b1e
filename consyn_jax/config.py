"""One run as a frozen tree of values: its flags with default and help, and the presets.

The optimizer's flags are in `optimizer_config`, those of documents in `prepare_config`. A resumed
run must keep the value of a flag with `math=True` (`flags.py`). Only the standard library is
imported, so that `consyn-train --help` is instant. `resolve` fills the tree, `validation` checks
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consyn_jax.evaluation_metrics import EVALUATION_METRICS
from consyn_jax.flags import flag
from consyn_jax.model_config import DTYPES, NO_LORA, LoraOptions, ModelConfig
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.prepare_config import CorpusOptions

# ------------------------------------------------------------------------------------------- model


# Flag values by preset: first the architecture, then the recipe. docs/design/presets.md has the
# reasons and the tokens per batch.
# fmt: off
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "haiku": {
        "hidden_dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32,
        "mlp_dim": 384, "context": 2048, "qk_norm": True, "tie_embeddings": True,
        "rope_theta": 1e4, "max_tokens": 256, "lr": 3e-3, "weight_decay": 0.1, "beta2": 0.99,
    },
    "verse": {
        "hidden_dim": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12, "head_dim": 64,
        "mlp_dim": 2048, "context": 2048, "qk_norm": True, "tie_embeddings": True,
        "rope_theta": 1e4, "max_tokens": 2048, "lr": 6e-4, "weight_decay": 0.1, "beta2": 0.95,
    },
    "stanza": {
        "hidden_dim": 2048, "num_layers": 24, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128,
        "mlp_dim": 5632, "context": 4096, "qk_norm": True, "tie_embeddings": False,
        "rope_theta": 1e4, "max_tokens": 4096, "lr": 2e-4, "weight_decay": 0.1, "beta2": 0.95,
    },
    "epic": {
        "hidden_dim": 5120, "num_layers": 40, "num_heads": 40, "num_kv_heads": 8, "head_dim": 128,
        "mlp_dim": 16384, "context": 4096, "qk_norm": True, "tie_embeddings": False,
        "rope_theta": 1e4, "max_tokens": 4096, "lr": 1e-4, "weight_decay": 0.1, "beta2": 0.95,
    },
}
# fmt: on
# With --checkpoint: rate and decay as in Alpaca, Llama 2 and TRL; docs/finetuning.md has the
# sources. Beta2 is AdamW's own, since batches are small and the loss is smooth.
FINE_TUNING = {"lr": 2e-5, "weight_decay": 0.0, "beta2": 0.999, "warmup_ratio": 0.03}
PREFERENCE_TUNING = {"lr": 1e-6}  # TRL's DPOConfig
# LoRA needs about ten times the rate of a full fine-tune (Schulman et al., 2025; QLoRA has 2e-4).
LORA_TUNING = {"lr": 2e-4}
LORA_PREFERENCE_TUNING = {"lr": 1e-5}
OTHER_RECIPE = {"lr": 3e-4, "weight_decay": 0.1, "beta2": 0.95}  # of a --model that is not a preset


@dataclass(frozen=True)
class ModelOptions:
    """The architecture, and the weights to start from."""

    model: str = flag(
        "verse",
        "haiku, verse, stanza, epic or a config.json: the architecture, with new weights; a "
        "directory or hub id with weights: start from them, as with --checkpoint",
    )
    checkpoint: str | None = flag(
        None,
        "start from these weights: best/ or final/ of a run, a directory of a Hugging Face model, "
        "or its hub id",
        math=True,
    )
    hidden_dim: int | None = flag(None, "width of the residual stream (from --model)", math=True)
    num_layers: int | None = flag(None, "number of decoder blocks (from --model)", math=True)
    num_heads: int | None = flag(None, "query heads (from --model)", math=True)
    num_kv_heads: int | None = flag(None, "key-value heads (from --model)", math=True)
    head_dim: int | None = flag(
        None, "width of a head (from --model, or hidden_dim / num_heads if one is given)", math=True
    )
    mlp_dim: int | None = flag(None, "width of the feed-forward layer (from --model)", math=True)
    context: int | None = flag(
        None, "longest sequence the model supports, in tokens (from --model)", math=True
    )
    qk_norm: bool | None = flag(
        None, "RMSNorm on the queries and keys of each head (from --model)", math=True
    )
    tie_embeddings: bool | None = flag(
        None, "share one matrix between input and output embeddings (from --model)", math=True
    )
    rope_theta: float | None = flag(None, "base of the rotary embedding (from --model)", math=True)
    sliding_window: int | None = flag(
        None, "attend to at most this many tokens, the current one included (all)", math=True
    )


def architecture(
    options: ModelOptions, base: ModelConfig | None = None, **tokens: int | None
) -> ModelConfig:
    """The model that the options describe: a preset, or `base` with the options' changes.

    Args:
        base: architecture read from `--model` or `--checkpoint`; None for a preset.
        tokens: vocab_size, bos_token_id, eos_token_id and pad_token_id of the tokenizer.
    """
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    given = {k: v for k, v in dataclasses.asdict(options).items() if k in names and v is not None}
    if base is not None:
        return dataclasses.replace(base, **{**given, **tokens})
    return ModelConfig(**{**given, **tokens})


# ------------------------------------------------------------------------- data, budget and loss


@dataclass(frozen=True)
class DataOptions(CorpusOptions):
    """The corpus, and how it becomes training sequences."""

    data_weights: tuple[float, ...] = flag(
        (),
        "share of training sequences for each --data item; without it, an epoch reads all data "
        "once",
        math=True,
    )
    streaming: bool = flag(
        False,
        "start while --data is still being tokenised; needs --max_steps or --total_tokens",
        math=True,
    )
    packing: str | None = flag(
        None,
        "cut: sequences are cut from the stream of documents; whole: they hold whole documents "
        "(whole for rows with prompts, otherwise cut)",
        choices=("cut", "whole"),
        math=True,
    )
    on_long_rows: str | None = flag(
        None,
        "what --packing whole does with rows longer than a sequence (truncate; documents without "
        "a prompt continue in the next sequence)",
        choices=("truncate", "drop", "error"),
        math=True,
    )
    max_tokens: int | None = flag(
        None,
        "length of a training sequence, in tokens (from --model; with --checkpoint, what 99 % of "
        "the rows need, up to the context)",
        math=True,
    )


@dataclass(frozen=True)
class BudgetOptions:
    """The length of the run, and the size of a step."""

    epochs: float | None = flag(
        None, "passes over the data (3 if no limit is set); the first limit ends the run", math=True
    )
    max_steps: int | None = flag(None, "optimizer steps", math=True)
    total_tokens: int | None = flag(None, "tokens to train on", math=True)
    batch_size: int = flag(8, "sequences per micro-batch, over all devices")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    seed: int = flag(42, "seed of the initial weights, the data order and dropout", math=True)


DPO_BETA = 0.1  # TRL's


@dataclass(frozen=True)
class RegularisationOptions:
    """The objective of training, dropout, and terms beyond cross-entropy."""

    objective: str = flag(
        "next_token",
        "training objective; dpo: learn from pairs of answers to prefer the chosen one; needs "
        "--checkpoint",
        choices=("next_token", "dpo"),
        math=True,
    )
    dpo_beta: float = flag(
        DPO_BETA, "DPO's beta: the larger, the closer the model stays to its start", math=True
    )
    dropout: float = flag(
        0.0, "dropout rate of embedding, attention weights and both block branches", math=True
    )
    label_smoothing: float = flag(
        0.0, "share of the target probability to spread over the vocabulary", math=True
    )
    z_loss: float = flag(
        0.0, "weight of log(Z)^2, which keeps the softmax normaliser Z near 1; try 1e-4", math=True
    )

    @property
    def trains_on_pairs(self) -> bool:
        """Whether a row of a batch is a pair of answers, side by side."""
        return self.objective == "dpo"

    @property
    def sequences(self) -> int:
        """Sequences in a row of a batch."""
        return 2 if self.trains_on_pairs else 1


# ----------------------------------------------------------------------------------------- hardware

REMAT_POLICIES = ("none", "minimal", "attention", "full", "offload")


@dataclass(frozen=True)
class HardwareOptions:
    """Number types, memory, devices and processes."""

    mixed_precision: str = flag(
        "auto",
        "type of activations and matmuls, while weights stay float32; auto: a type that suits the "
        "device; fp8: bf16, with 8-bit matmuls in the blocks",
        choices=("auto", "no", "bf16", "fp16", "fp8"),
        math=True,
    )
    gradient_checkpointing: str = flag(
        "none",
        "activations to recompute; minimal: all but those of matmuls and attention; attention: all "
        "but attention's; full, or the bare flag: all; offload: as attention, and keep the others "
        "in host memory",
        choices=REMAT_POLICIES,
        const="full",
    )
    optimizer_memory: str = flag(
        "device",
        "where to keep moments and momentum; host: each step moves them to the device and back",
        choices=("device", "host"),
    )
    auto_batch: bool = flag(
        False,
        "if a micro-batch does not fit in memory, halve --batch_size and double "
        "--gradient_accumulation_steps",
    )
    mesh: str = flag(
        "auto",
        "devices along each axis, as in data=2,fsdp=4,context=1,tensor=1; auto: suits the machine",
    )
    topology: str | None = flag(
        None, "with --dry_run: plan for these GPUs instead of this machine, as in h200:1x8"
    )
    fit: str | None = flag(
        None,
        "with --dry_run: find the fastest settings for --topology and write them to this file",
        const="recipe.yaml",
    )
    verbose: bool = flag(False, "with --dry_run: also list what the estimated time assumes")
    distributed: bool = flag(
        False,
        "run as one of several processes. This process's number comes from Slurm, Open MPI, "
        "Kubernetes, or the next three flags.",
    )
    coordinator_address: str | None = flag(None, "process 0's address and a free port of its host")
    num_processes: int | None = flag(None, "number of processes")
    process_id: int | None = flag(None, "number of this process, from 0")
    rendezvous_seconds: float = flag(40.0, "time for all processes to start and find each other")
    watchdog_minutes: float = flag(
        10.0,
        "abort after this many minutes plus 20 step times without progress, and write the stacks "
        "of all processes to stacks/; 0: never",
    )


# ------------------------------------------------------------------- evaluation, saving and logging


@dataclass(frozen=True)
class EvaluationOptions:
    """Times of evaluations, and the decisions that follow from them."""

    eval_steps: int | None = flag(None, "steps between evaluations (a tenth of the run)")
    eval_requests: tuple[str, ...] = flag(
        (),
        "JSON Lines files of requests with known answers, as for consyn-evaluate; each evaluation "
        "scores them, as eval/TASK/accuracy and other metrics",
    )
    metric_for_best_model: str = flag(
        "eval/loss",
        f"metric for the best model, early stopping and plateau: {', '.join(EVALUATION_METRICS)}, "
        "or one of --eval_requests",
        math=True,
    )
    early_stopping_patience: int | None = flag(
        None, "stop after this many evaluations in a row without improvement (never)"
    )
    early_stopping_min_delta: float = flag(
        0.0, "an improvement counts if it is larger than this, in units of the metric"
    )
    early_stopping_min_steps: int = flag(0, "do not stop early before this step")
    load_best_model_at_end: bool = flag(False, "make final/ the best model instead of the last")


@dataclass(frozen=True)
class SavingOptions:
    """The run directory, its checkpoints, and what to do with an existing run."""

    output: str = flag("./output", "run directory", aliases=("output_dir",))
    save_steps: int | None = flag(None, "steps between checkpoints (a tenth of the run)")
    save_minutes: float | None = flag(
        None, "also save a checkpoint this many minutes after the last one"
    )
    save_dtype: str | None = flag(
        None,
        "number type of the weights in best/ and final/ (that of --checkpoint, or float32); "
        "checkpoints/ is always float32",
        choices=DTYPES,
    )
    keep_last: int = flag(3, "number of newest checkpoints to keep")
    keep_every: int | None = flag(None, "also keep checkpoints whose step is a multiple of this")
    resume: str = flag(
        "auto", "auto: from the newest checkpoint; never: a new run; or from this step"
    )
    overwrite: bool = flag(False, "delete the run in --output and start anew")
    replay: str | None = flag(
        None,
        "repeat the step that ended a diverged run, from its directory nonfinite/STEP, and show "
        "where the first non-finite value came from; does not train",
    )
    overwrite_schedule: bool = flag(
        False, "continue a run even if its number of steps or its schedule has changed"
    )


@dataclass(frozen=True)
class LoggingOptions:
    """Metrics, trackers, profiles and progress."""

    logging_steps: int = flag(10, "steps between lines of metrics")
    logging_backend: tuple[str, ...] = flag(
        ("tensorboard",),
        "trackers besides metrics.jsonl, one or several; module:Class is a callback of yours",
        choices=("tensorboard", "wandb", "both", "none", "module:Class"),
    )
    wandb_project: str = flag("consyn", "Weights & Biases project")
    wandb_run_name: str | None = flag(None, "Weights & Biases run name (chosen by W&B)")
    histograms: bool = flag(False, "trackers get histograms of weights and mean gradients, too")
    profile_steps: str | None = flag(
        None, "trace steps A:B (both included, counted from 1), and report where the time went"
    )
    quiet: bool = flag(False, "show no progress bar")


@dataclass(frozen=True)
class ProofOptions:
    """Inspections of an existing run; each of them replaces training."""

    verify: str | None = flag(
        None,
        "compare a run, a checkpoint or an exported model with its records, and name what differs",
    )
    replay_step: int | None = flag(
        None, "repeat this step of the run in --output; compare loss and gradient norm with its log"
    )
    documents_of: str | None = flag(
        None, "list the documents that step A, or steps A to B, of the run in --output learned from"
    )
    json: bool = flag(False, "print the answer of the three flags above as JSON")


@dataclass(frozen=True)
class RunConfig:
    """All settings of one `consyn-train` run. `resolve` fills in those that depend on the model."""

    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    budget: BudgetOptions = BudgetOptions()
    optimizer: OptimizerOptions = OptimizerOptions()  # noqa: RUF009 - it is frozen
    regularisation: RegularisationOptions = RegularisationOptions()
    lora: LoraOptions = NO_LORA
    hardware: HardwareOptions = HardwareOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    saving: SavingOptions = SavingOptions()
    logging: LoggingOptions = LoggingOptions()
    proof: ProofOptions = ProofOptions()

    @property
    def length(self) -> int:
        """Length of a training sequence in tokens.

        Known once the run is resolved, or, if --model is no preset, once the model's
        `config.json` is read (`cli/choices`).
        """
        assert self.data.max_tokens is not None
        return self.data.max_tokens

    @property
    def trains_on_pairs(self) -> bool:
        """Whether a row of a batch is a pair of answers, side by side."""
        return self.regularisation.trains_on_pairs

    @property
    def row_length(self) -> int:
        """Tokens of a row of a batch: a sequence, or both sequences of a pair."""
        return self.length * self.regularisation.sequences
