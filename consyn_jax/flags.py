"""Define command-line flags as fields of dataclasses.

A command's options form a tree of frozen dataclasses. The fields of its root are groups; the fields
of a group are made by `flag`. The parser, config files and help read the tree through `flags`.

`convert` turns text from a command line, or a value from YAML, into a flag's type.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

from consyn_jax.errors import TOO_LONG, UserError, nearest

LONGEST_WHOLE = 1000  # characters

Config = TypeVar("Config")


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    const: str | None = None,
    math: bool = False,
) -> Any:
    """Make a dataclass field that is also a command-line flag.

    Args:
        choices: the allowed values; the entry `module:Class` stands for any class that the user
            names.
        const: the value if the user gives the flag without a value; "" if a value is required.
        math: True if the value changes the result of training. A resumed run must not change such
            a flag, and a test must show its effect.
    """
    metadata = {"help": help, "choices": choices, "aliases": aliases, "const": const, "math": math}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flag:
    """A command-line flag, for the parser, config files and help.

    Attributes:
        type: the type of one value.
        optional: whether the value may be None.
        many: whether the flag takes several values.
    """

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


def flags(tree: Any) -> Mapping[str, Flag]:
    """All flags of a command by name, in the order of its help.

    Args:
        tree: `RunConfig` or `PrepareConfig`.
    """
    return _flags(tree)  # mypy does not know that dataclass types are hashable, as `cache` requires


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
            kind = get_args(hint)[0] if many else hint
            found[f.name] = Flag(f.name, group.name, kind, optional, many, f.default, **f.metadata)
    return found


def flat(config: Any) -> dict[str, Any]:
    """All values of a tree by flag name."""
    known = flags(type(config))
    return {name: getattr(getattr(config, f.group), name) for name, f in known.items()}


def grouped(tree: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a tree from all of its values by flag name: the inverse of `flat`."""
    groups: dict[str, dict[str, Any]] = {}
    for name, f in flags(tree).items():
        groups.setdefault(f.group, {})[name] = values[name]
    fields: Any = dataclasses.fields(tree)  # type: ignore[arg-type]
    return tree(**{f.name: type(f.default)(**groups[f.name]) for f in fields})


def with_flags(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return `config` with other values, given by flag name."""
    assert changes.keys() <= flags(type(config)).keys()
    return grouped(type(config), {**flat(config), **changes})


def convert(flag: Flag, value: Any, where: str) -> Any:
    """Convert a string of the command line, or a value from YAML, to the flag's type.

    Raises:
        UserError: the value does not have this type; the message begins with `where`.
    """
    if flag.many:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if flag.type is float and all(isinstance(item, str) for item in items):
            items = [part for item in items for part in item.split(",")]  # commas may separate too
        return tuple(_scalar(flag, item, where) for item in items)
    if value is None and flag.optional:
        return None
    return _scalar(flag, value, where)


def _scalar(flag: Flag, value: Any, where: str) -> Any:
    if flag.const and str(value).lower() in ("true", "false"):  # a value from other trainers
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


def real(value: Any) -> float:
    """Convert a value to a finite number.

    Raises:
        ValueError: it is not a finite number; a boolean is not one either.
    """
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)
