"""Which values of a run cannot be, as far as no file is read and no device asked. Only the standard library is imported here."""

from __future__ import annotations

import math
import re
from typing import Any

from consyn_jax.config import (
    EVALUATION_METRICS,
    MOMENTUM,
    PARAMETER_GROUPS,
    PRESETS,
    STABLE_SCHEDULERS,
    CorpusOptions,
    HardwareOptions,
    RunConfig,
    UserError,
    architecture,
    flat,
    nearest,
)

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
    if config.model.model in PRESETS:
        architecture(config.model, vocab_size=1)
    check_context(values["max_tokens"], values["context"])
    validate_corpus(config.data)
    _validate_mixing(config)
    _validate_selection(config)
    parse_profile_steps(config.logging.profile_steps)
    _validate_processes(config.hardware)
    step = natural(values["resume"])
    if step is None and values["resume"] not in ("auto", "never"):
        raise UserError(f"--resume wants auto, never or a step, not {values['resume']!r}.")
    if values["overwrite"] and step is not None:
        raise UserError(f"--overwrite deletes what --resume {step} would go on from. Leave one of them out.")


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
    if not host or not 0 < (natural(port) or 0) < 65536:
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
    if kind == "train" and not 260 <= (natural(size) or 0) <= 1_000_000:
        raise UserError(f"--tokenizer train:SIZE wants a size from 260 to 1,000,000, not {size!r}.")


def _validate_optimizer(config: RunConfig) -> None:
    options = config.optimizer
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
        if natural(config.saving.resume) is not None:
            raise UserError(f"--resume {config.saving.resume} and --decay_from {options.decay_from} both name where to go on. Leave one of them out.")
    if options.optimizer == "schedule_free_adamw":
        if options.scheduler not in ("constant", "constant_with_warmup"):
            raise UserError(
                f"--optimizer schedule_free_adamw averages its weights in place of lowering the rate, so --scheduler {options.scheduler} does not go with it. "
                f"Use constant_with_warmup or constant."
            )
        if options.beta1 == 0:
            raise UserError("--beta1 0 leaves schedule_free_adamw without an average to train on. Use 0.9 or so.")


def _validate_selection(config: RunConfig) -> None:
    evaluation, data = config.evaluation, config.data
    metric, patience = evaluation.metric_for_best_model, evaluation.early_stopping_patience
    if metric not in EVALUATION_METRICS:
        raise UserError(f"--metric_for_best_model {metric} is never logged{nearest(metric, EVALUATION_METRICS)} Known: {', '.join(EVALUATION_METRICS)}.")
    if patience is not None and patience < 1:
        raise UserError(f"--early_stopping_patience must be at least 1, not {patience}.")
    for name in ("early_stopping_min_delta", "early_stopping_min_steps"):
        if getattr(evaluation, name) < 0:
            raise UserError(f"--{name} must not be negative, and is {getattr(evaluation, name)}.")
    if data.validation or data.validation_fraction > 0 or data.dataset_type == "sharded":  # a token store can have a validation split of its own
        return
    if needs := what_needs_evaluations(config):
        raise UserError(f"{needs} needs evaluations, and --validation_fraction 0 leaves nothing to evaluate on. Give --validation or a fraction.")


def what_needs_evaluations(config: RunConfig) -> str | None:
    """The first flag of a run that comes to nothing without evaluations."""
    if config.evaluation.early_stopping_patience is not None:
        return "--early_stopping_patience"
    if config.evaluation.load_best_model_at_end:
        return "--load_best_model_at_end"
    return "--scheduler plateau" if config.optimizer.scheduler == "plateau" else None


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
            found[group] = real(value)
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


def check_context(max_tokens: int | None, context: int | None) -> None:
    """Training sequences must not be longer than the model's context, where both are known.

    Raises:
        UserError: they are.
    """
    if max_tokens is not None and context is not None and max_tokens > context:
        raise UserError(f"--max_tokens {max_tokens} is above the context of {context} tokens of this model. Lower it, or raise --context.")


def real(value: Any) -> float:
    """The value as a finite number.

    Raises:
        ValueError: it is none; so are true and false.
    """
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)


def natural(text: str) -> int | None:
    """The number that up to 15 decimal digits spell; None for any other text. (`str.isdigit` holds of ², too, which `int` refuses.)

    >>> natural("12"), natural("-1"), natural("²")
    (12, None, None)
    """
    return int(text) if len(text) <= 15 and text.isdecimal() else None
