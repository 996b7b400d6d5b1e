"""What a command is told becomes one checked run. Only the standard library is imported here.

Values come from four origins, weakest first: the default, the preset of `--model`, a `--config` file, a flag. `resolve` merges them
and remembers which one won.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from consyn_jax.config import (
    DEFAULT_EPOCHS,
    OTHER_MODELS,
    PRESETS,
    Config,
    Flag,
    ModelConfig,
    PrepareConfig,
    RunConfig,
    UserError,
    architecture,
    flags,
    nearest,
)
from consyn_jax.validation import real, validate, validate_corpus


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
        if origins["max_tokens"].startswith("preset") and 0 < values["context"] < values["max_tokens"]:
            values["max_tokens"], origins["max_tokens"] = values["context"], "context"
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


def preset_architecture(name: str, vocab_size: int = 49_152, **tokens: int | None) -> ModelConfig:
    """The `ModelConfig` of a preset.

    >>> preset_architecture("epic").num_kv_heads
    8
    """
    if name not in PRESETS:
        raise UserError(f"Model {name!r} is not a preset{nearest(name, PRESETS)} Known: {', '.join(PRESETS)}.")
    config, _ = resolve({"model": name})
    return architecture(config.model, None, vocab_size=vocab_size, **tokens)


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
            values[name], origins[name] = _convert(known[name], value, where), origin
    return values, origins


def _grouped(tree: type[Config], values: Mapping[str, Any]) -> Config:
    """The tree of options with `values` by flag name."""
    groups: dict[str, dict[str, Any]] = {}
    for name, f in flags(tree).items():
        groups.setdefault(f.group, {})[name] = values[name]
    options: dict[str, Any] = {f.name: type(f.default) for f in dataclasses.fields(tree)}
    return tree(**{name: group(**groups[name]) for name, group in options.items()})


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


def _nearest_multiples(n: int, of: int) -> str:
    below = n // of * of
    return f"{below} or {below + of}" if below else str(of)


def _convert(flag: Flag, value: Any, where: str) -> Any:
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
    number = real(str(value).replace("_", "") if not isinstance(value, bool) else value)  # 1e9 is how people write budgets
    if number != int(number):
        raise ValueError(value)
    return int(number)


def _truth(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _text(value: Any) -> str:
    if isinstance(value, dict | list) or value is None:
        raise ValueError(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_PARSERS: dict[type, Callable[[Any], Any]] = {int: _whole, float: real, bool: _truth, str: _text}


def _short(value: Any) -> str:
    """The value as a sentence can hold it; a file may have kilobytes where a number belongs."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
