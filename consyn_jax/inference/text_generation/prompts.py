"""Read and encode prompts: texts, lines of a file, or JSON rows with a prompt or messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from consyn_jax.data.sources.row_formats.conversations import (
    ROLES,
    messages_to_answer,
    no_tools,
    tools_of,
)
from consyn_jax.data.sources.row_formats.fields import BadRow, string
from consyn_jax.errors import UserError, listed, nearest, parse_fault, visible
from consyn_jax.model.generation.continuation import prompt_ids
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.chat.chat_encoder import ChatEncoder
from consyn_jax.tokenization.chat.plain_template import PLAIN
from consyn_jax.tokenization.chat.sandbox import TemplateFault
from consyn_jax.tokenization.chat.turns import Chat

REMEDY = "Fix the row; docs/generate.md has the format."
KEYS = {"prompt", "messages", "tools", "functions"}
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")


class GivenPrompt(NamedTuple):
    """A prompt as the user gave it.

    Attributes:
        where: Origin of the prompt, for messages: "--prompt 2", "questions.txt, line 7".
        text: The prompt; None for a conversation.
        messages, tools: The conversation; None for a text.
        unread: Keys of the row that are not read.
    """

    where: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    unread: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, its text as rendered by the chat template, and its token ids."""

    given: GivenPrompt
    text: str
    ids: list[int]


# ----------------------------------------------------------------------------------------- reading


def given_prompts(texts: Sequence[str], file: str | None) -> list[GivenPrompt]:
    """Read the prompts of `--prompt` and then `--file`.

    Raises:
        UserError: The file cannot be read or has no prompts, or a row is not a prompt.
    """
    several = len(texts) > 1
    found = [
        GivenPrompt(f"--prompt {number}" if several else "--prompt", text)
        for number, text in enumerate(texts, 1)
    ]
    if file is not None:
        found += _file_prompts(Path(file))
    return found


def unread_keys(prompts: Sequence[GivenPrompt]) -> list[str]:
    """A note about keys that are not read, with the number of rows that have them."""
    counts = Counter(key for prompt in prompts for key in sorted(prompt.unread))
    named = listed([f"{visible(key)} ({count:,})" for key, count in counts.most_common()], 5)
    return [f"unread keys, and the number of rows with each: {named}"] if counts else []


def _file_prompts(path: Path) -> list[GivenPrompt]:
    if path.suffix.lower() in TABLES:
        raise UserError(
            f"--file {path} is a table, not a file of prompts. Write one prompt per line in a "
            '.txt file, or rows {"prompt": "..."} in a .jsonl file.'
        )
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"--file {path} cannot be read: {error.strerror}. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--file {path} is not UTF-8 text (byte {error.start}). Convert it first."
        ) from error
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--file {path} has no prompts: it is empty. Put a prompt on each line.")
    if path.suffix.lower() in ROW_SUFFIXES:
        return [_row(f"{path}, line {number}", line) for number, line in lines]
    return [GivenPrompt(f"{path}, line {n}", line.removesuffix("\r")) for n, line in lines]


def _row(where: str, line: str) -> GivenPrompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} {parse_fault(error)}. Put one object on each line.") from error
    if isinstance(row, str):
        return GivenPrompt(where, row)
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object. Write it as {{"prompt": "..."}}.')
    try:
        return _row_prompt(where, row)._replace(unread=frozenset(row.keys() - KEYS))
    except BadRow as fault:
        raise UserError(f"{where} {fault} {REMEDY}") from None


def _row_prompt(where: str, row: dict[str, Any]) -> GivenPrompt:
    key = "messages" if row.get("messages") is not None else "prompt"
    value, other = row.get(key), row.get("prompt" if key == "messages" else "messages")
    if (value is None) == (other is None):
        what = "neither prompt nor messages" if value is None else "both prompt and messages"
        raise BadRow(f"has {what}; its keys: {listed(sorted(row)) or 'none'}.")
    if key == "messages" or isinstance(value, list):
        return GivenPrompt(where, None, messages_to_answer(value, key), tools_of(row))
    no_tools(row)
    return GivenPrompt(where, string(value, f"under the key {key!r}", "a string or messages"))


# ---------------------------------------------------------------------------------------- encoding


class PromptEncoder:
    """Encodes prompts and conversations for a model.

    Attributes:
        is_plain: Whether the model has no template, so that plain-text role markers are used.
    """

    def __init__(self, tokenizer: BPETokenizer, template: str | None) -> None:
        self._tokenizer, self.is_plain = tokenizer, template is None
        self._template = PLAIN if template is None else template

    def encode(self, given: GivenPrompt) -> EncodedPrompt:
        """Encode a prompt.

        Raises:
            UserError: The prompt cannot be encoded, or the template refuses it.
        """
        if given.messages is None:
            assert given.text is not None
            return EncodedPrompt(given, given.text, _located(given, self._text_ids))
        text, ids = _located(given, self._chat_ids)
        return EncodedPrompt(given, text, ids)

    @cached_property
    def _chats(self) -> ChatEncoder:
        is_own = self._template == self._tokenizer.chat_template
        for_tools = self._tokenizer.tool_template if is_own else None
        return ChatEncoder(self._tokenizer, self._template, for_tools)

    def _text_ids(self, given: GivenPrompt) -> list[int]:
        return prompt_ids(given.text or "", self._tokenizer)

    def _chat_ids(self, given: GivenPrompt) -> tuple[str, list[int]]:
        messages = given.messages or []
        for number, message in enumerate(messages, 1):
            self._check_role(message["role"], f"in message {number}")
        try:
            return self._chats.prompt(Chat(messages, [False] * len(messages), given.tools or None))
        except TemplateFault as error:
            raise UserError(f"the chat template refuses it: {error}.") from error

    def _check_role(self, role: str, where: str) -> None:
        """Refuse a role that is neither a standard role nor named in the chat template.

        Most templates render any role, but the model was not trained on unknown roles.
        """
        if role in ROLES or any(f"{quote}{role}{quote}" in self._template for quote in "'\""):
            return
        known = ", ".join(map(repr, ROLES))
        raise UserError(
            f"holds the role {visible(role)!r} {where}, which the chat template does not name"
            f"{nearest(role, ROLES)} Known: {known}."
        )


def _located(given: GivenPrompt, encode: Callable[[GivenPrompt], Any]) -> Any:
    try:
        return encode(given)
    except UserError as error:
        raise UserError(f"{given.where}: {error}") from error


def check_lengths(prompts: Sequence[EncodedPrompt], context: int) -> None:
    """Check that each prompt leaves room for a token in the model's context.

    Raises:
        UserError: A prompt fills the model's context.
    """
    for prompt in _too_long(prompts, context):
        raise UserError(
            f"{prompt.given.where} has {len(prompt.ids):,} tokens, and the model's context is "
            f"{context:,}. Shorten the prompt."
        )


def _too_long(prompts: Sequence[EncodedPrompt], context: int) -> Iterator[EncodedPrompt]:
    return (prompt for prompt in prompts if len(prompt.ids) >= context)
