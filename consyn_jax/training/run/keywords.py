"""Convert the keywords of `ConsynTrainer` to the configuration of a run.

The model and the data determine some of the defaults.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from consyn_jax.config import PREFERENCE_TUNING, PRESETS, ModelOptions, RunConfig
from consyn_jax.errors import UserError
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import preset_architecture, resolve

DEFAULT_RATE = 5e-5  # for adamw


def given_once(own: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Merge the parameters and the `settings` of `ConsynTrainer`; the keys are names of flags.

    Parameters that are None count as not given.

    Raises:
        UserError: A setting is given under both names, or output_dir is not a path.
    """
    if not isinstance(own["output"], str | os.PathLike):
        kind = type(own["output"]).__name__
        raise UserError(f"output_dir must be the path of a directory, not of type {kind}.")
    own = {name: value for name, value in own.items() if value is not None}
    names = {"epochs": "num_epochs", "lr": "learning_rate", "output": "output_dir"}
    for name in own.keys() & settings.keys():
        if (name, own[name]) != ("output", "./output"):  # the default
            raise UserError(
                f"{names.get(name, name)} and {name} are the same setting. Give one of them."
            )
    return {**own, "output": os.fspath(own["output"]), **settings}


def refuse_settings(settings: dict[str, Any]) -> None:
    """Refuse settings given to `train`, which takes none.

    Raises:
        UserError: A setting is given. If its name is unknown, the message suggests a similar name.
    """
    if settings:
        resolve(settings, given_as="keyword")
        name = next(iter(settings))
        raise UserError(
            f"{name} is a setting of ConsynTrainer, not of train(). Pass it to ConsynTrainer."
        )


def resolve_keywords(
    config: ModelConfig, data: tuple[Any, Any], settings: dict[str, Any]
) -> tuple[RunConfig, dict[str, str]]:
    """Convert keywords of `ConsynTrainer` to a configuration and the origins of its values.

    Args:
        data: Training and evaluation data, as `recognise` returns them.
    """
    names = [f.name for f in fields(ModelOptions) if hasattr(config, f.name)]
    shape = {name: getattr(config, name) for name in names}
    same = (name for name in PRESETS if shape.items() <= vars(preset_architecture(name)).items())
    is_preference = settings.get("objective") == "dpo"
    rate = PREFERENCE_TUNING["lr"] if is_preference else DEFAULT_RATE
    defaults = shape | {"model": next(same, "haiku"), "lr": rate}
    training, _ = data
    defaults["max_tokens"] = getattr(getattr(training, "packed", training), "block_size", None)
    lengths = [part.natural_length for part in data if hasattr(part, "natural_length")]
    if defaults["max_tokens"] is None:
        defaults["max_tokens"] = min(config.context, max(lengths, default=config.context))
    if getattr(training, "batch_size", None) is not None:
        defaults["batch_size"] = training.batch_size
    resolved = resolve(settings, given_as="keyword", defaults=defaults)
    if training is None:
        raise UserError("ConsynTrainer has no data. Pass it as train_dataloader=.")
    return resolved
