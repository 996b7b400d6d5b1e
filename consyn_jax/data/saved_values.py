"""Check the types of values that were read from JSON."""

from __future__ import annotations

import types
import typing
from typing import Any

LARGEST = 1 << 62  # no count or position reaches this


def check_types(value: Any) -> None:
    """Check that every field of a dataclass has its annotated type.

    Integers must be counts or positions: at least 0, and below `LARGEST`.

    Raises:
        TypeError: a field is not of its type; the message names it.
    """
    for name, hint in typing.get_type_hints(type(value)).items():
        if not fits(getattr(value, name), hint):
            raise TypeError(f"{name} is {getattr(value, name)!r:.50}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value and all values nested in it have the types of the annotation `hint`.

    >>> fits({"a": [1, 2]}, dict[str, list[int]]), fits({"a": [1, "2"]}, dict[str, list[int]])
    (True, False)
    >>> fits(-1, int), fits(True, int), fits(None, int | None), fits((0, 5), tuple[int, int])
    (False, False, True, True)
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind is types.UnionType:
        return any(fits(value, each) for each in inner)
    if kind is dict:
        return isinstance(value, dict) and all(
            fits(key, inner[0]) and fits(content, inner[1]) for key, content in value.items()
        )
    if kind is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if kind is tuple:
        same = isinstance(value, tuple) and len(value) == len(inner)
        return same and all(map(fits, value, inner))
    if hint is int:
        return type(value) is int and 0 <= value < LARGEST
    return isinstance(value, hint)
