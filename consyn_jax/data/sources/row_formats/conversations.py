"""Read conversations: OpenAI's `messages`, ShareGPT's `conversations`, TRL's message prompts.

All formats are converted to messages for chat templates: objects with a role, and with content,
tool calls or both. A key with the value null counts as missing, as in transformers. As in OpenAI's
format, an assistant message with `weight` 0 does not count in the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from consyn_jax.data.sources.row_formats.fields import (
    BadRow,
    has,
    json_type,
    optional,
    parsed,
    short,
    string,
    text_of,
    value_of,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
# Role names in ShareGPT files and in OpenAI's older format.
SYNONYMS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
NOTHING = "so there is nothing to train on."


@dataclass(frozen=True)
class Conversation:
    """A row as messages for a chat template.

    Attributes:
        messages: objects with role, content and the other keys of the row's messages.
        learned: for each message, whether it is trained on.
        tools: descriptions of functions, in the form that chat templates expect.
        variables: further values for the template (`chat_template_kwargs`).
    """

    messages: list[dict[str, Any]]
    learned: tuple[bool, ...]
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def openai(row: dict, key: str) -> Conversation:
    """Read the conversation under `messages`.

    Raises:
        BadRow: the row is malformed, or has no message to train on.
    """
    return _conversation(row, messages_of(value_of(row, key), key))


def sharegpt(row: dict, key: str) -> Conversation:
    """Read the conversation under `conversations`, whose messages have `from` and `value`.

    Raises:
        BadRow: the row is malformed, or has no message to train on.
    """
    found = messages_of(value_of(row, key), key)
    if optional(row, "system") is not None:
        if found and found[0][0]["role"] == "system":
            raise BadRow(
                f"holds a system prompt under 'system' and as the first message of {key!r}.",
                "Leave one of them out, or give --on_bad_rows skip.",
            )
        found.insert(0, ({"role": "system", "content": text_of(row, "system")}, False))
    return _conversation(row, found)


def prompt_and_completion(row: dict, prompt: str, completion: str) -> Conversation:
    """Read a prompt and its completion.

    The prompt is an array of messages. The completion is an array of messages, or the text of one
    assistant message.

    Raises:
        BadRow: the row is malformed, or has no message to train on.
    """
    given = [(message, False) for message, _ in messages_of(value_of(row, prompt), prompt)]
    answer = parsed_messages(value_of(row, completion), completion)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return _conversation(row, [*given, *messages_of(answer, completion)])


def parsed_messages(value: Any, key: str) -> Any:
    """Decode `value` if it is a string with a JSON array, as in a column of a table."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[]"):
        return parsed(value, f"under the key {key!r}")
    return value


def _conversation(row: dict, found: list[tuple[dict[str, Any], bool]]) -> Conversation:
    messages, learned = [m for m, _ in found], tuple(trained for _, trained in found)
    if not any(learned):
        silent = any(m["role"] == "assistant" for m in messages)
        held = "only messages of weight 0" if silent else "no message of the role 'assistant'"
        raise BadRow(f"holds {held}, {NOTHING}")
    return Conversation(messages, learned, tools_of(row), variables_of(row))


def variables_of(row: dict) -> dict[str, Any]:
    """Read further values for the chat template (`chat_template_kwargs`).

    Raises:
        BadRow: the value is not an object.
    """
    variables = optional(row, "chat_template_kwargs")
    if variables is None:
        return {}
    if not isinstance(variables, dict):
        raise BadRow(f"holds {json_type(variables)} under 'chat_template_kwargs', not an object.")
    return variables


def tools_of(row: dict) -> list[Any] | None:
    """Read the functions that a conversation may call, from `tools` or OpenAI's older `functions`.

    Raises:
        BadRow: the value is not an array.
    """
    older = optional(row, "tools") is None and optional(row, "functions") is not None
    name = "functions" if older else "tools"
    tools = parsed(optional(row, name), f"under the key {name!r}")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise BadRow(f"holds {json_type(tools)} under the key {name!r}, not an array.")
    return [{"type": "function", "function": tool} if older else tool for tool in tools] or None


def messages_of(messages: Any, key: str) -> list[tuple[dict[str, Any], bool]]:
    """Read an array of messages; return (message, whether it is trained on) for each.

    Raises:
        BadRow: the value is not an array of messages, or a message is malformed.
    """
    messages = parsed_messages(messages, key)
    if not isinstance(messages, list):
        raise BadRow(
            f"holds {json_type(messages)} under the key {key!r}, not an array of messages."
        )
    return [
        _message(message, f"in message {number} under {key!r}")
        for number, message in enumerate(messages, 1)
    ]


def messages_to_answer(messages: Any, key: str) -> list[dict[str, Any]]:
    """Read messages for the model to answer, and remove nulls. Each message must have a role.

    Roles that the chat template does not know are refused later, when it renders the messages.

    Raises:
        BadRow: the value is not an array of messages, a message is malformed, or the last message
            is the assistant's.
    """
    if not isinstance(messages, list) or not messages:
        found = "an empty array" if messages == [] else json_type(messages)
        raise BadRow(f"holds {found} under the key {key!r}, not an array of messages.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"has no role in message {number} under {key!r}.")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise BadRow(
                f"has neither text under 'content' nor tool calls in message {number} under "
                f"{key!r}."
            )
        _check_texts(message, f"in message {number} under {key!r}")
    if messages[-1]["role"] == "assistant":
        raise BadRow("ends with a message of the assistant, so there is nothing to answer.")
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def no_tools(row: dict) -> None:
    """Refuse tools in a row whose prompt is text, because only a chat template can render tools.

    Raises:
        BadRow: the row has tools.
    """
    if tools_of(row) is not None:
        raise BadRow("has tools, but its prompt is text; give the prompt as messages.")


def _message(given: Any, where: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(given, dict):
        raise BadRow(
            f"holds {json_type(given)} {where}, not an object with the keys 'role' and 'content'."
        )
    message = {name: value for name, value in given.items() if value is not None}
    if "from" in message and "role" not in message:
        message = {"role": message.pop("from"), **message}
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise BadRow(f"holds the weight {short(weight)} {where}; a weight must be 0 or 1.")
    _check_keys(given, message, where)
    if message["role"] == "function_call":
        message = _called(message["content"], where)
    message["role"] = _role(message["role"], where)
    if "function_call" in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_part(part, where) for part in message["content"])
    if "content" in message:
        string(message["content"], f"as content {where}", "a string or an array of text parts")
    _check_texts(message, where)
    return message, message["role"] == "assistant" and bool(weight)


def _check_keys(given: dict, message: dict, where: str) -> None:
    """Check that a message has a role, and content or tool calls."""
    if "role" not in message and not {"role", "from"} & given.keys():
        raise BadRow(f"has no key 'role' {where}; its keys are {_names(given)}.")
    role = message.get("role")
    calls = message.get("tool_calls") or message.get("function_call")
    told = {"content", "value"} & given.keys()
    if not told and not (role == "assistant" and calls):
        raise BadRow(f"has no key 'content' {where}; its keys are {_names(given)}.")
    message.setdefault("role", None)


def _names(row: dict) -> str:
    return ", ".join(sorted(map(short, row))[:8]) or "none"


def _role(role: Any, where: str) -> str:
    known = SYNONYMS.get(role, role) if isinstance(role, str) else None
    if known not in ROLES:
        found = short(role) if isinstance(role, str) else json_type(role)
        raise BadRow(f"holds the role {found} {where}; known roles: {', '.join(map(repr, ROLES))}.")
    return str(known)


def _called(content: Any, where: str) -> dict[str, Any]:
    """Convert a ShareGPT function_call, whose value is JSON, to a message with tool calls."""
    calls = parsed(content, f"as function call {where}")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"holds a function call that is not an object {where}.")
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else None
        found = (
            f"a part of type {short(kind)}"
            if isinstance(kind, str)
            else f"{json_type(part)} without a type"
        )
        raise BadRow(f'holds {found} {where}; only {{"type": "text", "text": ...}} can be read.')
    return string(part.get("text"), f"as text of a part {where}", "a string")


def _check_texts(value: Any, where: str) -> None:
    """Check that all strings in a message can be encoded, also those in tool calls."""
    if isinstance(value, str):
        string(value, where, "a string")
        return
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = (*value, *value.values())
    elif isinstance(value, list):
        inside = value
    for item in inside:
        _check_texts(item, where)


def is_conversation(row: dict, key: str) -> bool:
    """Whether the value at `key` is a list, or a string that begins like a JSON array."""
    if not has(row, key):
        return False
    value = value_of(row, key)
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip()[:2] == "[{")
