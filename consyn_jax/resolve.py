"""Merge defaults, presets, a config file and flags into one checked configuration.

Priority: flags, then the `--config` file, then the preset of `--model`, then the defaults.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from consyn_jax.config import (
    DPO_BETA,
    FINE_TUNING,
    LORA_PREFERENCE_TUNING,
    LORA_TUNING,
    OTHER_RECIPE,
    PREFERENCE_TUNING,
    PRESETS,
    RunConfig,
    architecture,
)
from consyn_jax.errors import TOO_LONG, UserError, nearest
from consyn_jax.flags import Config, Flag, flags, grouped
from consyn_jax.foreign_flags import ELSEWHERE, advise
from consyn_jax.hub_download import is_elsewhere
from consyn_jax.integers import neighbours
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import OPTIMIZERS
from consyn_jax.prepare_config import PrepareConfig
from consyn_jax.remote.urls import understood
from consyn_jax.validation import real, validate, validate_preparation

DEFAULT_EPOCHS = 3.0  # of a run without a budget
LONGEST_WHOLE = 1000  # characters


def resolve(
    given: Mapping[str, Any],
    file: Mapping[str, Any] | None = None,
    *,
    file_name: str = "",
    given_as: str = "flag",
    defaults: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, dict[str, str]]:
    """Merge defaults, preset, file and flags into one checked run.

    Args:
        given: values by flag name, as strings or of the right type; they override all others.
        file: the content of a `--config` file, by flag name.
        given_as: how `origins` and messages name the source of `given`: "flag" or "keyword".
        defaults: values instead of the flags' own defaults; they do not count as given.

    Returns:
        The run, and the origin of every value by flag name ("default", "preset haiku",
        "file x.yaml", "flag").

    Raises:
        UserError: an unknown name or an invalid value.
    """
    of_file = f"file {file_name}"
    kept = _without_recipe(file or {}, of_file, given.get("model"))
    sources = ((defaults or {}, "default"), (kept, of_file), (given, given_as))
    values, origins = merge(RunConfig, sources)
    _name_model_once(values, origins)
    if values["objective"] == "dpo" and values["row_format"] == "auto":
        values["row_format"], origins["row_format"] = "preference", "objective"
    preset = PRESETS.get(values["model"])
    origin = "default" if preset is None else f"preset {values['model']}"
    _fill_recipe(values, origins, OTHER_RECIPE if preset is None else preset, origin)
    _fit_optimizer(values, origins)
    if preset is not None:
        _fit_heads(values, origins)
        if origins["max_tokens"] == origin and 0 < values["context"] < values["max_tokens"]:
            values["max_tokens"], origins["max_tokens"] = values["context"], "context"
    budgets = (values["epochs"], values["max_steps"], values["total_tokens"])
    if not values["streaming"] and budgets == (None, None, None):
        values["epochs"] = DEFAULT_EPOCHS
    config = grouped(RunConfig, values)
    validate(config)
    _check_objective(config)
    return config, origins


def resolve_preparation(
    given: Mapping[str, Any], file: Mapping[str, Any] | None = None, *, file_name: str = ""
) -> tuple[PrepareConfig, dict[str, str]]:
    """Merge defaults, file and flags of `consyn-prepare`, as `resolve` does for `consyn-train`.

    Raises:
        UserError: an unknown name or an invalid value.
    """
    values, origins = merge(PrepareConfig, ((file or {}, f"file {file_name}"), (given, "flag")))
    config = grouped(PrepareConfig, values)
    validate_preparation(config)
    return config, origins


def resolve_flags(tree: type[Config], given: Mapping[str, Any]) -> Config:
    """Merge the defaults and the flags of a command whose options are `tree`.

    Raises:
        UserError: an unknown name or an invalid value.
    """
    values, _ = merge(tree, ((given, "flag"),))
    return grouped(tree, values)


def preset_architecture(name: str, vocab_size: int = 49_152, **tokens: int | None) -> ModelConfig:
    """The architecture of the preset `name`.

    >>> preset_architecture("epic").num_kv_heads
    8
    """
    if name not in PRESETS:
        raise UserError(
            f"Model {name!r} is not a preset{nearest(name, PRESETS)} Known: {', '.join(PRESETS)}."
        )
    config, _ = resolve({"model": name})
    return architecture(config.model, None, vocab_size=vocab_size, **tokens)


def merge(
    tree: type[Any], sources: Iterable[tuple[Mapping[str, Any], str]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Override the defaults of `tree` by each of `sources` in turn; later sources win.

    Args:
        sources: pairs of values by flag name and the name of their origin.

    Returns:
        All values by flag name, and the origin of each.

    Raises:
        UserError: an unknown name or an invalid value.
    """
    known = flags(tree)
    by_alias = {alias: name for name, f in known.items() for alias in f.aliases}
    values = {name: f.default for name, f in known.items()}
    origins = dict.fromkeys(known, "default")
    for source, origin in sources:
        for key, value in source.items():
            name = str(key).lstrip("-").replace("-", "_")
            name = by_alias.get(name, name)
            where = {"flag": f"--{key}", "keyword": str(key)}.get(origin, f"{key} ({origin})")
            if name not in known or (origin == "keyword" and name in ELSEWHERE):
                style = origin if origin in ("flag", "keyword") else "file"
                hint = advise(name, value, known, style) or nearest(name, [*known, *by_alias])
                raise UserError(f"{where} is not a setting{' here' if name in known else ''}{hint}")
            values[name], origins[name] = convert(known[name], value, where), origin
    return values | understood(values), origins


def _without_recipe(file: Mapping[str, Any], origin: str, model: Any) -> Mapping[str, Any]:
    """Drop a config file's recipe values if the flag `--model` names another model than the file.

    A run's config.yaml and a study's recipe.yaml list all values, including the defaults of their
    model and optimizer. Applied to another model, these would override its own defaults.
    """
    own = str(file.get("model"))
    if model in (None, own) or own not in PRESETS or file.get("checkpoint") is not None:
        return file
    chosen = {name: value for name, value in file.items() if name not in PRESETS[own]}
    values, origins = merge(RunConfig, ((chosen, origin),))
    _fill_recipe(values, origins, PRESETS[own], "recipe")
    if OPTIMIZERS[values["optimizer"]].first_lr is None:
        _fit_optimizer(values, origins)
    written, _ = merge(RunConfig, ((file, origin),))
    return {
        name: value
        for name, value in file.items()
        if name not in PRESETS[own] or written[name] != values[name]
    }


def _fill_recipe(
    values: dict[str, Any], origins: dict[str, str], recipe: Mapping[str, Any], origin: str
) -> None:
    """Fill in missing values from the fine-tuning recipe or else the model's recipe."""
    named = {name: (value, origin) for name, value in recipe.items() if values[name] is None}
    if values["checkpoint"] is not None:
        is_preference = values["objective"] == "dpo"
        recipe_of = FINE_TUNING | (PREFERENCE_TUNING if is_preference else {})
        named |= {
            name: (value, "fine-tuning")
            for name, value in recipe_of.items()
            if origins[name] == "default"
        }
    if values["lora_rank"] is not None:
        of_lora = LORA_PREFERENCE_TUNING if values["objective"] == "dpo" else LORA_TUNING
        named |= {
            name: (value, "LoRA") for name, value in of_lora.items() if origins[name] == "default"
        }
    for name, (value, source) in named.items():
        values[name], origins[name] = value, source


def _name_model_once(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Fill in `--model` from `--checkpoint`, or `--checkpoint` from `--model`."""
    if values["checkpoint"] is not None and origins["model"] == "default":
        values["model"], origins["model"] = values["checkpoint"], "checkpoint"
    elif values["checkpoint"] is None and _has_weights(values["model"]):
        values["checkpoint"], origins["checkpoint"] = values["model"], "model"


def _has_weights(model: str) -> bool:
    """Whether `--model` names a model with weights, not only an architecture."""
    is_directory = os.path.isdir(model)  # noqa: PTH112 (Path's raises for a name that is too long)
    if model in PRESETS and not is_directory:
        return False
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth") if is_directory else ()
    return is_elsewhere(model) or any(next(Path(model).glob(kind), None) for kind in kinds)


def _fit_optimizer(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Adapt the recipe, which is for AdamW, to the optimizer; keep the user's values."""

    def is_given(name: str) -> bool:
        return origins[name].startswith(("flag", "keyword", "file "))

    name, rule = values["optimizer"], OPTIMIZERS[values["optimizer"]]
    if rule.first_lr is not None and not is_given("lr"):
        raise UserError(
            f"--optimizer {name} needs a much higher learning rate than the presets have for "
            f"adamw. Give --lr: start from {rule.first_lr:g}, and let --lr_find suggest a "
            "better one."
        )
    scaled = {key: float(f"{factor * values[key]:.6g}") for key, factor in rule.factors.items()}
    for key, value in {**scaled, **rule.defaults}.items():
        if not is_given(key):
            values[key], origins[key] = value, f"{origins[key]}, for {name}"


def _fit_heads(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Adapt the preset's head_dim and num_kv_heads to the user's width or number of heads."""
    preset = {name for name, origin in origins.items() if origin.startswith("preset")}
    heads, width = values["num_heads"], values["hidden_dim"]
    if "head_dim" in preset and not {"hidden_dim", "num_heads"} <= preset:
        if min(heads, width) > 0 and width % heads:
            raise UserError(
                f"--hidden_dim {width} is not a multiple of --num_heads {heads}. "
                f"Use {' or '.join(map(str, neighbours(width, heads)))}, or give --head_dim."
            )
        values["head_dim"], origins["head_dim"] = width // max(heads, 1), "hidden_dim / num_heads"
    if "num_kv_heads" in preset and "num_heads" not in preset and heads % values["num_kv_heads"]:
        values["num_kv_heads"], origins["num_kv_heads"] = heads, "num_heads"


def convert(flag: Flag, value: Any, where: str) -> Any:
    """Convert a string of the command line, or a value from YAML, to the flag's type.

    Raises:
        UserError: the value does not have this type; the message begins with `where`.
    """
    if flag.many:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if flag.type is float and all(isinstance(item, str) for item in items):
            items = [part for item in items for part in item.split(",")]  # as clear as with spaces
        return tuple(_scalar(flag, item, where) for item in items)
    if value is None and flag.optional:
        return None
    return _scalar(flag, value, where)


def _scalar(flag: Flag, value: Any, where: str) -> Any:
    if flag.const and str(value).lower() in ("true", "false"):  # as flags of other trainers
        value = str(value).lower() == "true"
    if isinstance(value, bool) and flag.choices:  # YAML reads no, yes, on and off as booleans
        words = (flag.const, "yes", "on") if value else ("no", "off", "none")
        value = next((word for word in words if word in flag.choices), value)
    parse, kind = _PARSERS[flag.type]
    try:
        converted = parse(value)
    except OverflowError:
        limit = "2**63" if flag.type is int else "1.8e308"
        raise UserError(f"{where} must be below {limit}, and {_short(value)} is not.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} must be {kind}, not {_short(value)}.") from None
    is_own = ":" in str(converted) and "module:Class" in flag.choices
    if flag.choices and converted not in flag.choices and not is_own:
        raise UserError(
            f"{where} {_short(converted)} is not known{nearest(converted, flag.choices)} "
            f"Known: {', '.join(flag.choices)}."
        )
    return converted


def _whole(value: Any) -> int:
    """Convert to a whole number; budgets may be written as 1e9.

    Raises:
        ValueError, TypeError: it is not a whole number.
        OverflowError: it is too large for NumPy and XLA.
    """
    if isinstance(value, bool):
        raise TypeError(value)
    number: float = 0
    if isinstance(value, int):
        number = value
    elif re.fullmatch(r"[+-]?[\d_]+", text := str(value).strip(), re.ASCII):
        if len(text) > LONGEST_WHOLE:  # Python converts at most 4,300 digits
            raise OverflowError(value)
        number = int(text)
    else:
        number = real(text.replace("_", ""))
    if number != int(number):
        raise ValueError(value)
    if abs(number) >= 2**63:
        raise OverflowError(value)
    return int(number)


def _number(value: Any) -> float:
    """Convert to a finite number.

    Raises:
        ValueError: it is not a number.
        OverflowError: it is too large.
    """
    if isinstance(value, str) and re.search(r"\d", value) and math.isinf(float(value)):
        raise OverflowError(value)
    return real(value)


def _truth(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _text(value: Any) -> str:
    if isinstance(value, dict | list) or value is None:
        raise ValueError(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_PARSERS: dict[type, tuple[Callable[[Any], Any], str]] = {
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    bool: (_truth, "true or false"),
    str: (_text, "text"),
}


def _short(value: Any) -> str:
    """A value as text, shortened for a message; a file may have kilobytes in place of a number."""
    try:
        text = repr(value)
    except ValueError:  # an integer that Python does not convert
        return TOO_LONG
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_objective(config: RunConfig) -> None:
    """Check that the flags suit `--objective`.

    Raises:
        UserError: a flag has no effect or no meaning with it.
    """
    options, data = config.regularisation, config.data
    if not config.trains_on_pairs:
        if options.dpo_beta != DPO_BETA:
            raise UserError(
                f"--dpo_beta {options.dpo_beta} has no effect without --objective dpo. Add "
                "--objective dpo, or leave --dpo_beta out."
            )
        if data.row_format == "preference":
            raise UserError(
                "--row_format preference is for pairs of answers, which --objective dpo trains "
                "on. Add --objective dpo, or leave --row_format out."
            )
        return
    if data.row_format != "preference":
        raise UserError(
            "--objective dpo needs rows with a chosen and a rejected answer, which "
            f"--row_format {data.row_format} does not read. Leave one of the two flags out."
        )
    if data.streaming:
        raise UserError(
            "--streaming and --objective dpo do not work together: the log-probabilities of all "
            "pairs are computed before step 1. Leave one of them out."
        )
    if config.optimizer.decay_from is not None:
        raise UserError(
            "--decay_from continues a pretraining run, and --objective dpo starts from a model. "
            "Leave one of them out."
        )
    if data.packing is not None:
        raise UserError(
            f"--packing {data.packing} packs single sequences, but --objective dpo trains on "
            "pairs. Leave one of the two flags out."
        )
    terms = {name: getattr(options, name) for name in ("dropout", "label_smoothing", "z_loss")}
    for name, value in (terms | {"lora_dropout": config.lora.lora_dropout}).items():
        if value:
            raise UserError(
                f"--{name} {value} cannot be used with --objective dpo. Leave one of the two "
                "flags out."
            )
