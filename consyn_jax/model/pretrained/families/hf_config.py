"""Readers for the keys of a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

HfConfig = Mapping[str, Any]  # the content of a config.json
Fields = dict[str, Any]  # of `ModelConfig`


class Option(NamedTuple):
    """A field of `ModelConfig` in config.json.

    Attributes:
        key: Key of config.json.
        read: Returns the field's value from the content of config.json. Raises KeyError for a
            missing key, and TypeError or ValueError for a wrong value.
    """

    key: str
    read: Callable[[HfConfig], Any]


def required(key: str, kind: type) -> Option:
    """A field whose key must be in config.json; `kind` converts the value."""
    return Option(key, lambda hf: kind(hf[key]))


def optional(key: str, kind: type, default: Callable[[HfConfig], Any]) -> Option:
    """A field that is `default` if its key is missing, null or zero; `kind` converts the value."""
    return Option(key, lambda hf: kind(hf.get(key) or default(hf)))


def truth(hf: HfConfig, key: str) -> bool:
    """Read a Boolean key of config.json; a missing or null key is false.

    Raises:
        TypeError: The value is not a Boolean.
    """
    value = hf.get(key)
    if not isinstance(value, bool | None):
        raise TypeError(f"{key} is {value!r}")
    return bool(value)


class Unsupported(Exception):
    """config.json has a feature that this decoder lacks.

    The message completes the sentence "config.json has ...".
    """
