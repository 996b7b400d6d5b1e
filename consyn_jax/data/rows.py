"""JSON rows to documents: which of a row's texts are read, and which of them are trained on.

A document is a row of segments. Each is tokenised for itself; its tokens are targets of the loss or not, and the end-of-text token may
follow it. What a row is, is told by its keys:

    {"text": ...}                           one text, all of it trained on
    {"messages": [{"role", "content"}]}     a chat, of which the assistant's messages are trained on
    {"prompt": ..., "completion": ...}      the completion is trained on

A chat is written with plain markers. With EOS for the tokenizer's end-of-text token, a question and its answer become

    <|user|>
    What is 2 + 2?EOS<|assistant|>
    4EOS

where "4" and the EOS behind it are trained on. A tokenizer's own chat template is a program, and is never run; markers that are plain
text need no tokens of their own, and work with any tokenizer. A content that itself holds a marker is not told apart from one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
FLAGS = "--text_key, --prompt_key, --completion_key or --messages_key"
SHOWN_KEYS = 8
SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class RowKeys:
    """Under which keys a row's texts are; `a.b` reaches into objects.

    Attributes:
        text: the whole document.
        prompt: what comes before the completion; several keys with commas between, whose texts are joined by a blank line.
            Where this or `completion` is given, every row must be of that kind; the other is "prompt" or "completion".
        completion: what is trained on behind the prompt.
        messages: a chat.
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    messages: str = "messages"


@dataclass(frozen=True)
class Segment:
    """A piece of a document.

    Attributes:
        text: tokenised for itself; may be empty.
        trained: its tokens are targets of the loss.
        ends: an end-of-text token follows it within the document, trained as the segment is. The one that ends a document is not meant.
    """

    text: str
    trained: bool = True
    ends: bool = False


class BadRow(Exception):
    """What is wrong with one row, in a sentence that wants a place in front of it: "has no key 'text'; ..."."""


def document(row: Any, keys: RowKeys) -> tuple[Segment, ...]:
    """The segments of a row.

    Args:
        row: a decoded row; a reader that could not decode it gives the `BadRow` that says why.

    Raises:
        BadRow: the row is of no known kind, is broken, or has nothing to train on.

    >>> document({"prompt": "2 + 2 =", "completion": " 4"}, RowKeys())
    (Segment(text='2 + 2 =', trained=False, ends=False), Segment(text=' 4', trained=True, ends=False))
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"holds {_json_type(row)}, not an object with the key {keys.text!r}.")
    if keys.prompt is not None or keys.completion is not None:
        return _completion(row, keys.prompt or "prompt", keys.completion or "completion")
    if _has(row, keys.text):
        return (Segment(_text(row, keys.text)),)
    if _has(row, keys.messages):
        return tuple(_chat(_value(row, keys.messages), keys.messages))
    if "prompt" in row and "completion" in row:
        return _completion(row, "prompt", "completion")
    raise _missing(row, keys.text)


def _completion(row: dict, prompt_keys: str, completion_key: str) -> tuple[Segment, ...]:
    names = [prompt_keys] if prompt_keys in row else [name.strip() for name in prompt_keys.split(",")]
    prompts = [_text(row, name) for name in names]
    completion = _text(row, completion_key)
    if not completion.strip():
        raise BadRow(f"holds no text under the key {completion_key!r}, so that there is nothing to train on.")
    return Segment("\n\n".join(filter(None, prompts)), trained=False), Segment(completion)


def _chat(messages: Any, key: str) -> Iterator[Segment]:
    if not isinstance(messages, list):
        raise BadRow(f"holds {_json_type(messages)} under the key {key!r}, not an array of messages.")
    answered = False
    for number, message in enumerate(messages, 1):
        where = f"in message {number} under {key!r}"
        role, content = _message(message, where)
        answered |= role == "assistant" and bool(content.strip())
        yield Segment(f"<|{role}|>\n", trained=False)
        yield Segment(content, trained=role == "assistant", ends=number < len(messages))
    if not answered:
        raise BadRow(f"holds no text of the role 'assistant' under the key {key!r}, so that there is nothing to train on.")


def _message(message: Any, where: str) -> tuple[str, str]:
    """Role and text of one message."""
    if not isinstance(message, dict):
        raise BadRow(f"holds {_json_type(message)} {where}, not an object with the keys 'role' and 'content'.")
    for name in ("role", "content"):
        if name not in message:
            raise BadRow(f"has no key {name!r} {where}; its keys are {_shown(message)}.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        found = _short(role) if isinstance(role, str) else _json_type(role)
        raise BadRow(f"holds the role {found} {where}; known are {', '.join(map(repr, ROLES))}.")
    if isinstance(content, list):
        return role, "".join(_part(part, where) for part in content)
    return role, _string(content, f"as content {where}", "a string or an array of text parts")


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else None
        found = f"a part of type {_short(kind)}" if isinstance(kind, str) else f"{_json_type(part)} without a type"
        raise BadRow(f'holds {found} {where}; only {{"type": "text", "text": ...}} can be read.')
    return _string(part.get("text"), f"as text of a part {where}", "a string")


def _text(row: dict, key: str) -> str:
    return _string(_value(row, key), f"under the key {key!r}", "a string")


def _string(value: Any, where: str, wanted: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"holds {_json_type(value)} {where}, not {wanted}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"holds half of a surrogate pair {where}, which is no text.") from None
    return value


def _has(row: dict, key: str) -> bool:
    try:
        _value(row, key)
    except BadRow:
        return False
    return True


def _value(row: dict, key: str) -> Any:
    """What a key, which may reach into objects, stands for."""
    value: Any = row
    for name in [key] if key in row else key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise _missing(row, key)
        value = value[name]
    return value


def _missing(row: dict, key: str) -> BadRow:
    return BadRow(f"has no key {key!r}; its keys are {_shown(row)} ({FLAGS} chooses).")


def _shown(row: dict) -> str:
    """The keys of a row, shortened where they are long or many."""
    names = sorted(map(_short, row))
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return (", ".join(names[:SHOWN_KEYS]) or "none") + more


def _short(name: Any) -> str:
    shown = repr(name)
    return shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + "..."


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    # Rows of Hugging Face datasets hold more than JSON has.
    return names.get(type(value), f"a value of type {type(value).__name__}")
