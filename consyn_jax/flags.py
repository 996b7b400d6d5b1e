"""Define command-line flags as fields of dataclasses.

A command's options form a tree of frozen dataclasses. The fields of its root are groups; the fields
of a group are made by `flag`. The parser, config files and help read the tree through `flags`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

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
    """A flag as the parser, config files and help use it.

    `optional`: the value may be None. `many`: the flag takes several values. `type`: the type of
    one value.
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
