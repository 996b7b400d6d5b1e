"""Find the assistant's turns in a rendered conversation.

If a template has `generation` blocks, the blocks are the turns. Otherwise, a turn is the difference
between two renderings. One is the conversation up to and including the turn. The other is the
conversation before the turn, followed by the generation prompt. The difference is exactly the text
that the model generates as its answer.

Some templates render earlier turns differently from the last turn: Qwen3 and DeepSeek-R1 leave out
the reasoning of earlier turns. Then every turn is rendered as if it were the last turn, so that the
model is trained on exactly the text that it would generate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from consyn_jax.tokenization.chat.sandbox import ChatTemplate, Rendered, TemplateFault

Message = dict[str, Any]
Spans = list[tuple[int, int]]
# Placeholder for a message's text when only the text after it is needed.
STAND_IN = "a7c1f0e95b3d4826"
REWRITTEN = (
    "the ends of earlier turns cannot be found in the rendered text; enclose the assistant's text "
    "in generation blocks"
)


@dataclass(frozen=True)
class Chat:
    """A conversation to render.

    Attributes:
        messages: messages in the form that chat templates expect.
        learned: for each message, whether it is trained on.
        tools, variables: further values for the template.
    """

    messages: list[Message]
    learned: Sequence[bool]
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def write(template: ChatTemplate, chat: Chat) -> tuple[str, Spans]:
    """Render a conversation; return its text and the turns to train on, as character ranges.

    Raises:
        TemplateFault: the template refuses the conversation, or the turns cannot be found.
    """

    def render(messages: list[Message], generation_prompt: bool = False) -> Rendered:
        return template.render(messages, chat.tools, generation_prompt, chat.variables)

    if template.has_marks:
        return _marked(render, chat)
    return _by_difference(lambda *args: render(*args).text, chat)


def _marked(render: Callable[..., Rendered], chat: Chat) -> tuple[str, Spans]:
    text, blocks = render(chat.messages)
    speakers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if all(chat.learned[i] for i in speakers):
        return text, blocks
    if len(blocks) == len(speakers):
        return text, [b for b, i in zip(blocks, speakers, strict=True) if chat.learned[i]]
    spans: Spans = []
    seen = 0
    for i in speakers:  # a turn may have several blocks, or none
        upto = len(render(chat.messages[: i + 1]).blocks)
        spans += blocks[seen:upto] if chat.learned[i] else []
        seen = upto
    if seen != len(blocks):
        raise TemplateFault("its generation blocks do not correspond to the assistant's messages")
    return text, spans


def _by_difference(render: Callable[..., str], chat: Chat) -> tuple[str, Spans]:
    text, spans = render(chat.messages), []
    for i, learned in enumerate(chat.learned):
        if not learned:
            continue
        start, after = _turn(render, chat.messages, i)
        if not text.startswith(after):
            return _turn_by_turn(render, chat)
        spans.append((start, len(after)))
    return text, spans


def _turn(render: Callable[..., str], messages: list[Message], i: int) -> tuple[int, str]:
    """Render all messages up to and including turn `i`; return the turn's start and the text."""
    after = render(messages[: i + 1])
    if i:
        return _common_length(render(messages[:i], True), after), after
    # Templates cannot render an empty conversation.
    prompt = render(messages[:1], True).removeprefix(after)
    start = after.find(prompt) if prompt and prompt != render(messages[:1], True) else -1
    if start < 0:
        raise TemplateFault(
            "the beginning of the first message, which is the assistant's, cannot be found in "
            "the rendered text"
        )
    return start + len(prompt), after


def _turn_by_turn(render: Callable[..., str], chat: Chat) -> tuple[str, Spans]:
    """Render each turn as if it were the last one; join the turns and the text between them."""
    messages, text, spans = chat.messages, "", Spans()
    last: int | None = None
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, after = _turn(render, messages, i)
        text += after[:start] if last is None else _between(render, messages, last, i)
        if chat.learned[i]:
            spans.append((len(text), len(text) + len(after) - start))
        text += after[start:]
        last = i
    assert last is not None  # at least one turn is trained on
    if last + 1 < len(messages):
        text += _between(render, messages, last, len(messages))
    return text, spans


def _between(render: Callable[..., str], messages: list[Message], a: int, b: int) -> str:
    """Return the text between the end of turn `a` and the start of turn `b`.

    If `b` is the number of messages, return all text after turn `a`.
    """
    changed = [dict(message) for message in messages]
    changed[a]["content"] = STAND_IN
    end = _rest(render(changed[: a + 1]))
    if b < len(messages):
        start, after = _turn(render, changed, b)
        rest = _rest(after[:start])
    else:
        rest = _rest(render(changed))
    if not rest.startswith(end):
        raise TemplateFault(REWRITTEN)
    return rest.removeprefix(end)


def _rest(text: str) -> str:
    """Return the part of a rendered text that follows the placeholder `STAND_IN`."""
    _, found, rest = text.partition(STAND_IN)
    if not found or STAND_IN in rest:
        raise TemplateFault(REWRITTEN)
    return rest


def _common_length(a: str, b: str) -> int:
    """Return the length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
