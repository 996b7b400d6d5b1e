"""Read values of a row by their keys, and describe faults of values."""

from __future__ import annotations

import json
import shlex
from typing import Any

from consyn_jax.data.sources.row_formats.suggestions import flags_for, is_dialogue
from consyn_jax.errors import listed, parse_fault

REMEDY = "Fix the row, or give --on_bad_rows skip."
FAULT = "\0"
"""First character of a string that replaces a faulty row. The fault's description follows."""
SHOWN_KEYS = 8
SHOWN_CHARACTERS = 40


class BadRow(Exception):
    """A fault of one row, such as "has no key 'text'; ...".

    The text continues a sentence that begins with the file and number of the row.

    Args:
        remedy: a sentence of advice; the default fits any malformed row.
    """

    def __init__(self, fault: str, remedy: str = REMEDY) -> None:
        super().__init__(fault)
        self.remedy = remedy


class MissingKey(BadRow):
    """A row lacks the key to read. The advice suggests flags that would read the row."""


def text_of(row: dict, key: str) -> str:
    """Read the text under a key.

    Raises:
        BadRow: there is no such key, or its value is not text.
    """
    value = value_of(row, key)
    if isinstance(value, list) and is_dialogue(value):
        remedy = f"Give --messages_key {shlex.quote(key)} instead."
        raise BadRow(f"holds messages under the key {key!r}, not a string.", remedy)
    return string(value, f"under the key {key!r}", "a string")


def string(value: Any, where: str, wanted: str) -> str:
    """Check that `value` is text that UTF-8 can encode, and return it.

    Raises:
        BadRow: the value is not text, or UTF-8 cannot encode it.
    """
    if not isinstance(value, str):
        raise BadRow(f"holds {json_type(value)} {where}, not {wanted}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"holds half of a surrogate pair {where}, which is not text.") from None
    return value


def has(row: dict, key: str) -> bool:
    """Whether a row has a key; `a.b` means key `b` of the object under `a`."""
    try:
        value_of(row, key)
    except BadRow:
        return False
    return True


def value_of(row: dict, key: str) -> Any:
    """Read the value of a key; `a.b` means key `b` of the object under `a`.

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
    """Return the value of a key; None if the key is missing or its value is an empty string."""
    value = row.get(key)
    return None if value == "" else value


def missing(row: dict, key: str) -> MissingKey:
    """Build the error about a missing key of a row."""
    return MissingKey(f"has no key {key!r}; its keys are {shown(row)}.", flags_for(row))


def parsed(value: Any, where: str) -> Any:
    """Decode `value` if it is a string of JSON, as in a column of a table.

    Raises:
        BadRow: the value is a string that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"holds a string {where} that is not JSON.") from None


def decoded(line: str) -> Any:
    """Decode a line of JSON.

    Raises:
        BadRow: the line is not JSON.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        if line.lstrip().startswith("{'"):
            raise BadRow(
                "is a row in Python's notation, not JSON.", "Write the rows with json.dumps."
            ) from None
        fault = f"is broken JSON ({error.msg}, column {error.colno})."
        if line.strip() in ("{", "["):  # a row that spans several lines
            raise BadRow(fault, "Write each row on one line.") from None
        raise BadRow(fault) from None
    except (RecursionError, ValueError) as error:  # ValueError: a number with too many digits
        raise BadRow(f"{parse_fault(error)}.") from None


def shown(row: dict) -> str:
    """List the keys of a row for a message, shortened if they are long or many."""
    return listed(sorted(map(short, row)), SHOWN_KEYS) or "none"


def short(name: Any) -> str:
    """Return the `repr` of a value, shortened to fit in a sentence."""
    text = repr(name)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def json_type(value: Any) -> str:
    """Name the JSON type of a value, with an article."""
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    # Rows of Hugging Face datasets may have values of types that do not exist in JSON.
    return names.get(type(value), f"a value of type {type(value).__name__}")
