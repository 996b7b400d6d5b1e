"""Turn rows into documents: choose the format of a row, its texts, and the texts to train on.

`--row_format` or the keys of a row determine its format:

    messages            {"messages": [{"role", "content"}]}: trains on the assistant's messages
    sharegpt            {"conversations": [{"from", "value"}]}: trains on the assistant's messages
    alpaca              {"instruction", "input", "output"}: trains on the output
    prompt_completion   {"prompt", "completion"}, text or messages: trains on the completion
    text                {"text"}: trains on all of it

The formats are tried in this order, because rows of the first four formats often also have the
rendered text under `text`. A document is a sequence of text segments, or a conversation that a chat
template renders. With `--row_format preference`, which `--objective dpo` sets, every row is a pair
of answers ({"prompt", "chosen", "rejected"}).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from consyn_jax.data.sources.row_formats.conversations import (
    Conversation,
    is_conversation,
    openai,
    parsed_messages,
    prompt_and_completion,
    sharegpt,
)
from consyn_jax.data.sources.row_formats.fields import (
    FAULT,
    BadRow,
    has,
    json_type,
    text_of,
    value_of,
)
from consyn_jax.data.sources.row_formats.instructions import alpaca, completion
from consyn_jax.data.sources.row_formats.preference_rows import LIKELY_PROMPTS, Pair, pair
from consyn_jax.data.sources.row_formats.refused import check_preference, unknown
from consyn_jax.data.sources.row_formats.suggestions import PAIRS, PARTS_OF_PROMPTS
from consyn_jax.prepare_config import CorpusOptions

MESSAGES, SHAREGPT, ALPACA = "messages", "sharegpt", "alpaca"
PROMPT_COMPLETION, TEXT = "prompt_completion", "text"
PROMPT_MESSAGES = "prompt_completion of messages"
PREFERENCE, PREFERENCE_MESSAGES = "preference", "preference of messages"
CONVERSATIONS = (MESSAGES, SHAREGPT, PROMPT_MESSAGES, PREFERENCE_MESSAGES)


@dataclass(frozen=True)
class RowKeys:
    """The keys of a row's texts; `a.b` means key `b` of the object under `a`.

    Attributes:
        text: key of the whole document.
        prompt: key of the text before the completion. Several keys may be separated by commas;
            their texts are joined by a blank line.
        completion: key of the text after the prompt, which is trained on.
        messages: key of a conversation.
        format: the format of all rows, or "auto".
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    messages: str = "messages"
    format: str = "auto"

    @classmethod
    def of(cls, options: CorpusOptions) -> RowKeys:
        """Build the keys from the user's flags."""
        return cls(
            options.text_key,
            options.prompt_key,
            options.completion_key,
            options.messages_key,
            options.row_format,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """All keys that any format uses. Only these columns of a table are read."""
        prompts = (self.prompt or "prompt").split(",")
        own = (self.text, *map(str.strip, prompts), self.completion or "completion", self.messages)
        return (*own, *COLUMNS)


# Keys that formats use in addition to those named by flags.
COLUMNS = (
    *("conversations", "system", "tools", "functions", "chat_template_kwargs"),
    *("instruction", "input", "output", "history"),
    *("chosen", "rejected", "label", "completions", "labels", *LIKELY_PROMPTS),
    *(*PARTS_OF_PROMPTS, *(name for pair in PAIRS for name in pair)),  # for suggestions of flags
)


@dataclass(frozen=True)
class Segment:
    """A piece of a document.

    Attributes:
        text: text of the segment, tokenised separately; may be empty.
        trained: whether its tokens are targets of the loss.
    """

    text: str
    trained: bool = True


Content = tuple[Segment, ...] | Conversation | Pair


@dataclass(frozen=True)
class Row:
    """A row whose format was recognised.

    Attributes:
        format: a value of `--row_format`; for pairs of messages, "preference of messages".
        content: the document: text segments, a conversation, or a pair.
        unread: keys of the row that its format does not use.
    """

    format: str
    content: Content
    unread: tuple[str, ...] = ()


def read_row(row: Any, keys: RowKeys, absent: Sequence[str] = ()) -> Row:
    """Turn a row into a document.

    Args:
        row: a decoded row, or a `BadRow` with the reason why the row could not be decoded.
        absent: names of columns that were not read; messages about a missing key list them.

    Raises:
        BadRow: the row has an unknown format, is malformed, or has nothing to train on.

    >>> read_row({"prompt": "2 + 2 =", "completion": " 4"}, RowKeys())
    Row(format='prompt_completion', content=(Segment(text='2 + 2 =', trained=False),
    Segment(text=' 4', trained=True)), unread=())
    """
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, str) and row.startswith(FAULT):
        raise BadRow(row.removeprefix(FAULT))
    if not isinstance(row, dict):
        raise BadRow(f"holds {json_type(row)}, not an object with the key {keys.text!r}.")
    try:
        return _recognised(row, keys)
    except BadRow:
        if not absent:
            raise
    return _recognised({**row, **dict.fromkeys(absent)}, keys)


def _recognised(row: dict, keys: RowKeys) -> Row:
    found = keys.format if keys.format != "auto" else _format(row, keys)
    kind, content = _read(row, found, keys)
    used = _used(row, found, keys)
    used |= {name.split(".")[0] for name in used}
    return Row(kind, content, tuple(name for name in row if name not in used))


def _read(row: dict, found: str, keys: RowKeys) -> tuple[str, Content]:
    """Read a row; return the name of its format and its content."""
    if found == PREFERENCE:
        content = pair(row, keys.prompt)
        return found if isinstance(content.prompt, str) else PREFERENCE_MESSAGES, content
    if found == MESSAGES:
        return found, openai(row, keys.messages)
    if found == SHAREGPT:
        return found, sharegpt(row, _sharegpt_key(row, keys))
    if found == ALPACA:
        return found, _answered(*alpaca(row))
    if found == PROMPT_COMPLETION:
        prompt, answer = keys.prompt or "prompt", keys.completion or "completion"
        if has(row, prompt) and is_conversation(row, prompt):
            return PROMPT_MESSAGES, prompt_and_completion(row, prompt, answer)
        return found, _answered(*completion(row, prompt, answer))
    return TEXT, (Segment(text_of(row, keys.text)),)


def _used(row: dict, found: str, keys: RowKeys) -> set[str]:
    """Return the keys of a row that its format uses."""
    prompts = {keys.prompt or "prompt", *map(str.strip, (keys.prompt or "prompt").split(","))}
    chat = {"tools", "functions", "chat_template_kwargs"}
    return {
        TEXT: {keys.text},
        MESSAGES: {keys.messages, *chat},
        SHAREGPT: {_sharegpt_key(row, keys), "system", *chat},
        ALPACA: {"instruction", "input", "output", "history", "system"},
        PROMPT_COMPLETION: {*prompts, keys.completion or "completion", *chat},
        PREFERENCE: {*prompts, "chosen", "rejected", "messages", "conversations", *chat},
    }[found]


def _sharegpt_key(row: dict, keys: RowKeys) -> str:
    """Return the key of a ShareGPT conversation; some files use OpenAI's key `messages`."""
    if keys.messages != RowKeys.messages:
        return keys.messages
    return "messages" if "messages" in row and "conversations" not in row else "conversations"


def _answered(prompt: str, answer: str) -> tuple[Segment, ...]:
    return Segment(prompt, trained=False), Segment(answer)


def _format(row: dict, keys: RowKeys) -> str:
    """Choose the format of a row by the keys that flags name, or else by the keys of the row.

    Raises:
        BadRow: no format matches, or the matching format cannot be trained on.
    """
    if keys.prompt is not None or keys.completion is not None:
        return PROMPT_COMPLETION
    if keys.messages != "messages" and has(row, keys.messages):
        return _conversation_format(row, keys.messages)
    if keys.text != "text" and has(row, keys.text):
        return TEXT
    check_preference(row)
    # In a table, columns that only other rows use are null.
    filled = {name for name, value in row.items() if value is not None}
    if keys.messages in filled:
        return _conversation_format(row, keys.messages)
    if "conversations" in filled and is_conversation(row, "conversations"):
        return SHAREGPT
    if {"instruction", "output"} <= filled:
        return ALPACA
    if {"prompt", "completion"} <= filled:
        return PROMPT_COMPLETION
    if has(row, keys.text):
        return TEXT
    raise unknown(row, keys.text)


def _conversation_format(row: dict, key: str) -> str:
    messages = parsed_messages(value_of(row, key), key)
    first = messages[0] if isinstance(messages, list) and messages else None
    return SHAREGPT if isinstance(first, dict) and "from" in first else MESSAGES
