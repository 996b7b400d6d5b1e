"""Read preference pairs in TRL's formats: a prompt with a chosen and a rejected answer.

{"prompt", "chosen", "rejected"}   texts, or arrays of messages
{"chosen", "rejected"}             the prompt is the common beginning of both
{"messages", "chosen", "rejected"} an array of messages, and one message for each answer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from consyn_jax.data.sources.row_formats.conversations import (
    messages_of,
    no_tools,
    parsed_messages,
    tools_of,
    variables_of,
)
from consyn_jax.data.sources.row_formats.fields import (
    BadRow,
    has,
    json_type,
    shown,
    string,
    text_of,
    value_of,
)

Messages = list[dict[str, Any]]
# Fields that contain the prompt in some datasets, but are read only if a flag names them.
LIKELY_PROMPTS = ("question", "instruction", "query", "input")
CONVERSATIONS = ("messages", "conversations")


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it: all three are texts, or all three are messages.

    Attributes:
        tools, variables: further values for the chat template.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def pair(row: dict, prompt_keys: str | None) -> Pair:
    """Read the pair of a row.

    Args:
        prompt_keys: value of `--prompt_key`. If None, the prompt is under the key "prompt", or it
            is the common beginning of both answers.

    Raises:
        BadRow: the row is not a pair, or is malformed.
    """
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise BadRow(
                f"has no key {key!r}; its keys are {shown(row)}. --objective dpo needs a chosen "
                "and a rejected answer in each row.",
                "Leave --objective dpo out for rows without pairs, or give --on_bad_rows skip.",
            )
    answers = [_answer(row[key], key) for key in ("chosen", "rejected")]
    prompt = _prompt(row, prompt_keys, answers)
    if isinstance(prompt, list) or any(isinstance(answer, list) for answer in answers):
        return Pair(*_of_messages(row, prompt, answers), tools_of(row), variables_of(row))
    no_tools(row)
    chosen, rejected = (string(a, "as an answer", "a string or messages") for a in answers)
    if prompt is not None:
        return Pair(prompt, chosen, rejected)
    size = shared(chosen, rejected)
    return Pair(chosen[:size], chosen[size:], rejected[size:])


def shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return the length of the common beginning of both answers, as TRL's `extract_prompt` does.

    >>> shared("It is blue", "It is green"), shared([1, 2], [1, 2])
    (5, 1)
    """
    shortest = min(len(chosen), len(rejected))
    for i in range(shortest):
        if chosen[i] != rejected[i]:
            return i - 1 if i and chosen[i - 1] == " " else i
    return max(shortest - 1, 0)


def _answer(value: Any, key: str) -> Any:
    """Read a text or an array of messages; an answer may also be a single message."""
    value = parsed_messages(value, key)
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, str | list):
        raise BadRow(f"holds {json_type(value)} under {key!r}, not a string or messages.")
    return value


def _prompt(row: dict, keys: str | None, answers: list[Any]) -> Any:
    """Read the prompt under its key; None if it is only at the beginning of the answers."""
    if keys is not None and not has(row, keys):
        return "\n\n".join(text_of(row, name.strip()) for name in keys.split(","))
    if keys is not None or row.get("prompt") is not None:
        key = keys or "prompt"
        return parsed_messages(value_of(row, key), key)
    if all(isinstance(answer, list) and len(answer) == 1 for answer in answers):
        before = next((name for name in CONVERSATIONS if row.get(name)), None)
        if before is not None:
            return parsed_messages(row[before], before)
    likely = next((name for name in LIKELY_PROMPTS if isinstance(row.get(name), str)), None)
    if likely is not None and row[likely]:
        raise BadRow(
            f"has no key 'prompt', but the prompt may be under {likely!r}.",
            f"Give --prompt_key {likely}, or leave that field out of the rows.",
        )
    return None


def _of_messages(row: dict, prompt: Any, answers: list[Any]) -> tuple[Messages, Messages, Messages]:
    chosen, rejected = (
        _spoken(answer, key) for answer, key in zip(answers, ("chosen", "rejected"), strict=True)
    )
    if isinstance(prompt, list):
        given = [message for message, _ in messages_of(prompt, "prompt")]
        if chosen[: len(given)] == rejected[: len(given)] == given:  # repeated in both answers
            chosen, rejected = chosen[len(given) :], rejected[len(given) :]
    else:
        size = shared(chosen, rejected)
        given, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
        if isinstance(prompt, str):
            given = _with_text(given, prompt)
        elif prompt is not None:
            raise BadRow(f"holds {json_type(prompt)} as prompt, not a string or messages.")
    if not given:
        raise BadRow(
            "holds no prompt, and 'chosen' and 'rejected' do not begin with the same messages."
        )
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == "assistant" for message in answer):
            raise BadRow(f"holds no message of the role 'assistant' after the prompt in {key!r}.")
    return given, chosen, rejected


def _spoken(answer: Any, key: str) -> Messages:
    """Convert an answer to messages; a text becomes an assistant message."""
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    found = messages_of(answer, key)
    if any(message["role"] == "assistant" and not trained for message, trained in found):
        raise BadRow(
            f"holds an assistant message of weight 0 under {key!r}, but pairs cannot have weights.",
            "Remove the weight or the message, or give --on_bad_rows skip.",
        )
    return [message for message, _ in found]


def _with_text(given: Messages, prompt: str) -> Messages:
    """Return the messages of a prompt: `given`, or one user message if `given` is empty.

    Args:
        given: the messages with which both answers begin.
        prompt: the text of the prompt.

    Raises:
        BadRow: no message in `given` has the text of the prompt.
    """
    if not given:
        return [{"role": "user", "content": string(prompt, "as prompt", "a string")}]
    if not any(str(m.get("content", "")).strip() == prompt.strip() for m in given):
        raise BadRow(
            "holds a prompt that is not among the messages that 'chosen' and 'rejected' share.",
            "Write the prompt as messages, and only the answers under 'chosen' and 'rejected'.",
        )
    return given
