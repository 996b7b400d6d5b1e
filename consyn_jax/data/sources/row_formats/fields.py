"""Values of a row by key, and the messages about faults in them."""

from __future__ import annotations

import json
from typing import Any

REMEDY = "Fix the row, or give --on_bad_rows skip."
FAULT = "\0"
"""Beginning of a row that a reader has replaced by the message about its fault."""
SHOWN_KEYS = 8
SHOWN_CHARACTERS = 40
CHOOSE = (
    "Give a --row_format, --text_key, --prompt_key, --completion_key or --messages_key that suits "
    "it, or --on_bad_rows skip."
)


class BadRow(Exception):
    """A fault of one row: "has no key 'text'; ...", to be preceded by the row's place.

    Args:
        remedy: a sentence that says what to do; the default is for a row that is just broken.
    """

    def __init__(self, fault: str, remedy: str = REMEDY) -> None:
        super().__init__(fault)
        self.remedy = remedy


def text_of(row: dict, key: str) -> str:
    """The text under a key.

    Raises:
        BadRow: there is no such key, or its value is not text.
    """
    return string(value_of(row, key), f"under the key {key!r}", "a string")


def string(value: Any, where: str, wanted: str) -> str:
    """`value` if it is text that can be encoded.

    Raises:
        BadRow: it is something else.
    """
    if not isinstance(value, str):
        raise BadRow(f"holds {json_type(value)} {where}, not {wanted}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"holds half of a surrogate pair {where}, which is not text.") from None
    return value


def has(row: dict, key: str) -> bool:
    """Whether a row has a key; `a.b` reaches into objects."""
    try:
        value_of(row, key)
    except BadRow:
        return False
    return True


def value_of(row: dict, key: str) -> Any:
    """The value of a key; `a.b` reaches into objects.

    Raises:
        BadRow: the row has no such key.
    """
    value: Any = row
    for name in [key] if key in row else key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise missing(row, key)
        value = value[name]
    return value


def optional(row: dict, key: str) -> Any:
    """The value of a key; None if there is none, or the empty string of an empty table cell."""
    value = row.get(key)
    return None if value == "" else value


def missing(row: dict, key: str) -> BadRow:
    """Describe the missing key of a row."""
    return BadRow(f"has no key {key!r}; its keys are {shown(row)}.", CHOOSE)


def parsed(value: Any, where: str) -> Any:
    """`value`, decoded if it is JSON in a string, as in a column of a table.

    Raises:
        BadRow: it is a string and not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"holds a string {where} that is not JSON.") from None


def shown(row: dict) -> str:
    """The keys of a row, shortened if they are long or many."""
    names = sorted(map(short, row))
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return (", ".join(names[:SHOWN_KEYS]) or "none") + more


def short(name: Any) -> str:
    """The `repr` of a value, shortened to fit in a sentence."""
    text = repr(name)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def json_type(value: Any) -> str:
    """The type of a value, with its article."""
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    # Rows of Hugging Face datasets hold more than JSON has.
    return names.get(type(value), f"a value of type {type(value).__name__}")
