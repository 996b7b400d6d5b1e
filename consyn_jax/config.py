"""A run is one frozen tree of values: the flags' names, defaults, help, presets and checks, all in one place.

Only the standard library is imported here, so that `consyn-train --help` is instant. Values come from four origins, weakest
first: the default, the preset of `--model`, a `--config` file, a flag. `resolve` merges them and remembers which one won.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar, get_args, get_origin


class UserError(ValueError):
    """A mistake of the user's. The message is one or two sentences: what is wrong, where, what to do. Commands exit with 2."""


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


def convert(flag: Flag, value: Any, where: str) -> Any:
    """`value` (a string of the command line, or what YAML made of a file) as the flag's type.

    Raises:
        UserError: the value is not of that type; `where` says what it was given to.
    """
    if flag.many:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_scalar(flag, item, where) for item in items)
    if value is None and flag.optional:
        return None
    return _scalar(flag, value, where)


def _short(value: Any) -> str:
    """The value as a sentence can hold it; a file may have kilobytes where a number belongs."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _scalar(flag: Flag, value: Any, where: str) -> Any:
    if isinstance(value, bool) and flag.choices:  # YAML reads no, yes, on and off as booleans
        words = (flag.const, "yes", "on") if value else ("no", "off", "none")
        value = next((word for word in words if word in flag.choices), value)
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[flag.type]
    try:
        converted = _PARSERS[flag.type](value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{where} wants {wanted}, not {_short(value)}.") from None
    if flag.choices and converted not in flag.choices:
        raise UserError(f"{where} {_short(converted)} is not known{nearest(converted, flag.choices)} Known: {', '.join(flag.choices)}.")
    return converted


def _whole(value: Any) -> int:
    number = _real(str(value).replace("_", "") if not isinstance(value, bool) else value)  # 1e9 is how people write budgets
    if number != int(number):
        raise ValueError(value)
    return int(number)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)


def _truth(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _text(value: Any) -> str:
    if isinstance(value, dict | list) or value is None:
        raise ValueError(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_PARSERS: dict[type, Callable[[Any], Any]] = {int: _whole, float: _real, bool: _truth, str: _text}


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: a question for the known word nearest to it, or a full stop.

    >>> nearest("cosin", ["linear", "cosine"]), nearest("exponential", ["linear", "cosine"])
    ('; did you mean cosine?', '.')
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


# -------------------------------------------------------------------------------------------------------------------- resolving


def resolve(
    given: Mapping[str, Any], file: Mapping[str, Any] | None = None, *, file_name: str = "", given_as: str = "flag"
) -> tuple[RunConfig, dict[str, str]]:
    """Merge defaults, preset, file and flags into one checked run.

    Args:
        given: values by flag name, strings or already of the right type; the strongest.
        file: the content of a `--config` file, a flat mapping with the flags' names.
        given_as: what `given` is called in `origins` and messages: "flag" or "keyword".

    Returns:
        The run, and the origin ("default", "preset haiku", "file x.yaml", "flag") of every value by flag name.

    Raises:
        UserError: an unknown name or a value that cannot be.
    """
    sources = ((file or {}, f"file {file_name}"), (given, given_as))
    values, origins = _merge(RunConfig, sources)
    if values["checkpoint"] is not None and origins["model"] == "default":
        values["model"], origins["model"] = values["checkpoint"], "checkpoint"
    preset = PRESETS.get(values["model"])
    recipe = dataclasses.asdict(preset) if preset else OTHER_MODELS
    for name, value in recipe.items():
        if values[name] is None:
            values[name], origins[name] = value, f"preset {values['model']}" if preset else "default"
    _fit_optimizer(values, origins)
    if preset is not None:
        _fit_heads(values, origins)
    if not values["streaming"] and all(values[name] is None for name in ("epochs", "max_steps", "total_tokens")):
        values["epochs"] = DEFAULT_EPOCHS
    config = _grouped(RunConfig, values)
    validate(config)
    return config, origins


def resolve_preparation(given: Mapping[str, Any], file: Mapping[str, Any] | None = None, *, file_name: str = "") -> tuple[PrepareConfig, dict[str, str]]:
    """As `resolve`, of `consyn-prepare`.

    Raises:
        UserError: an unknown name or a value that cannot be.
    """
    values, origins = _merge(PrepareConfig, ((file or {}, f"file {file_name}"), (given, "flag")))
    config = _grouped(PrepareConfig, values)
    validate_corpus(config.data)
    held_out, test = 0.0 if config.data.validation else config.data.validation_fraction, config.store.test_fraction
    if not 0 <= test < 1:
        raise UserError(f"--test_fraction must be at least 0 and below 1, not {test}.")
    if held_out + test >= 1:
        raise UserError(f"--validation_fraction {held_out} and --test_fraction {test} leave nothing to train on. Lower one of them.")
    return config, origins


def _grouped(tree: type[Config], values: Mapping[str, Any]) -> Config:
    """The tree of options with `values` by flag name."""
    groups: dict[str, dict[str, Any]] = {}
    for name, f in flags(tree).items():
        groups.setdefault(f.group, {})[name] = values[name]
    options: dict[str, Any] = {f.name: type(f.default) for f in dataclasses.fields(tree)}
    return tree(**{name: group(**groups[name]) for name, group in options.items()})


def _merge(tree: type[RunConfig] | type[PrepareConfig], sources: Iterable[tuple[Mapping[str, Any], str]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Defaults overridden by each of `sources` (values by flag name, and what they are called), and the origin of every value."""
    known = flags(tree)
    by_alias = {alias: name for name, f in known.items() for alias in f.aliases}
    values = {name: f.default for name, f in known.items()}
    origins = dict.fromkeys(known, "default")
    for source, origin in sources:
        for key, value in source.items():
            name = str(key).lstrip("-").replace("-", "_")
            name = by_alias.get(name, name)
            where = f"--{key}" if origin == "flag" else f"{key} ({origin})" if origin != "keyword" else str(key)
            if name not in known:
                raise UserError(f"{where} is not a setting{nearest(name, [*known, *by_alias])}")
            values[name], origins[name] = convert(known[name], value, where), origin
    return values, origins


# What --lr, --weight_decay and --beta2 of a recipe for AdamW are multiplied by, or set to, for Lion: its steps have the size of the rate
# in every element, so the rate is 3 to 10 times lower and the decay as much higher (Chen et al., 2023, section 5).
_LION_SCALE, _LION_BETA2 = 5.0, 0.99


def _fit_optimizer(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Let what recipes say for AdamW follow the optimizer, where nothing else was given."""
    optimizer, given = values["optimizer"], ("flag", "keyword", "file ")

    def own(name: str) -> bool:
        return not origins[name].startswith(given)

    if optimizer == "lion":
        fitted = {"lr": values["lr"] / _LION_SCALE, "weight_decay": values["weight_decay"] * _LION_SCALE, "beta2": _LION_BETA2}
        for name in filter(own, fitted):
            values[name], origins[name] = float(f"{fitted[name]:.6g}"), f"{origins[name]}, for lion"
    if optimizer == "sgd" and own("lr"):
        raise UserError(
            "The rates of the models are made for adamw and its kin, and --optimizer sgd wants a much higher one. Give --lr (0.1 is a start; with it, "
            "--lr_find suggests another)."
        )
    if optimizer == "schedule_free_adamw" and own("scheduler"):
        values["scheduler"], origins["scheduler"] = "constant_with_warmup", "optimizer schedule_free_adamw"


def _fit_heads(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Let what a preset says of heads follow the dimensions that were given instead of its own."""
    own = {name for name, origin in origins.items() if origin.startswith("preset")}
    heads, width = values["num_heads"], values["hidden_dim"]
    if "head_dim" in own and not {"hidden_dim", "num_heads"} <= own:
        if heads > 0 and width % heads:
            raise UserError(f"--hidden_dim {width} is not a multiple of --num_heads {heads}. Use {_nearest_multiples(width, heads)}, or give --head_dim.")
        values["head_dim"], origins["head_dim"] = width // max(heads, 1), "hidden_dim / num_heads"
    if "num_kv_heads" in own and "num_heads" not in own and heads % values["num_kv_heads"]:
        values["num_kv_heads"], origins["num_kv_heads"] = heads, "num_heads"


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


def preset_architecture(name: str, vocab_size: int = 49_152, **tokens: int | None) -> ModelConfig:
    """The `ModelConfig` of a preset.

    >>> preset_architecture("epic").num_kv_heads
    8
    """
    if name not in PRESETS:
        raise UserError(f"Model {name!r} is not a preset{nearest(name, PRESETS)} Known: {', '.join(PRESETS)}.")
    config, _ = resolve({"model": name})
    return architecture(config.model, None, vocab_size=vocab_size, **tokens)


POSITIVE: tuple[str, ...] = ("max_tokens", "epochs", "max_steps", "total_tokens", "batch_size", "gradient_accumulation_steps", "lr")
POSITIVE += ("eps", "num_cycles", "power", "max_nonfinite_steps", "eval_steps", "save_steps", "save_minutes", "keep_last", "keep_every", "logging_steps")


def validate(config: RunConfig) -> None:
    """Check what can be checked without reading a file or asking a device.

    Raises:
        UserError: naming the flag.
    """
    values = flat(config)
    for name in POSITIVE:
        if values[name] is not None and values[name] <= 0:
            raise UserError(f"--{name} must be greater than 0, not {values[name]}.")
    for name in ("weight_decay", "max_grad_norm", "warmup_steps", "plateau_patience", "plateau_cooldown", "z_loss", "seed"):
        if values[name] is not None and values[name] < 0:
            raise UserError(f"--{name} must not be negative, and is {values[name]}.")
    for name in ("beta1", "beta2", "momentum", "warmup_ratio", "min_lr_ratio", "plateau_threshold", "dropout", "label_smoothing"):
        if values[name] is not None and not 0 <= values[name] < 1:
            raise UserError(f"--{name} must be at least 0 and below 1, not {values[name]}.")
    if values["seed"] >= 2**32:
        raise UserError(f"--seed must be below 2**32, not {values['seed']}.")
    if values["warmup_steps"] is not None and values["max_steps"] is not None and values["warmup_steps"] > values["max_steps"]:
        raise UserError(f"--warmup_steps {values['warmup_steps']} is longer than the run of --max_steps {values['max_steps']}.")
    _validate_optimizer(config)
    check_context(values["max_tokens"], values["context"])
    validate_corpus(config.data)
    _validate_mixing(config)
    _validate_selection(config)
    parse_profile_steps(config.logging.profile_steps)
    _validate_processes(config.hardware)
    if values["resume"] not in ("auto", "never") and not values["resume"].isdigit():
        raise UserError(f"--resume wants auto, never or a step, not {values['resume']!r}.")
    if values["overwrite"] and values["resume"].isdigit():
        raise UserError(f"--overwrite deletes what --resume {values['resume']} would go on from. Leave one of them out.")
    if config.model.model in PRESETS:
        architecture(config.model, vocab_size=1)


def _validate_processes(hardware: HardwareOptions) -> None:
    given = {name: getattr(hardware, name) for name in ("coordinator_address", "num_processes", "process_id")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if hardware.watchdog_minutes < 0:
        raise UserError(f"--watchdog_minutes must not be negative, and is {hardware.watchdog_minutes}. 0 turns it off.")
    if len(missing) == 3:
        return
    if not hardware.distributed:
        raise UserError(f"--{next(name for name, value in given.items() if value is not None)} belongs to --distributed. Give that, too, or leave it out.")
    if missing:
        raise UserError(f"--distributed has no {' and no '.join(missing)}. Give all three, or none where Slurm, Open MPI or Kubernetes starts the processes.")
    host, _, port = given["coordinator_address"].rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator_address wants HOST:PORT, as in node1:1234, not {given['coordinator_address']!r}.")
    if given["num_processes"] < 1:
        raise UserError(f"--num_processes must be at least 1, not {given['num_processes']}.")
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(f"--process_id {given['process_id']} is not one of {given['num_processes']} processes, which are numbered from 0. Correct one of them.")


def validate_corpus(options: CorpusOptions) -> None:
    """As `validate`, of the options that `consyn-prepare` has, too.

    Raises:
        UserError: naming the flag.
    """
    for name, least in (("min_chars", 1), ("max_chars", 1), ("num_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}.")
    if options.max_chars is not None and options.max_chars < options.min_chars:
        raise UserError(f"--max_chars {options.max_chars} is below --min_chars {options.min_chars}, so no document would be left.")
    if not 0 <= options.validation_fraction < 1:
        raise UserError(f"--validation_fraction must be at least 0 and below 1, not {options.validation_fraction}.")
    if options.near_duplicates is not None and not 0.5 <= options.near_duplicates <= 1:
        raise UserError(f"--near_duplicates wants a similarity from 0.5 to 1, not {options.near_duplicates}.")
    if options.document_separator == "":
        raise UserError("--document_separator is empty. Give the text that stands between documents, or leave it out.")
    kind, _, size = (options.tokenizer or "").partition(":")
    if kind == "train" and not (size.isdigit() and 260 <= int(size) <= 1_000_000):
        raise UserError(f"--tokenizer train:SIZE wants a size from 260 to 1,000,000, not {size!r}.")


def _validate_optimizer(config: RunConfig) -> None:
    options, data = config.optimizer, config.data
    parse_multipliers(options.lr_multipliers)
    if options.momentum is not None and options.optimizer not in MOMENTUM:
        raise UserError(f"--momentum belongs to {', '.join(MOMENTUM)}; --optimizer {options.optimizer} has --beta1.")
    if not 0 < options.decay_ratio <= 1:
        raise UserError(f"--decay_ratio must be above 0 and at most 1, not {options.decay_ratio}.")
    if not 0 < options.plateau_factor < 1:
        raise UserError(f"--plateau_factor must be above 0 and below 1, not {options.plateau_factor}.")
    if options.decay_from is not None:
        if options.decay_from < 1:
            raise UserError(f"--decay_from wants the step of a checkpoint, not {options.decay_from}.")
        if options.scheduler not in STABLE_SCHEDULERS:
            raise UserError(f"--decay_from starts from a rate at its peak, where --scheduler {options.scheduler} has none. It goes with wsd and constant runs.")
        if options.decay_ratio == 1:
            raise UserError("--decay_ratio 1 leaves no steps before the decay that --decay_from starts. Use 0.2 or so.")
        if config.saving.resume.isdigit():
            raise UserError(f"--resume {config.saving.resume} and --decay_from {options.decay_from} both name where to go on. Leave one of them out.")
    if options.scheduler == "plateau" and not data.validation and data.validation_fraction == 0 and data.dataset_type != "sharded":
        raise UserError("--scheduler plateau follows the evaluations, and --validation_fraction 0 leaves no data for them. Give --validation or a fraction.")
    if options.optimizer == "schedule_free_adamw":
        if options.scheduler not in ("constant", "constant_with_warmup"):
            raise UserError(
                f"--optimizer schedule_free_adamw averages its weights in place of lowering the rate, so --scheduler {options.scheduler} does not go with it. "
                f"Use constant_with_warmup or constant."
            )
        if options.beta1 == 0:
            raise UserError("--beta1 0 leaves schedule_free_adamw without an average to train on. Use 0.9 or so.")


def parse_multipliers(text: str | None) -> dict[str, float]:
    """Learning-rate multipliers by group from `--lr_multipliers`; groups that are not named are not in it.

    Raises:
        UserError: an unknown group, one that is given twice, or a value that is no number or negative.

    >>> parse_multipliers("embedding=2,head=0.5")
    {'embedding': 2.0, 'head': 0.5}
    """
    found: dict[str, float] = {}
    for part in [] if text is None else text.split(","):
        group, _, value = (word.strip() for word in part.partition("="))
        if group not in PARAMETER_GROUPS:
            raise UserError(
                f"--lr_multipliers has no group {group!r}{nearest(group, PARAMETER_GROUPS)} "
                f"Write it as embedding=2,head=0.5; the groups are {', '.join(PARAMETER_GROUPS)}."
            )
        if group in found:
            raise UserError(f"--lr_multipliers has {group} twice. Leave one of them out.")
        try:
            found[group] = _real(value)
        except ValueError:
            raise UserError(f"--lr_multipliers {group} wants a number, not {value!r}.") from None
        if found[group] < 0:
            raise UserError(f"--lr_multipliers {group} must not be negative, and is {value}. 0 leaves the group as it is.")
    return found


def parse_profile_steps(text: str | None) -> tuple[int, int] | None:
    """The first and the last step of `--profile_steps`.

    Raises:
        UserError: it is not A:B with 1 <= A <= B.

    >>> parse_profile_steps("10:12")
    (10, 12)
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text.strip(), re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--profile_steps wants the first and the last step to trace, such as 10:12, not {text!r}.")
    return int(match[1]), int(match[2])


def _validate_selection(config: RunConfig) -> None:
    evaluation = config.evaluation
    metric, patience = evaluation.metric_for_best_model, evaluation.early_stopping_patience
    if metric not in EVALUATION_METRICS:
        raise UserError(f"--metric_for_best_model {metric} is never logged{nearest(metric, EVALUATION_METRICS)} Known: {', '.join(EVALUATION_METRICS)}.")
    if patience is not None and patience < 1:
        raise UserError(f"--early_stopping_patience must be at least 1, not {patience}.")
    for name in ("early_stopping_min_delta", "early_stopping_min_steps"):
        if getattr(evaluation, name) < 0:
            raise UserError(f"--{name} must not be negative, and is {getattr(evaluation, name)}.")
    if not config.data.validation and config.data.validation_fraction == 0:
        needs = "--early_stopping_patience" if patience is not None else "--load_best_model_at_end" if evaluation.load_best_model_at_end else ""
        if needs:
            raise UserError(f"{needs} needs evaluations, and --validation_fraction 0 leaves nothing to evaluate on. Give --validation or a fraction.")


def _validate_mixing(config: RunConfig) -> None:
    data, budget = config.data, config.budget
    if data.data_weights:
        if len(data.data_weights) != len(data.data):
            raise UserError(f"--data_weights has {len(data.data_weights)} values for {len(data.data)} items of --data. Give one for each.")
        if min(data.data_weights) <= 0:
            raise UserError(f"--data_weights must be greater than 0, not {min(data.data_weights)}. Leave out data that shall not be used.")
        if (data.tokenizer or "").startswith("train:"):
            raise UserError(f"--tokenizer {data.tokenizer} cannot be learned from a mixture. Learn it with consyn-prepare, and give its path.")
    if data.streaming:
        if data.data_weights or data.packing != "cut":
            raise UserError(f"--streaming does not go with {'--data_weights' if data.data_weights else '--packing whole'}. Leave one of them out.")
        if (data.tokenizer or "").startswith("train:"):
            raise UserError(f"--tokenizer {data.tokenizer} needs to read all data first, which --streaming does not. Leave one of them out.")
        if budget.epochs is not None or (budget.max_steps is None and budget.total_tokens is None):
            raise UserError("--streaming begins before the length of an epoch is known. Give --max_steps or --total_tokens, and no --epochs.")


def check_context(max_tokens: int | None, context: int | None) -> None:
    """Training sequences must not be longer than the model's context, where both are known.

    Raises:
        UserError: they are.
    """
    if max_tokens is not None and context is not None and max_tokens > context:
        raise UserError(f"--max_tokens {max_tokens} is above the context of {context} tokens of this model. Lower it, or raise --context.")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest_multiples(n: int, of: int) -> str:
    below = n // of * of
    return f"{below} or {below + of}" if below else str(of)
