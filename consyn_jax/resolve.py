"""Merge defaults, presets, a config file and flags into one checked configuration.

Priority: flags, then the `--config` file, then the preset of `--model`, then the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from consyn_jax.config import DPO_BETA, PRESETS, RunConfig, architecture
from consyn_jax.errors import UserError, nearest
from consyn_jax.flags import Config, convert, flags, grouped
from consyn_jax.foreign_flags import ELSEWHERE, advise
from consyn_jax.hub_download import is_elsewhere
from consyn_jax.integers import neighbours
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import (
    FINE_TUNING,
    LORA_PREFERENCE_TUNING,
    LORA_TUNING,
    OPTIMIZERS,
    OTHER_RECIPE,
    PREFERENCE_TUNING,
)
from consyn_jax.prepare_config import PrepareConfig
from consyn_jax.remote.urls import understood
from consyn_jax.validation import validate, validate_preparation

DEFAULT_EPOCHS = 3.0  # epochs of a run without a budget
_BUDGETS = ("epochs", "max_steps", "total_tokens")
# Values that depend on the model and on each other, and are filled in last.
_FITTED = ("head_dim", "num_kv_heads", "max_tokens")
# Flags whose values follow from other flags if the user does not give them.
FOLLOWERS = frozenset(
    {"checkpoint", "epochs", "row_format"}.union(
        *PRESETS.values(),
        *(FINE_TUNING, PREFERENCE_TUNING, LORA_TUNING, LORA_PREFERENCE_TUNING, OTHER_RECIPE),
        *(rule.factors for rule in OPTIMIZERS.values()),
        *(rule.defaults for rule in OPTIMIZERS.values()),
    )
)


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
        defaults: values that replace the flags' defaults; they do not count as given.

    Returns:
        The run, and the origin of every value by flag name ("default", "preset haiku",
        "file x.yaml", "flag").

    Raises:
        UserError: an unknown name or an invalid value.
    """
    of_file = f"file {file_name}"
    kept = _without_followers(file or {}, of_file, given)
    sources = ((defaults or {}, "default"), (kept, of_file), (given, given_as))
    values, origins = merge(RunConfig, sources)
    _name_model_once(values, origins)
    _fill(values, origins)
    _fit_model(values, origins)
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
        sources: pairs (values by flag name, name of their origin).

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


def _without_followers(
    file: Mapping[str, Any], origin: str, given: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Drop the values in a run's config.yaml that were derived from its other values.

    A run writes all values to config.yaml, including the defaults of its model and optimizer. These
    would override the defaults of another model that the user gives. Any other config file is
    returned unchanged.
    """
    if not file.keys() >= {"model", *FOLLOWERS}:
        return file
    chosen, start = _chosen(file, origin), {"model", "checkpoint"}
    names = {str(key).lstrip("-").replace("-", "_") for key in given}
    if names & start and file["checkpoint"] in (None, file["model"]):  # one flag names both
        return {name: value for name, value in chosen.items() if name not in start}
    return chosen


def _chosen(file: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Select the values in a run's config.yaml that were not derived from its other values."""
    written, _ = merge(RunConfig, ((file, origin),))
    needs_rate = OPTIMIZERS[written["optimizer"]].first_lr is not None
    first = {"checkpoint", *(("lr",) if needs_rate else ())}
    chosen = {n: value for n, value in file.items() if n not in FOLLOWERS or n in first}
    values, origins = merge(RunConfig, ((chosen, origin),))
    _fill(values, origins)

    def choose(names: Iterable[str]) -> None:
        for name in names:
            if written[name] not in (None, values[name]):
                chosen[name] = file[name]
                values[name], origins[name] = written[name], origin

    choose(n for n in file if n in FOLLOWERS and n not in first and n not in _FITTED)
    try:
        _fit_model(values, origins)
    except UserError:  # the width is not a multiple of the number of heads
        values["head_dim"] = None
    choose(n for n in file if n in _FITTED)
    return chosen


def _fill(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Fill in missing values from the recipe, the optimizer, the objective and the budget."""
    if values["objective"] == "dpo" and values["row_format"] == "auto":
        values["row_format"], origins["row_format"] = "preference", "objective"
    _fill_recipe(values, origins)
    _fit_optimizer(values, origins)
    if not values["streaming"] and all(values[name] is None for name in _BUDGETS):
        values["epochs"] = DEFAULT_EPOCHS


def _fill_recipe(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Fill in missing values from the recipes for the model, fine-tuning and LoRA.

    A later recipe overrides an earlier one.
    """
    recipe, origin = PRESETS.get(values["model"], OTHER_RECIPE), _recipe_origin(values["model"])
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


def _fit_model(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Adapt a preset's heads and sequence length to the user's width, heads or context."""
    if values["model"] not in PRESETS:
        return
    _fit_heads(values, origins)
    is_own = origins["max_tokens"] == _recipe_origin(values["model"])
    if is_own and 0 < values["context"] < values["max_tokens"]:
        values["max_tokens"], origins["max_tokens"] = values["context"], "context"


def _recipe_origin(model: str) -> str:
    return f"preset {model}" if model in PRESETS else "default"


def _fit_heads(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Adapt the preset's head_dim and num_kv_heads to the user's width or number of heads."""
    preset = {name for name, origin in origins.items() if origin.startswith("preset")}
    heads, width = values["num_heads"], values["hidden_dim"]
    if "head_dim" in preset and not {"hidden_dim", "num_heads"} <= preset:
        if min(heads, width) > 0 and width % heads:
            raise UserError(
                f"--hidden_dim {width}{_of_file(origins['hidden_dim'])} is not a multiple of "
                f"--num_heads {heads}{_of_file(origins['num_heads'])}. "
                f"Use {' or '.join(map(str, neighbours(width, heads)))}, or give --head_dim."
            )
        values["head_dim"], origins["head_dim"] = width // max(heads, 1), "hidden_dim / num_heads"
    if "num_kv_heads" in preset and "num_heads" not in preset and heads % values["num_kv_heads"]:
        values["num_kv_heads"], origins["num_kv_heads"] = heads, "num_heads"


def _of_file(origin: str) -> str:
    return f" ({origin})" if origin.startswith("file ") else ""


def _check_objective(config: RunConfig) -> None:
    """Check that the flags suit `--objective`.

    Raises:
        UserError: a flag has no effect with this objective, or cannot be used with it.
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
    terms["lora_dropout"] = config.lora.lora_dropout
    # DPO's loss is a difference of sequences' log-probabilities; rounding would distort it.
    terms["logits_dtype"] = config.hardware.logits_dtype
    for name, value in terms.items():
        if value not in (0, "float32"):
            raise UserError(
                f"--{name} {value} cannot be used with --objective dpo. Leave one of the two "
                "flags out."
            )
