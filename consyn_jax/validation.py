"""Check a configuration and parse single flags, with the standard library and no file access."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from consyn_jax.config import PRESETS, HardwareOptions, RunConfig, architecture
from consyn_jax.errors import UserError, nearest
from consyn_jax.evaluation_metrics import EVALUATION_METRICS, is_of_requests
from consyn_jax.flags import flat, real
from consyn_jax.integers import natural
from consyn_jax.optimizer_config import OPTIMIZERS, PARAMETER_GROUPS
from consyn_jax.prepare_config import CorpusOptions, PrepareConfig

_DAY_S = 86_400
_ABOVE_0 = (
    *("max_tokens", "epochs", "max_steps", "total_tokens", "batch_size"),
    *("gradient_accumulation_steps", "lr", "eps", "num_cycles", "power", "max_nonfinite_steps"),
    *("dpo_beta", "base_hidden_dim", "base_num_layers", "base_head_dim"),
    *("eval_steps", "save_steps", "save_minutes", "keep_last", "keep_every", "logging_steps"),
)
_NOT_NEGATIVE = (
    *("weight_decay", "max_grad_norm", "warmup_steps", "plateau_patience", "plateau_cooldown"),
    *("z_loss", "seed", "early_stopping_min_delta", "early_stopping_min_steps"),
)
_FROM_0_BELOW_1 = (
    *("beta1", "beta2", "momentum", "warmup_ratio", "min_lr_ratio", "plateau_threshold"),
    *("dropout", "label_smoothing", "lora_dropout"),
)
# Metrics that can select the best model with --objective dpo.
_OF_PAIRS = ("eval/loss", "eval/rewards/margins", "eval/rewards/accuracies")
# Schedules that stay at the peak rate, so that --decay_from can start from them.
_STABLE_SCHEDULERS = ("wsd", "constant_with_warmup", "constant")


def validate(config: RunConfig) -> None:
    """Check all values of a run and their combinations.

    Raises:
        UserError: an invalid value or combination; the message names the flags.
    """
    _check_ranges(flat(config))
    warmup_steps, max_steps = config.optimizer.warmup_steps, config.budget.max_steps
    if warmup_steps is not None and max_steps is not None and warmup_steps > max_steps:
        raise UserError(
            f"--warmup_steps {warmup_steps} is more than --max_steps {max_steps}. Lower "
            "--warmup_steps."
        )
    _check_optimizer(config)
    config.lora.check()
    if config.lora.is_used and config.hardware.mixed_precision == "fp8":
        raise UserError(
            "--mixed_precision fp8 is for training all weights, not for --lora_rank. Use auto."
        )
    if config.model.model in PRESETS:
        architecture(config.model, vocab_size=1)
    check_context(config.data.max_tokens, config.model.context)
    validate_corpus(config.data)
    _check_mixture(config)
    if config.data.on_long_rows is not None and config.data.packing == "cut":
        raise UserError(
            f"--on_long_rows {config.data.on_long_rows} has no effect with --packing cut, which "
            "cuts rows wherever a sequence ends. Leave one of the two flags out."
        )
    _check_streaming(config)
    _check_evaluation(config)
    parse_profile_steps(config.logging.profile_steps)
    backends = config.logging.logging_backend
    if "none" in backends and len(backends) > 1:
        raise UserError(
            f"--logging_backend {' '.join(backends)}: 'none' turns off all trackers. Leave out "
            "'none', or the other values."
        )
    check_processes(config.hardware)
    resume = config.saving.resume
    step = natural(resume)
    if step is None and resume not in ("auto", "never"):
        raise UserError(
            f"--resume must be auto, never or a step of at most 15 digits, not {resume!r}."
        )
    if config.saving.overwrite and step is not None:
        raise UserError(
            f"--overwrite would delete the checkpoint that --resume {step} starts from. Leave "
            "one of the two flags out."
        )


def validate_preparation(config: PrepareConfig) -> None:
    """Check all settings of a `consyn-prepare` command.

    Raises:
        UserError: an invalid value or combination; the message names the flags.
    """
    validate_corpus(config.data)
    engine = config.workers.engine
    for name in ("ray_address", "shared_directory"):
        value = getattr(config.workers, name)
        if engine != "ray" and value is not None:
            raise UserError(
                f"--{name} {value} needs --engine ray. Add --engine ray, or leave --{name} out."
            )
    if engine == "ray" and config.data.num_workers == 0:
        raise UserError(
            "--num_workers 0 leaves no tasks to --engine ray. Give the number of tasks at a time, "
            "or leave --num_workers out for one task per processor of the cluster."
        )
    held_out = 0.0 if config.data.validation else config.data.validation_fraction
    test = config.store.test_fraction
    if not 0 <= test < 1:
        raise UserError(f"--test_fraction must be at least 0 and below 1, not {test}.")
    if held_out + test >= 1:
        raise UserError(
            f"--validation_fraction {held_out} and --test_fraction {test} leave nothing to train "
            "on. Lower one of the two fractions."
        )


def validate_corpus(options: CorpusOptions) -> None:
    """Check the options that `consyn-train` and `consyn-prepare` share.

    Raises:
        UserError: an invalid value or combination; the message names the flags.
    """
    for name, least in (("min_chars", 1), ("max_chars", 1), ("num_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}.")
    if options.max_chars is not None and options.max_chars < options.min_chars:
        raise UserError(
            f"--max_chars {options.max_chars} is below --min_chars {options.min_chars}, so no "
            "document would be left. Raise --max_chars or lower --min_chars."
        )
    if not 0 <= options.validation_fraction < 1:
        raise UserError(
            f"--validation_fraction must be at least 0 and below 1, not "
            f"{options.validation_fraction}."
        )
    if options.near_duplicates is not None and not 0.5 <= options.near_duplicates <= 1:
        raise UserError(
            f"--near_duplicates must be a similarity from 0.5 to 1, not {options.near_duplicates}."
        )
    if options.document_separator == "":
        raise UserError(
            "--document_separator is empty. Give the text between documents, or leave the flag out."
        )
    kind, _, size = (options.tokenizer or "").partition(":")
    if kind == "train" and not 260 <= (natural(size) or 0) <= 1_000_000:
        raise UserError(
            f"--tokenizer train:SIZE must have a size from 260 to 1,000,000, not {size!r}."
        )


def _check_ranges(values: Mapping[str, Any]) -> None:
    """Check the flags in `values` whose allowed range does not depend on other flags."""
    given = {name: value for name, value in values.items() if value is not None}
    for name in _ABOVE_0:
        if name in given and given[name] <= 0:
            raise UserError(f"--{name} must be greater than 0, not {given[name]}.")
    for name in _NOT_NEGATIVE:
        if name in given and given[name] < 0:
            raise UserError(f"--{name} must not be negative, but is {given[name]}.")
    for name in _FROM_0_BELOW_1:
        if name in given and not 0 <= given[name] < 1:
            raise UserError(f"--{name} must be at least 0 and below 1, not {given[name]}.")
    if values["seed"] >= 2**32:
        raise UserError(f"--seed must be below 2**32, not {values['seed']}.")
    if not 0 < values["decay_ratio"] <= 1:
        raise UserError(
            f"--decay_ratio must be above 0 and at most 1, not {values['decay_ratio']}."
        )
    if not 0 < values["plateau_factor"] < 1:
        raise UserError(
            f"--plateau_factor must be above 0 and below 1, not {values['plateau_factor']}."
        )
    for name in ("early_stopping_patience", "decay_from"):
        if name in given and given[name] < 1:
            raise UserError(f"--{name} must be at least 1, not {given[name]}.")


def _check_optimizer(config: RunConfig) -> None:
    options = config.optimizer
    parse_multipliers(options.lr_multipliers)
    if options.momentum is not None and options.rule.momentum is None:
        have = [name for name, rule in OPTIMIZERS.items() if rule.momentum is not None]
        raise UserError(
            f"--momentum is for {', '.join(have)}; {options.optimizer} has --beta1 instead."
        )
    if options.base is not None and (config.lora.is_used or not options.rule.scale_free):
        suited = ", ".join(name for name, rule in OPTIMIZERS.items() if rule.scale_free)
        raise UserError(
            f"--parametrization mup needs --optimizer {suited} and cannot be combined with "
            "--lora_rank. Change one of these flags."
        )
    if options.decay_from is not None:
        _check_decay_from(config)
    if options.rule.averages_weights:
        if options.scheduler not in ("constant", "constant_with_warmup"):
            raise UserError(
                f"--optimizer {options.optimizer} averages its weights instead of lowering the "
                f"learning rate, so it cannot be used with --scheduler {options.scheduler}. Use "
                "constant_with_warmup or constant."
            )
        if options.beta1 == 0:
            raise UserError(
                f"--beta1 0 turns off the averaging of {options.optimizer}. Use --beta1 0.9."
            )


def _check_decay_from(config: RunConfig) -> None:
    options, resume = config.optimizer, config.saving.resume
    if options.scheduler not in _STABLE_SCHEDULERS:
        raise UserError(
            "--decay_from needs a schedule that stays at the peak learning rate, which --scheduler "
            f"{options.scheduler} does not. Use {', '.join(_STABLE_SCHEDULERS)}."
        )
    if options.decay_ratio == 1:
        raise UserError(
            "--decay_ratio 1 leaves no steps before the decay of --decay_from. Use a smaller ratio."
        )
    if natural(resume) is not None:
        raise UserError(
            f"--resume {resume} and --decay_from {options.decay_from} both name a checkpoint to "
            "start from. Leave one of the two flags out."
        )


def _check_evaluation(config: RunConfig) -> None:
    metric, data = config.evaluation.metric_for_best_model, config.data
    others = [name for name in EVALUATION_METRICS if name not in _OF_PAIRS[1:]]
    known = _OF_PAIRS if config.trains_on_pairs else others
    of_requests = bool(config.evaluation.eval_requests) and is_of_requests(metric)
    if metric not in known and not of_requests:
        raise UserError(
            f"--metric_for_best_model {metric} is not an evaluation metric of --objective "
            f"{config.regularisation.objective}{nearest(metric, known)} Known: {', '.join(known)}."
        )
    if data.validation or data.validation_fraction > 0:
        return
    if needs := what_needs_evaluations(config):
        raise UserError(
            f"{needs} needs evaluations, and --validation_fraction 0 leaves no data for them. "
            "Give --validation or a larger fraction."
        )


def what_needs_evaluations(config: RunConfig) -> str | None:
    """Return the first given flag that needs evaluations; None if no given flag needs them."""
    if config.evaluation.early_stopping_patience is not None:
        return "--early_stopping_patience"
    if config.evaluation.load_best_model_at_end:
        return "--load_best_model_at_end"
    if config.evaluation.eval_requests:
        return "--eval_requests"
    return "--scheduler plateau" if config.optimizer.scheduler == "plateau" else None


def _check_mixture(config: RunConfig) -> None:
    data = config.data
    if not data.data_weights:
        return
    if len(data.data_weights) != len(data.data):
        raise UserError(
            f"--data_weights has {len(data.data_weights)} values for {len(data.data)} items of "
            "--data. Give one value for each item."
        )
    if min(data.data_weights) <= 0:
        raise UserError(
            f"--data_weights must be greater than 0, not {min(data.data_weights)}. Remove data "
            "that should not be used from --data."
        )
    if (data.tokenizer or "").startswith("train:"):
        raise UserError(
            f"--tokenizer {data.tokenizer} cannot be trained on a mixture. Train the tokenizer "
            "with consyn-prepare, and give its path."
        )


def _check_streaming(config: RunConfig) -> None:
    data, budget = config.data, config.budget
    if not data.streaming:
        return
    if data.data_weights or data.packing == "whole":
        other = "--data_weights" if data.data_weights else "--packing whole"
        raise UserError(f"--streaming and {other} do not work together. Leave one of them out.")
    if (data.tokenizer or "").startswith("train:"):
        raise UserError(
            f"--tokenizer {data.tokenizer} reads all data before training, but --streaming does "
            "not. Leave one of the two flags out."
        )
    if budget.epochs is not None or (budget.max_steps is None and budget.total_tokens is None):
        raise UserError(
            "--streaming starts before the length of an epoch is known. Give --max_steps or "
            "--total_tokens, and no --epochs."
        )


def check_processes(hardware: HardwareOptions) -> None:
    """Check the flags of runs with several processes; raise UserError if one is wrong or unused."""
    if hardware.watchdog_minutes < 0:
        raise UserError(
            f"--watchdog_minutes must not be negative, but is {hardware.watchdog_minutes}. "
            "0 turns it off."
        )
    if not 1 <= hardware.rendezvous_seconds <= _DAY_S:
        raise UserError(
            f"--rendezvous_seconds must be from 1 to {_DAY_S} (a day), but is "
            f"{hardware.rendezvous_seconds}."
        )
    names = ("coordinator_address", "num_processes", "process_id")
    given = {f"--{name}": getattr(hardware, name) for name in names}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if not hardware.distributed:
        flag = next(flag for flag in given if flag not in missing)
        raise UserError(f"{flag} needs --distributed. Add --distributed, or leave {flag} out.")
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. Give all of "
            f"{', '.join(given)}, or none if Slurm, Open MPI or Kubernetes starts the processes."
        )
    address, total, number = given.values()
    host, _, port = address.rpartition(":")
    if not host or not 0 < (natural(port) or 0) < 65536:
        raise UserError(
            f"--coordinator_address must be HOST:PORT, as in node1:1234, not {address!r}."
        )
    if total < 1:
        raise UserError(f"--num_processes must be at least 1, not {total}.")
    if not 0 <= number < total:
        raise UserError(
            f"--process_id {number} is out of range for --num_processes {total}: processes are "
            "numbered from 0. Correct one of the two flags."
        )


def parse_multipliers(text: str | None) -> dict[str, float]:
    """Parse `--lr_multipliers` into a dictionary: a multiplier for each group that it names.

    Raises:
        UserError: an unknown or repeated group, or a value that is negative or not a number.

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
            raise UserError(f"--lr_multipliers names {group} twice. Leave one of them out.")
        try:
            found[group] = real(value)
        except ValueError:
            raise UserError(f"--lr_multipliers {group} must be a number, not {value!r}.") from None
        if found[group] < 0:
            raise UserError(
                f"--lr_multipliers {group} must not be negative, but is {value}. 0 freezes the "
                "group."
            )
    return found


def parse_profile_steps(text: str | None) -> tuple[int, int] | None:
    """Parse `--profile_steps` into the first and the last step.

    Raises:
        UserError: it is not A:B with 1 <= A <= B.

    >>> parse_profile_steps("10:12")
    (10, 12)
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text.strip(), re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(
            "--profile_steps must be the first and the last step to trace, such as 10:12, not "
            f"{text!r}."
        )
    return int(match[1]), int(match[2])


def check_context(max_tokens: int | None, context: int | None) -> None:
    """Check that training sequences fit the model's context, if both are known.

    Raises:
        UserError: the sequences are longer than the context.
    """
    if max_tokens is not None and context is not None and max_tokens > context:
        raise UserError(
            f"--max_tokens {max_tokens} is above the model's context of {context} tokens. Lower "
            "--max_tokens, or raise --context."
        )
