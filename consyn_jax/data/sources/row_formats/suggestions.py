"""Suggest flags that would read a row in which the expected key is missing."""

from __future__ import annotations

import shlex
from typing import Any

LONGEST_SHOWN = 60  # characters of a key in a message
# Keys of a prompt and its answer that need flags to be recognised.
PAIRS = (
    *(("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer")),
    *(("instruction", "response"), ("instruction", "completion"), ("prompt", "response")),
    *(("prompt", "output"), ("prompt", "answer"), ("input", "output"), ("problem", "solution")),
    *(("source", "target"), ("inputs", "targets"), ("context", "response")),
)
# Fields that belong to a prompt in addition to its question or instruction.
PARTS_OF_PROMPTS = ("context", "passage", "input")
USUAL_TEXTS = ("content", "body", "document", "article", "story", "markdown", "code")
# Keys that `rows.py` recognises without flags.
KNOWN = (("instruction", "output"), ("prompt", "completion"), ("text",))
CHOOSE = (
    "Give a --row_format, --text_key, --prompt_key, --completion_key or --messages_key that fits "
    "the row."
)


def flags_for(row: dict) -> str:
    """Write a sentence with the flags that would read rows like this row.

    >>> flags_for({"question": "2 + 2?", "answer": "4"})
    'Give --prompt_key question --completion_key answer.'
    >>> flags_for({"data": {"text": "a"}})
    'Give --text_key data.text.'
    """
    found = _flags(row)
    if found:
        return f"Give {found}."
    if any(set(keys) <= row.keys() for keys in KNOWN) or _dialogue(row) is not None:
        return (
            "Leave out --row_format and the flags that name keys: such rows do not need these "
            "flags."
        )
    return _text_field(row) or CHOOSE


def is_dialogue(value: Any) -> bool:
    """Whether a value is an array of messages, or JSON text of an array of objects."""
    if isinstance(value, str):
        return value.lstrip()[:2] == "[{"
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool(first.keys() & {"role", "from"})


def _flags(row: dict, prefix: str = "") -> str:
    """Return flags that would read `row`, or ""; `prefix` is the path to `row` in an outer row."""
    dialogue = _dialogue(row)
    if dialogue is not None:
        usual = not prefix and dialogue in ("messages", "conversations")
        return "" if usual else f"--messages_key {shlex.quote(prefix + dialogue)}"
    if prefix and "text" in row:
        return f"--text_key {shlex.quote(prefix + 'text')}"
    pairs = (*PAIRS, ("prompt", "completion")) if prefix else PAIRS
    pair = next((pair for pair in pairs if set(pair) <= row.keys()), None)
    if pair:
        more = [
            name for name in PARTS_OF_PROMPTS if name not in pair and isinstance(row.get(name), str)
        ]
        names = [*more, pair[0]] if pair[0] in ("question", "query") else [pair[0], *more]
        prompt = shlex.quote(",".join(prefix + name for name in names))
        return f"--prompt_key {prompt} --completion_key {shlex.quote(prefix + pair[1])}"
    inner = (
        _flags(value, f"{name}.")
        for name, value in row.items()
        if isinstance(value, dict) and _is_shown(name) and not prefix
    )
    return next(filter(None, inner), "")


def _dialogue(row: dict) -> str | None:
    """Return the first key with a conversation under it; None if there is none."""
    return next((name for name in row if _is_shown(name) and is_dialogue(row[name])), None)


def _text_field(row: dict) -> str:
    """Write a sentence that suggests the most likely text field, or "".

    If the columns of a table were not read, all values of `row` are None.
    """
    usual = [name for name in USUAL_TEXTS if name in row]
    texts = {name: row[name] for name in row if _is_shown(name) and isinstance(row[name], str)}
    unread = [name for name in row if _is_shown(name) and row[name] is None]
    if not (texts or unread):
        return ""
    likely = max(texts, key=lambda name: len(texts[name])) if texts else (usual or unread)[0]
    name = f"Give the key of the text, as in --text_key {shlex.quote(likely)}"
    if len(texts) + len(unread) == 1:
        return f"{name}."
    return f"{name}, or give the keys of prompt and answer with --prompt_key and --completion_key."


def _is_shown(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= LONGEST_SHOWN
