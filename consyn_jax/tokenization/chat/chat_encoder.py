"""Encode conversations to ids and targets, with the same ids as transformers.

Special tokens are recognised where the template writes them. The same text inside a message is
encoded as ordinary text, as with `apply_chat_template(sanitize_control_tokens=True)`. Before
rendering, such text in messages is put between two marks from Unicode's private use area. After
rendering, the text between marks is encoded as ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tokenizers import Tokenizer

from consyn_jax.tokenization.bpe import BPETokenizer
from consyn_jax.tokenization.chat.known_templates import marked
from consyn_jax.tokenization.chat.sandbox import ChatTemplate, TemplateFault
from consyn_jax.tokenization.chat.turns import Chat, Spans, write

_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
_STRING_ARGUMENTS = re.compile(r"arguments\s+is\s+string")
_Token = tuple[int, tuple[int, int]]  # id, (start, end) in characters
_LAST_WORD = re.compile(r"\w+(?=\W*\Z)")
# Target value of the first token. It is only an input, because no BOS precedes a rendered template.
GIVEN = 2


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as a document.

    Attributes:
        text: the text rendered by the template.
        ids: token ids of the text, the same as in transformers.
        targets: 1 for tokens of turns that are trained on, otherwise 0. The first token has
            `GIVEN`, because it is only an input.
        unwritten: number of messages, tool calls and tools that the template omits.
    """

    text: str
    ids: list[int]
    targets: UInt8[np.ndarray, " tokens"]
    unwritten: int

    def first_turn(self) -> tuple[list[int], list[int]]:
        """Return the ids before the first turn that is trained on, and the ids of this turn."""
        learned = self.targets == 1
        start = int(learned.argmax())
        stop = start + int(np.append(~learned[start:], True).argmax())
        return self.ids[:start], self.ids[start:stop]


class ChatEncoder:
    """Renders conversations with a chat template and encodes them.

    Args:
        source: the Jinja template.
        tool_source: the template for conversations with tools; None for the same template.

    Raises:
        UserError: a template is not Jinja.
    """

    def __init__(
        self, tokenizer: BPETokenizer, source: str, tool_source: str | None = None
    ) -> None:
        self._json, content = tokenizer.to_json(), json.loads(tokenizer.to_json())
        special = [token["content"] for token in content["added_tokens"] if token["special"]]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marks = re.compile(f"{_OPEN}({self._special.pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]")
        variables = special_tokens(tokenizer)
        self._template = ChatTemplate(marked(source), variables)
        self._tool_template = self._template
        if tool_source is not None:
            self._tool_template = ChatTemplate(marked(tool_source), variables)

    def encode(self, chat: Chat) -> EncodedChat:
        """Encode a conversation to ids and targets.

        Raises:
            TemplateFault: the template refuses the conversation, or renders no text to train on.
        """
        template = self._template_of(chat)
        chat, holds_special = self._prepared(chat, template)
        written, spans = write(template, chat)
        encode = self._encode if holds_special else self._encode_whole
        text, ids, targets = encode(written, spans)
        if not (targets == 1).any():
            raise TemplateFault(
                "it renders no text of the assistant, so there is nothing to train on"
            )
        return EncodedChat(text, ids, targets, _unwritten(chat, written))

    def prompt(self, chat: Chat) -> tuple[str, list[int]]:
        """Render and encode a conversation, followed by the generation prompt: (text, ids).

        Raises:
            TemplateFault: the template refuses the conversation.
        """
        return self._all(chat, generation_prompt=True)[:2]

    def whole(self, chat: Chat) -> tuple[str, list[int], int]:
        """Render and encode a whole conversation: (text, ids, number of items that are omitted).

        Raises:
            TemplateFault: the template refuses the conversation.
        """
        return self._all(chat, generation_prompt=False)

    def _all(self, chat: Chat, generation_prompt: bool) -> tuple[str, list[int], int]:
        template = self._template_of(chat)
        chat, holds_special = self._prepared(chat, template)
        written = template.render(chat.messages, chat.tools, generation_prompt, chat.variables).text
        encode = self._encode if holds_special else self._encode_whole
        text, ids, _ = encode(written, [])
        return text, ids, _unwritten(chat, written)

    def _template_of(self, chat: Chat) -> ChatTemplate:
        return self._template if chat.tools is None else self._tool_template

    def _prepared(self, chat: Chat, template: ChatTemplate) -> tuple[Chat, bool]:
        """Prepare a conversation for rendering; also return whether it contains special tokens."""
        takes_strings = bool(_STRING_ARGUMENTS.search(template.source))
        chat = Chat(
            [_with_objects(message, takes_strings) for message in chat.messages],
            chat.learned,
            chat.tools,
            chat.variables,
        )
        if not self._holds_special(chat):
            return chat, False
        protected = Chat(
            self._protected(chat.messages),
            chat.learned,
            self._protected(chat.tools),
            self._protected(chat.variables),
        )
        return protected, True

    # ---------------------------------------------------------------------------- text to ids

    @cached_property
    def _full(self) -> Tokenizer:
        """The tokenizer that recognises special tokens in a text."""
        return self._loaded(special=True)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer that treats special tokens as ordinary text."""
        return self._loaded(special=False)

    def _loaded(self, special: bool) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self._json)
        tokenizer.encode_special_tokens = not special
        return tokenizer

    def _encode_whole(self, text: str, spans: Spans) -> tuple[str, list[int], np.ndarray]:
        encoding = self._full.encode(text, add_special_tokens=False)
        return text, encoding.ids, _targets(encoding.offsets, spans)

    def _encode(self, written: str, spans: Spans) -> tuple[str, list[int], np.ndarray]:
        """Encode a rendered text in which marks protect special tokens.

        The text between two marks is encoded as ordinary text.

        Returns:
            (text without marks, ids, targets).
        """
        texts: list[str] = []
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        marks: list[int] = []  # positions of marks in `written`
        size = 0
        for at, is_text, piece in _pieces(self._marks, written, marks):
            found = self._piece(piece, is_text) if at else _encoded(self._full, piece)
            ids += [index for index, _ in found]
            offsets += [(start + size, stop + size) for _, (start, stop) in found]
            texts.append(piece)
            size += len(piece)
        places = np.array(marks)

        def moved(at: int) -> int:
            return at - int(np.searchsorted(places, at))

        kept = [(moved(start), moved(stop)) for start, stop in spans]
        return "".join(texts), ids, _targets(offsets, kept)

    def _piece(self, piece: str, is_text: bool) -> list[_Token]:
        """Encode a piece as if it stood inside a text: without adding a space in front."""
        tokenizer = self._plain if is_text else self._full
        newline, found = _encoded(self._full, "\n"), _encoded(tokenizer, "\n" + piece)
        if [index for index, _ in found[: len(newline)]] == [index for index, _ in newline]:
            return [(i, (start - 1, stop - 1)) for i, (start, stop) in found[len(newline) :]]
        return _encoded(tokenizer, piece)

    # ------------------------------------------------------------------------- special tokens

    def _holds_special(self, chat: Chat) -> bool:
        texts = chain(_strings(chat.messages), _strings(chat.tools), _strings(chat.variables))
        return any(self._special.search(t) or _OPEN in t or _CLOSE in t for t in texts)

    def _protected(self, value: Any) -> Any:
        """Copy `value`, with marks around special tokens in all of its strings, except keys."""
        if isinstance(value, str):
            value = value.replace(_OPEN, "").replace(_CLOSE, "")
            return self._special.sub(f"{_OPEN}\\g<0>{_CLOSE}", value)
        if isinstance(value, dict):
            return {name: self._protected(item) for name, item in value.items()}
        return [self._protected(item) for item in value] if isinstance(value, list) else value


def special_tokens(tokenizer: BPETokenizer) -> dict[str, str]:
    """Return the template variables for special tokens: the text of each token, by role."""
    ids = {
        "bos_token": tokenizer.bos_token_id,
        "eos_token": tokenizer.eos_token_id,
        "pad_token": tokenizer.pad_token_id,
    }
    return {
        role: tokenizer.decode([index], skip_special_tokens=False)
        for role, index in ids.items()
        if index is not None
    }


def _encoded(tokenizer: Tokenizer, text: str) -> list[_Token]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return list(zip(encoding.ids, encoding.offsets, strict=True))


def _pieces(
    marks: re.Pattern[str], written: str, places: list[int]
) -> Sequence[tuple[int, bool, str]]:
    """Split a rendered text at its marks, and append the offsets of the marks to `places`.

    Returns:
        The pieces that are not empty: (index, whether it is ordinary text, text). The index also
        counts empty pieces.
    """
    found, start = list[tuple[int, bool, str]](), 0
    for match in marks.finditer(written):
        found.append((len(found), False, written[start : match.start()]))
        inner = match[1]
        places += [match.start()] if inner is None else [match.start(), match.end() - 1]
        if inner is not None:
            found.append((len(found), True, inner))
        start = match.end()
    found.append((len(found), False, written[start:]))
    return [piece for piece in found if piece[2]]


def _targets(offsets: Sequence[tuple[int, int]], spans: Spans) -> UInt8[np.ndarray, " tokens"]:
    """Compute the target of each token: 1 inside the character spans, else 0.

    Characters are matched to tokens as in transformers' `apply_chat_template`. The first token gets
    `GIVEN`, because it is only an input.
    """
    marks = np.zeros(len(offsets), np.uint8)
    stops = np.maximum.accumulate(np.array([stop for _, stop in offsets], np.int64))

    def token_at(char: int) -> int | None:
        at = int(np.searchsorted(stops, char, "right"))
        return at if at < len(offsets) and offsets[at][0] <= char else None

    for start, stop in spans:
        first, last = token_at(start), token_at(stop - 1)
        if first is None:  # transformers stops here too
            break
        marks[first : last + 1 if last else len(marks)] = 1
    if len(marks):
        marks[0] = GIVEN
    return marks


def _strings(value: Any) -> Sequence[str]:
    """Collect all strings nested in a value, except keys of objects."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, dict | list):
        return []
    inside = value.values() if isinstance(value, dict) else value
    return [text for item in inside for text in _strings(item)]


def _with_objects(message: Mapping[str, Any], takes_strings: bool) -> dict[str, Any]:
    """Copy a message, and convert the arguments of its tool calls from JSON strings to objects.

    OpenAI's API returns arguments as a JSON string, which most templates would encode as JSON
    again. Servers decode the string before rendering (vLLM's `parse_chat_messages`). With
    `takes_strings`, arguments are left as they are.
    """
    message = dict(message)
    calls = message.get("tool_calls")
    if takes_strings or not isinstance(calls, list):
        return message
    message["tool_calls"] = [_decoded(call) for call in calls]
    return message


def _decoded(call: Any) -> Any:
    """Decode the arguments of a tool call if they are a string that contains a JSON object."""
    if not isinstance(call, dict):
        return call
    function = call.get("function", call)
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    if not isinstance(value, dict):
        return call
    function = {**function, "arguments": value}
    return {**call, "function": function} if "function" in call else function


def _unwritten(chat: Chat, written: str) -> int:
    """Count the messages, tool calls and tools that are missing from the rendered text.

    A message counts as present if its last word is in the text.
    """
    count = 0
    for message in chat.messages:
        content = message.get("content")
        word = _LAST_WORD.search(content) if isinstance(content, str) else None
        count += bool(word and word[0] not in written)
        calls = message.get("tool_calls")
        count += sum(_name(call) not in written for call in calls or [] if _name(call))
    return count + sum(_name(tool) not in written for tool in chat.tools or [] if _name(tool))


def _name(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""
