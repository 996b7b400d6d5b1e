"""A run is one frozen tree of values: the flags' names, defaults and help, and the presets, all in one place.

Only the standard library is imported here, so that `consyn-train --help` is instant. `resolve` fills the tree, `validation` checks it.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar, get_args, get_origin


class UserError(ValueError):
    """A mistake of the user's. The message is one or two sentences: what is wrong, where, what to do. Commands exit with 2.

    A damaged file may have kilobytes where a message quotes a name or a number: its middle is then left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 1600 else f"{message[:800]} ... {message[-700:]}")


class Diverged(RuntimeError):
    """Loss or gradients stopped being finite. `consyn-train` exits with 3."""


class Interrupted(RuntimeError):
    """A signal ended the run after its state was saved. `consyn-train` exits with 75; the same command goes on."""


# ---------------------------------------------------------------------------------------------------------------- architecture


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's architecture, every number known. Sizes are in elements, `context` in tokens.

    The family is pre-norm, RMSNorm, RoPE, SwiGLU and grouped-query attention: Hugging Face's `llama` layout, or `qwen3` when
    `qk_norm` puts an RMSNorm on each head's queries and keys.
    """

    vocab_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    context: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = True
    tie_embeddings: bool = True
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"--num_heads {self.num_heads} is not a multiple of --num_kv_heads {self.num_kv_heads}. "
                f"Key-value heads can be {', '.join(map(str, _divisors(self.num_heads)))}."
            )
        if self.head_dim % 2:
            raise UserError(f"--head_dim {self.head_dim} is odd; rotary embeddings turn pairs, so make it even.")
        if self.rope_theta <= 0:
            raise UserError(f"--rope_theta must be greater than 0, not {self.rope_theta}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"--sliding_window must be at least 1, not {self.sliding_window}.")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128, which every mesh in use divides."""
        return -(-self.vocab_size // 128) * 128


@dataclass(frozen=True)
class Preset:
    """One of the four sizes and the recipe that goes with it. Tokens per batch and rates: see docs/design/presets.md."""

    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    context: int
    qk_norm: bool
    tie_embeddings: bool
    rope_theta: float
    max_tokens: int
    lr: float
    weight_decay: float
    beta2: float


PRESETS = {
    "haiku": Preset(128, 4, 4, 4, 32, 384, 2048, True, True, 1e4, 256, 3e-3, 0.1, 0.99),
    "verse": Preset(768, 12, 12, 12, 64, 2048, 2048, True, True, 1e4, 2048, 6e-4, 0.1, 0.95),
    "stanza": Preset(2048, 24, 16, 8, 128, 5632, 4096, True, False, 1e4, 4096, 2e-4, 0.1, 0.95),
    "epic": Preset(5120, 40, 40, 8, 128, 16384, 4096, True, False, 1e4, 4096, 1e-4, 0.1, 0.95),
}
DEFAULT_EPOCHS = 3.0  # of a run that was given no budget
OTHER_MODELS = {"lr": 3e-4, "weight_decay": 0.1, "beta2": 0.95}  # the recipe of an architecture that is no preset


# ----------------------------------------------------------------------------------------------------------------------- flags


def flag(default: Any, help: str, *, choices: tuple[str, ...] = (), aliases: tuple[str, ...] = (), const: str | None = None, math: bool = False) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        const: the value of the bare flag, for a flag whose value may be left out.
        math: the value changes what is computed, so a resumed run must not change it.
    """
    metadata = {"help": help, "choices": choices, "aliases": aliases, "const": const, "math": math}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelOptions:
    model: str = flag("verse", "haiku, verse, stanza, epic, or a directory or file with a config.json")
    checkpoint: str | None = flag(
        None, "directory with a model whose weights the run starts from (best/ or final/ of a run, or any Hugging Face llama or qwen3)", math=True
    )
    hidden_dim: int | None = flag(None, "width of the residual stream (by model)", math=True)
    num_layers: int | None = flag(None, "decoder blocks (by model)", math=True)
    num_heads: int | None = flag(None, "query heads (by model)", math=True)
    num_kv_heads: int | None = flag(None, "key-value heads (by model)", math=True)
    head_dim: int | None = flag(None, "width of one head (by model; hidden_dim / num_heads where that changes)", math=True)
    mlp_dim: int | None = flag(None, "width of the feed-forward layer (by model)", math=True)
    context: int | None = flag(None, "longest sequence the model is made for, in tokens (by model)", math=True)
    qk_norm: bool | None = flag(None, "RMSNorm on each head's queries and keys (by model)", math=True)
    tie_embeddings: bool | None = flag(None, "one matrix for input and output embedding (by model)", math=True)
    rope_theta: float | None = flag(None, "base of the rotary embedding (by model)", math=True)
    sliding_window: int | None = flag(None, "attend to at most this many tokens back, itself included (none)", math=True)


@dataclass(frozen=True)
class CorpusOptions:
    """From documents to tokens: what `consyn-prepare` and `consyn-train` have in common."""

    data: tuple[str, ...] = flag(("sample",), "files, directories, globs, Hugging Face datasets (NAME[@REVISION][:CONFIG[:SPLIT]]), or 'sample'")
    validation: tuple[str, ...] = flag((), "data to validate on, instead of a fraction of --data")
    validation_fraction: float = flag(0.01, "share of the documents that is held out (of one long text: its last part)")
    dataset_type: str = flag("auto", "how --data is read", choices=("auto", "text", "jsonl", "huggingface", "sharded"))
    text_key: str = flag("text", "field of a row that holds the text; a.b reaches into objects")
    prompt_key: str | None = flag(None, "field with what is read but not learned; several, joined by a blank line: a,b (prompt)")
    completion_key: str | None = flag(None, "field with what is learned after the prompt (completion)")
    messages_key: str = flag("messages", "field with a conversation, of which the assistant's turns are learned")
    document_separator: str | None = flag(None, "what stands between the documents of a text file, with \\n for a newline (a file is one document)")
    on_bad_rows: str = flag("error", "what a broken row does: stop, or be skipped and counted", choices=("error", "skip"))
    invalid_utf8: str = flag("error", "what bytes that are not UTF-8 do: stop, or become U+FFFD and be counted", choices=("error", "replace"))
    normalize: str = flag("nfc", "Unicode normal form of the text", choices=("nfc", "none"))
    control_characters: str = flag("remove", "control characters other than tab and line ends", choices=("remove", "keep"))
    min_chars: int = flag(1, "shorter documents are left out")
    max_chars: int | None = flag(None, "longer documents are left out")
    deduplicate: bool = flag(True, "of documents with the same text, keep the first")
    near_duplicates: float | None = flag(None, "leave out documents this similar to an earlier one, by MinHash; bare: 0.8", const="0.8")
    tokenizer: str | None = flag(
        None, "default (49,152 tokens), bytes, train:SIZE (trained on the data), or a path (that of the checkpoint or token store, else default)"
    )
    num_workers: int | None = flag(None, "processes that clean and tokenise beside the main one (one a core)")


@dataclass(frozen=True)
class DataOptions(CorpusOptions):
    data_weights: tuple[float, ...] = flag((), "share of the training sequences that each item of --data gives (all data once an epoch)", math=True)
    streaming: bool = flag(False, "begin before all of --data is tokenised; needs --max_steps or --total_tokens", math=True)
    packing: str = flag("cut", "sequences cut from the stream of documents, or made of whole documents", choices=("cut", "whole"), math=True)
    max_tokens: int | None = flag(None, "length of a training sequence in tokens (by model)", math=True)


@dataclass(frozen=True)
class BudgetOptions:
    epochs: float | None = flag(None, "passes over the data; the smallest budget given wins (3 when none is)", math=True)
    max_steps: int | None = flag(None, "optimizer steps", math=True)
    total_tokens: int | None = flag(None, "tokens to train on", math=True)
    batch_size: int = flag(8, "sequences in one micro-batch over all devices")
    gradient_accumulation_steps: int = flag(1, "micro-batches in one optimizer step")
    seed: int = flag(42, "fixes initial weights, data order and everything drawn", math=True)


OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd", "schedule_free_adamw")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "wsd", "cosine_with_restarts", "inverse_sqrt", "polynomial", "plateau")
DECAY_SHAPES = ("linear", "cosine", "sqrt")
STABLE_SCHEDULERS = ("wsd", "constant_with_warmup", "constant")  # with a part at the peak, from which --decay_from can start
MOMENTUM = {"sgd": 0.9, "muon": 0.95, "adafactor": 0.0}  # where --momentum is not given; the other rules have --beta1
PARAMETER_GROUPS = ("embedding", "head", "attention", "mlp", "norms")


@dataclass(frozen=True)
class OptimizerOptions:
    optimizer: str = flag("adamw", "update rule; muon is for the matrices inside the blocks, with adamw for the rest", choices=OPTIMIZERS, math=True)
    lr: float | None = flag(None, "peak learning rate (by model; a fifth of that for lion)", aliases=("learning_rate",), math=True)
    lr_multipliers: str | None = flag(
        None, "rates of groups of parameters as multiples of --lr; the groups are embedding, head, attention, mlp and norms (1 for all)", math=True
    )
    weight_decay: float | None = flag(None, "decoupled decay of the matrices; norms have none (by model; five times that for lion)", math=True)
    beta1: float = flag(0.9, "decay of the first moment (adamw, lion); share of the average in schedule_free_adamw", math=True)
    beta2: float | None = flag(None, "decay of the second moment (by model; 0.99 for lion)", math=True)
    eps: float = flag(1e-8, "added to the root of the second moment", math=True)
    momentum: float | None = flag(None, "decay of the momentum of sgd, muon and adafactor (0.9, 0.95, none)", math=True)
    moment_dtype: str = flag("float32", "moments and momentum are kept in this type", choices=("float32", "bfloat16"), math=True)
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this global norm; 0 leaves them", math=True)
    on_nonfinite: str = flag("halt", "what a loss or gradient that is not finite does: end the run, or lose its update", choices=("halt", "skip"))
    max_nonfinite_steps: int = flag(10, "as many such steps in a row end the run all the same")
    scheduler: str = flag("cosine", "shape of the learning rate (constant_with_warmup for schedule_free_adamw)", choices=SCHEDULERS, math=True)
    warmup_ratio: float = flag(0.02, "share of the steps in which the rate rises", math=True)
    warmup_steps: int | None = flag(None, "the same in steps; wins over --warmup_ratio", math=True)
    min_lr_ratio: float = flag(0.1, "final rate as a share of the peak (not of the constant ones and inverse_sqrt)", math=True)
    num_cycles: int = flag(3, "times that cosine_with_restarts falls", math=True)
    power: float = flag(2.0, "exponent of polynomial", math=True)
    decay_ratio: float = flag(0.2, "share of the steps in which wsd falls, at the end", math=True)
    decay_shape: str = flag("sqrt", "how wsd falls", choices=DECAY_SHAPES, math=True)
    decay_from: int | None = flag(
        None, "end a wsd or constant run from this checkpoint of --output, in OUTPUT-decay-STEP, where the rate falls for --decay_ratio of the steps", math=True
    )
    plateau_factor: float = flag(0.5, "what plateau multiplies the rate by when evaluations get no better", math=True)
    plateau_patience: int = flag(2, "evaluations in a row without a better one that plateau bears", math=True)
    plateau_cooldown: int = flag(0, "evaluations after a reduction that do not count against it", math=True)
    plateau_threshold: float = flag(1e-4, "relative change that counts as better", math=True)


@dataclass(frozen=True)
class RegularisationOptions:
    dropout: float = flag(0.0, "share of the embedding, of attention weights and of both branches of a block that training zeroes", math=True)
    label_smoothing: float = flag(0.0, "share of the target that is spread over the whole vocabulary", math=True)
    z_loss: float = flag(0.0, "weight of log(Z)^2, which keeps the softmax's normaliser Z near 1 (1e-4 is usual)", math=True)


REMAT_POLICIES = ("none", "minimal", "attention", "full", "offload")


@dataclass(frozen=True)
class HardwareOptions:
    mixed_precision: str = flag(
        "auto",
        "type of activations and products, over float32 weights; auto: what the device does well; fp8: bf16, and the products of the blocks in 8 bits",
        choices=("auto", "no", "bf16", "fp16", "fp8"),
        math=True,
    )
    gradient_checkpointing: str = flag(
        "none", "activations that are recomputed instead of kept; the bare flag means full", choices=REMAT_POLICIES, const="full"
    )
    optimizer_memory: str = flag(
        "device", "where moments and momentum lie; host: in the host's memory, and each step takes them through the device", choices=("device", "host")
    )
    auto_batch: bool = flag(False, "where a micro-batch does not fit the memory, halve --batch_size and double --gradient_accumulation_steps")
    mesh: str = flag("auto", "devices along each axis, as in data=2,fsdp=4,context=1,tensor=1; auto: fsdp over all")
    topology: str | None = flag(None, "with --dry_run: plan for these GPUs, which need not be here, as in h200:1x8 (this machine)")
    fit: str | None = flag(None, "with --dry_run: find the fastest way to fit --topology, and write it to this file", const="recipe.yaml")
    distributed: bool = flag(False, "this is one of several processes of one run; Slurm, Open MPI or Kubernetes say which, or the next three flags do")
    coordinator_address: str | None = flag(None, "HOST:PORT of process 0, where this port is free; the same in all processes")
    num_processes: int | None = flag(None, "processes in all")
    process_id: int | None = flag(None, "number of this process, from 0")
    watchdog_minutes: float = flag(10.0, "end where nothing moves for so long and 20 steps, with the stacks of all processes in stacks/; 0 never does")


# What an evaluation logs, and whether more of it is better.
EVALUATION_METRICS = {"eval/loss": False, "eval/perplexity": False, "eval/bits_per_byte": False, "eval/accuracy": True}


@dataclass(frozen=True)
class EvaluationOptions:
    eval_steps: int | None = flag(None, "steps between evaluations (a tenth of the run)")
    metric_for_best_model: str = flag("eval/loss", "what the best model, early stopping and the scheduler plateau go by", math=True)
    early_stopping_patience: int | None = flag(None, "end after so many evaluations in a row without a better one (never)")
    early_stopping_min_delta: float = flag(0.0, "what an improvement must exceed to count, in units of the metric")
    early_stopping_min_steps: int = flag(0, "do not end before this step")
    load_best_model_at_end: bool = flag(False, "final/ is the best model instead of the last")


@dataclass(frozen=True)
class SavingOptions:
    output: str = flag("./output", "run directory", aliases=("output_dir",))
    save_steps: int | None = flag(None, "steps between checkpoints (a tenth of the run)")
    save_minutes: float | None = flag(None, "minutes between checkpoints, at the most; those by steps are made, too")
    keep_last: int = flag(3, "newest checkpoints to keep")
    keep_every: int | None = flag(None, "keep every checkpoint whose step is a multiple of this, too")
    resume: str = flag("auto", "auto goes on from the newest checkpoint; never; or a step")
    overwrite: bool = flag(False, "delete the run that --output holds and start anew")
    replay: str | None = flag(None, "repeat the step in this bundle, nonfinite/STEP of a run that diverged, and show where it began; no training")
    overwrite_schedule: bool = flag(False, "go on though the number of steps or the schedule is another than the run began with")


@dataclass(frozen=True)
class LoggingOptions:
    logging_steps: int = flag(10, "steps between lines of metrics")
    logging_backend: str = flag("tensorboard", "trackers beside metrics.jsonl", choices=("tensorboard", "wandb", "both", "none"))
    wandb_project: str = flag("consyn", "Weights & Biases project")
    wandb_run_name: str | None = flag(None, "Weights & Biases run name (theirs)")
    profile_steps: str | None = flag(None, "trace steps A to B of the run, both included and counted from 1, and say where their time went")
    quiet: bool = flag(False, "no progress bar")


@dataclass(frozen=True)
class RunConfig:
    """Everything that one `consyn-train` run is told. After `resolve`, the values that depend on the model are filled in."""

    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    budget: BudgetOptions = BudgetOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    regularisation: RegularisationOptions = RegularisationOptions()
    hardware: HardwareOptions = HardwareOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    saving: SavingOptions = SavingOptions()
    logging: LoggingOptions = LoggingOptions()

    @property
    def length(self) -> int:
        """Of a training sequence in tokens, known once the run is resolved."""
        assert self.data.max_tokens is not None
        return self.data.max_tokens


@dataclass(frozen=True)
class StoreOptions:
    output: str = flag("./tokens", "directory of the token store", aliases=("output_dir",))
    test_fraction: float = flag(0.0, "share of the documents that is kept for a test split")
    overwrite: bool = flag(False, "delete the token store that --output holds and start anew")
    quiet: bool = flag(False, "no progress, only where the store is")


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that one `consyn-prepare` is told."""

    data: CorpusOptions = CorpusOptions()
    store: StoreOptions = StoreOptions()


Config = TypeVar("Config", RunConfig, PrepareConfig)


@dataclass(frozen=True)
class Flag:
    """What the command line, config files and help need to know of one field of a tree of options."""

    name: str
    group: str
    type: type
    optional: bool
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    const: str | None
    math: bool


def flags(tree: type[RunConfig] | type[PrepareConfig] = RunConfig) -> Mapping[str, Flag]:
    """All flags of a command by name, in the order in which help shows them.

    Args:
        tree: what the command is told: a dataclass of groups, whose fields are the flags.
    """
    asked: Any = tree  # mypy takes these classes for unhashable
    return _flags(asked)


@cache
def _flags(tree: Any) -> Mapping[str, Flag]:
    found = {}
    for group in dataclasses.fields(tree):
        options: Any = type(group.default)
        hints = typing.get_type_hints(options)
        for f in dataclasses.fields(options):
            hint = hints[f.name]
            optional = get_origin(hint) is types.UnionType
            if optional:
                (hint,) = (t for t in get_args(hint) if t is not type(None))
            many = get_origin(hint) is tuple
            found[f.name] = Flag(f.name, group.name, get_args(hint)[0] if many else hint, optional, many, f.default, **f.metadata)
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: a question for the known word nearest to it, or a full stop.

    >>> nearest("cosin", ["linear", "cosine"]), nearest("exponential", ["linear", "cosine"])
    ('; did you mean cosine?', '.')
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


def with_flags(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """`run` with other values by flag name."""
    for name, value in changes.items():
        group = flags()[name].group
        run = dataclasses.replace(run, **{group: dataclasses.replace(getattr(run, group), **{name: value})})
    return run


def flat(config: RunConfig | PrepareConfig) -> dict[str, Any]:
    """Every value by flag name."""
    return {name: getattr(getattr(config, f.group), name) for name, f in flags(type(config)).items()}


def architecture(options: ModelOptions, base: ModelConfig | None = None, **tokens: int | None) -> ModelConfig:
    """The model that the options describe: a preset's, or `base` with what the options override.

    Args:
        base: the architecture found in the directory or file that `--model` or `--checkpoint` names; None for a preset.
        tokens: vocab_size, bos_token_id, eos_token_id, pad_token_id, from the tokenizer.
    """
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    given = {k: v for k, v in dataclasses.asdict(options).items() if k in names and v is not None}
    if base is not None:
        return dataclasses.replace(base, **{**given, **tokens})
    return ModelConfig(**{**given, **tokens})


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
