"""Reading a config.json of Hugging Face, key by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

HfConfig = Mapping[str, Any]  # the content of a config.json
Fields = dict[str, Any]  # of `ModelConfig`


class Option(NamedTuple):
    """The key of config.json that holds a field of `ModelConfig`, and the function that reads it.

    `read` raises KeyError for a missing key, and TypeError or ValueError for a wrong value.
    """

    key: str
    read: Callable[[HfConfig], Any]


def required(key: str, kind: type) -> Option:
    """An option that config.json must have."""
    return Option(key, lambda hf: kind(hf[key]))


def optional(key: str, kind: type, default: Callable[[HfConfig], Any]) -> Option:
    """An option with a default if it is missing, null or zero."""
    return Option(key, lambda hf: kind(hf.get(key) or default(hf)))


def truth(hf: HfConfig, key: str) -> bool:
    """A key that is true or false; false if it is missing or null."""
    value = hf.get(key)
    if not isinstance(value, bool | None):
        raise TypeError(f"{key} is {value!r}")
    return bool(value)


class Unsupported(Exception):
    """A feature in config.json that this decoder lacks; the text completes "config.json has"."""
