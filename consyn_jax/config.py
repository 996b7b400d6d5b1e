"""The configuration of a run as frozen dataclasses: each flag's default and help, and the presets.

Optimizer flags and recipes are in `optimizer_config`, document flags in `prepare_config`. A resumed
run must not change a flag with `math=True` (`flags.py`). Only the standard library is imported, so
that `consyn-train --help` is instant. `resolve` fills in the configuration and `validation` checks
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


@dataclass(frozen=True)
class ModelOptions:
    """The architecture, and the weights to start from."""

    model: str = flag(
        "verse",
        "a preset (haiku, verse, stanza, epic) or config.json: new weights in this architecture; a "
        "model directory or hub id: start from its weights, as with --checkpoint",
    )
    checkpoint: str | None = flag(
        None,
        "initial weights: best/ or final/ of a run, a Hugging Face model directory, a hub id, or a "
        "bucket URL (s3://, gs://)",
        math=True,
    )
    hidden_dim: int | None = flag(None, "width of the residual stream (from --model)", math=True)
    num_layers: int | None = flag(None, "number of decoder blocks (from --model)", math=True)
    num_heads: int | None = flag(None, "number of query heads (from --model)", math=True)
    num_kv_heads: int | None = flag(None, "number of key-value heads (from --model)", math=True)
    head_dim: int | None = flag(
        None, "width of a head (from --model, or hidden_dim / num_heads if one is set)", math=True
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
        None, "attend to at most this many tokens, the current one included (no limit)", math=True
    )


def architecture(
    options: ModelOptions, base: ModelConfig | None = None, **tokens: int | None
) -> ModelConfig:
    """Build an architecture from `options` alone, or from `base` changed by `options`.

    Args:
        base: architecture read from `--model` or `--checkpoint`; None for a preset.
        tokens: the tokenizer's vocab_size, bos_token_id, eos_token_id and pad_token_id.
    """
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    given = {k: v for k, v in dataclasses.asdict(options).items() if k in names and v is not None}
    if base is not None:
        return dataclasses.replace(base, **{**given, **tokens})
    return ModelConfig(**{**given, **tokens})


# ------------------------------------------------------------------------- data, budget and loss


@dataclass(frozen=True)
class DataOptions(CorpusOptions):
    """The corpus, and how it is cut or packed into training sequences."""

    data_weights: tuple[float, ...] = flag(
        (),
        "share of training sequences drawn from each --data item; without this flag, an epoch "
        "reads all data once",
        math=True,
    )
    streaming: bool = flag(
        False,
        "start training while --data is still being tokenised; needs --max_steps or --total_tokens",
        math=True,
    )
    packing: str | None = flag(
        None,
        "cut: join all documents and cut the result into sequences; whole: fill each sequence "
        "with whole documents (for rows with prompts: whole; otherwise: cut)",
        choices=("cut", "whole"),
        math=True,
    )
    on_long_rows: str | None = flag(
        None,
        "what --packing whole does with a row longer than a sequence (for rows with prompts: "
        "truncate; for other documents: continue in the next sequence)",
        choices=("truncate", "drop", "error"),
        math=True,
    )
    max_tokens: int | None = flag(
        None,
        "length of a training sequence, in tokens (default: set by --model; with --checkpoint, "
        "enough for 99 % of the rows to train on, but at most the model's context)",
        math=True,
    )


@dataclass(frozen=True)
class BudgetOptions:
    """The length of the run, and the size of a step."""

    epochs: float | None = flag(
        None,
        "passes over the data (3 if there is no other limit); the first limit ends training",
        math=True,
    )
    max_steps: int | None = flag(None, "maximum number of optimizer steps", math=True)
    total_tokens: int | None = flag(None, "maximum number of tokens to train on", math=True)
    batch_size: int = flag(8, "sequences per micro-batch, over all devices")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    seed: int = flag(42, "seed of the initial weights, the data order and dropout", math=True)


DPO_BETA = 0.1  # TRL's


@dataclass(frozen=True)
class RegularisationOptions:
    """The training objective, dropout, and additions to the cross-entropy loss."""

    objective: str = flag(
        "next_token",
        "training objective; dpo (needs --checkpoint): learn to prefer the chosen answer of a pair",
        choices=("next_token", "dpo"),
        math=True,
    )
    dpo_beta: float = flag(
        DPO_BETA, "DPO's beta; larger values keep the model closer to the initial one", math=True
    )
    dropout: float = flag(
        0.0, "dropout rate of embeddings, attention weights and both sublayers' outputs", math=True
    )
    label_smoothing: float = flag(
        0.0, "share of the target probability to spread over the vocabulary", math=True
    )
    z_loss: float = flag(
        0.0, "weight of log(Z)^2, which keeps the softmax normaliser Z near 1; try 1e-4", math=True
    )

    @property
    def trains_on_pairs(self) -> bool:
        """Whether each row of a batch has the two sequences of a preference pair."""
        return self.objective == "dpo"

    @property
    def sequences(self) -> int:
        """Number of sequences in a row of a batch: 2 for a preference pair, otherwise 1."""
        return 2 if self.trains_on_pairs else 1


# ----------------------------------------------------------------------------------------- hardware

REMAT_POLICIES = ("none", "minimal", "attention", "full", "offload")


@dataclass(frozen=True)
class HardwareOptions:
    """Number types, memory, devices and processes."""

    mixed_precision: str = flag(
        "auto",
        "number type of activations and matmuls; weights stay float32; auto: the type that "
        "suits the device; fp8: bf16, with 8-bit matmuls in the blocks",
        choices=("auto", "no", "bf16", "fp16", "fp8"),
        math=True,
    )
    logits_dtype: str = flag(
        "float32",
        "number type in which training stores logits, between their matmul and the float32 "
        "softmax; bfloat16 needs bf16 or fp8; evaluation always uses float32",
        choices=("float32", "bfloat16"),
        math=True,
    )
    gradient_checkpointing: str = flag(
        "none",
        "activations to recompute in the backward pass; minimal: all except outputs of matmuls "
        "and attention; attention: all except attention outputs; full, or the bare flag: all; "
        "offload: the same as attention, but saved activations are kept in host memory",
        choices=REMAT_POLICIES,
        const="full",
    )
    optimizer_memory: str = flag(
        "device",
        "memory for moments and momentum; host: each step copies them to the device and back",
        choices=("device", "host"),
    )
    auto_batch: bool = flag(
        False,
        "if a micro-batch does not fit in memory, halve --batch_size and double "
        "--gradient_accumulation_steps",
    )
    mesh: str = flag(
        "auto",
        "axis sizes such as data=2,fsdp=4,context=1,tensor=1; auto: a mesh that fits the machine",
    )
    topology: str | None = flag(
        None, "with --dry_run: plan for these GPUs or TPUs, such as h200:1x8 or v5e:2x4"
    )
    fit: str | None = flag(
        None,
        "with --dry_run: find the fastest settings for --topology and write them to this file",
        const="recipe.yaml",
    )
    verbose: bool = flag(False, "with --dry_run: also list the assumptions of the time estimate")
    distributed: bool = flag(
        False,
        "run as one of several processes. This process's number comes from Slurm, Open MPI, "
        "Kubernetes, or the next three flags.",
    )
    coordinator_address: str | None = flag(None, "address and free port of process 0's host")
    num_processes: int | None = flag(None, "number of processes")
    process_id: int | None = flag(None, "number of this process, counted from 0")
    rendezvous_seconds: float = flag(40.0, "seconds for all processes to start and find each other")
    watchdog_minutes: float = flag(
        10.0,
        "abort after this many minutes plus 20 step times without progress, and write the stacks "
        "of all processes to stacks/; 0: never",
    )


# ------------------------------------------------------------------- evaluation, saving and logging


@dataclass(frozen=True)
class EvaluationOptions:
    """Frequency of evaluations, and decisions based on their results."""

    eval_steps: int | None = flag(None, "steps between evaluations (a tenth of the run)")
    eval_requests: tuple[str, ...] = flag(
        (),
        "JSON Lines files of requests with known answers, in the format of consyn-evaluate "
        "--requests; each evaluation logs their scores as eval/TASK/accuracy and other metrics",
    )
    metric_for_best_model: str = flag(
        "eval/loss",
        "metric that selects the best model and drives early stopping and the plateau "
        f"schedule: {', '.join(EVALUATION_METRICS)}, or a metric of --eval_requests",
        math=True,
    )
    early_stopping_patience: int | None = flag(
        None, "stop after this many evaluations in a row without improvement (never)"
    )
    early_stopping_min_delta: float = flag(
        0.0, "smallest improvement that counts for early stopping, in units of the metric"
    )
    early_stopping_min_steps: int = flag(0, "do not stop early before this step")
    load_best_model_at_end: bool = flag(False, "write the best model to final/, not the last one")


@dataclass(frozen=True)
class SavingOptions:
    """The run directory, its checkpoints, and what to do with an existing run."""

    output: str = flag("./output", "run directory", aliases=("output_dir",))
    save_steps: int | None = flag(None, "steps between checkpoints (a tenth of the run)")
    save_minutes: float | None = flag(
        None, "also save a checkpoint when this many minutes have passed since the last one"
    )
    save_dtype: str | None = flag(
        None,
        "number type of the weights in best/ and final/ (from --checkpoint, otherwise "
        "float32); checkpoints/ is always float32",
        choices=DTYPES,
    )
    keep_last: int = flag(3, "number of newest checkpoints to keep")
    keep_every: int | None = flag(None, "also keep checkpoints whose step is a multiple of this")
    resume: str = flag(
        "auto",
        "auto: continue the run in --output from its newest checkpoint; STEP: from the checkpoint "
        "of that step; never: stop if --output already holds a run",
    )
    remote: str | None = flag(None, "s3:// or gs:// URL where a copy of the run is kept")
    overwrite: bool = flag(False, "delete the run in --output and --remote and start a new one")
    replay: str | None = flag(
        None,
        "repeat the last step of a diverged run, from its directory nonfinite/STEP, and show "
        "where the first non-finite value arose; does not train",
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
        "one or several trackers, in addition to metrics.jsonl; module:Class names your own "
        "callback class",
        choices=("tensorboard", "wandb", "both", "none", "module:Class"),
    )
    wandb_project: str = flag("consyn", "Weights & Biases project")
    wandb_run_name: str | None = flag(None, "Weights & Biases run name (chosen by W&B)")
    histograms: bool = flag(False, "also send histograms of weights and mean gradients to trackers")
    profile_steps: str | None = flag(
        None, "profile steps A to B (both included, counted from 1), and report where the time went"
    )
    quiet: bool = flag(False, "show no progress bar")


@dataclass(frozen=True)
class ProofOptions:
    """Checks of an existing run; with one of these flags, the command does not train."""

    verify: str | None = flag(
        None,
        "compare a run, checkpoint or exported model with its records, and name each difference",
    )
    replay_step: int | None = flag(
        None, "repeat this step of the run in --output; compare loss and gradient norm with the log"
    )
    documents_of: str | None = flag(
        None, "list the documents trained on in step A, or in steps A to B, of the run in --output"
    )
    json: bool = flag(False, "print results of --verify, --replay_step or --documents_of as JSON")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a `consyn-train` run; `resolve` completes those that depend on the model."""

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
        """Length of a training sequence, in tokens; set by `resolve`, or else by `cli/choices`."""
        assert self.data.max_tokens is not None
        return self.data.max_tokens

    @property
    def trains_on_pairs(self) -> bool:
        """Whether each row of a batch has the two sequences of a preference pair."""
        return self.regularisation.trains_on_pairs

    @property
    def row_length(self) -> int:
        """Tokens in a row of a batch: one sequence, or both sequences of a preference pair."""
        return self.length * self.regularisation.sequences
