"""Questions whose answer the model generates, and the rules that judge the generated text.

`exact_match` compares whole texts. The two rules for numbers, with their regular expressions, come
from lm_eval's `gsm8k` (0.4.13, lm_eval/tasks/gsm8k/gsm8k.yaml). `number_strict` is gsm8k's filter
strict-match, and `number_flexible` is its filter flexible-extract.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from consyn_jax.data.sources.row_formats.conversations import (
    messages_to_answer,
    no_tools,
    tools_of,
)
from consyn_jax.data.sources.row_formats.fields import BadRow, json_type, string

KEYS = ("prompt", "messages", "tools", "functions", "answer", "answers", "max_tokens", "stop")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")  # the first such number counts
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # the last such number counts
IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))  # in this order
NO_NUMBER = "[invalid]"


@dataclass(frozen=True)
class Question:
    """A question in a row.

    Attributes:
        place: Place of the row, for messages: "FILE:LINE".
        prompt: The text to continue; None for a conversation.
        messages, tools: The conversation.
        answers: The correct texts.
        max_tokens, stop: Values in the row, which override the flags.
    """

    place: str
    prompt: str | None
    messages: tuple[dict[str, Any], ...] | None
    tools: tuple[Any, ...] | None
    answers: tuple[str, ...]
    max_tokens: int | None = None
    stop: tuple[str, ...] | None = None


def is_question(row: dict[str, Any]) -> bool:
    """Whether a row asks for a generated text."""
    return "prompt" in row or "messages" in row


def question(row: dict[str, Any], place: str) -> Question:
    """Read the question of a row.

    Raises:
        BadRow: A key is missing, or a value is invalid.
    """
    if ("prompt" in row) == ("messages" in row):
        raise BadRow("has both prompt and messages; give only one of them.")
    if ("answer" in row) == ("answers" in row):
        what = "both answer and answers" if "answer" in row else "a prompt without an answer"
        raise BadRow(f"has {what}; give the right text under 'answer', or several in 'answers'.")
    given = [row["answer"]] if "answer" in row else row["answers"]
    if not isinstance(given, list) or not given:
        raise BadRow(f"holds {json_type(given)} under the key 'answers', not an array of strings.")
    answers = tuple(string(item, "as an answer", "a string") for item in given)
    stop = row.get("stop")
    if isinstance(stop, str):
        stop = [stop]
    if stop is not None and not isinstance(stop, list):
        raise BadRow(f"holds {json_type(stop)} under the key 'stop', not an array of strings.")
    if stop is not None and "" in stop:
        raise BadRow("has an empty text under the key 'stop'. Give a text that ends an answer.")
    most = row.get("max_tokens")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise BadRow("must have a whole number of at least 1 under the key 'max_tokens'.")
    prompt = messages = tools = None
    if "prompt" in row:
        prompt = string(row["prompt"], "as the prompt", "a string")
        no_tools(row)
    else:
        messages, tools = messages_to_answer(row["messages"], "messages"), tools_of(row)
    return Question(
        place,
        prompt,
        None if messages is None else tuple(messages),
        None if tools is None else tuple(tools),
        answers,
        most,
        None if stop is None else tuple(string(s, "in 'stop'", "a string") for s in stop),
    )


# ------------------------------------------------------------------------------------------- rules


def bare(text: str) -> str:
    """Normalise a text or number for comparison: drop commas, dollar signs and text up to ####.

    >>> bare("3 + 4 = 7 #### $1,234."), bare("72.")
    ('1234', '72')
    """
    for expression in IGNORED:
        text = expression.sub("", text)
    return text.lower()


def strict_number(text: str) -> str:
    """The first number after ####.

    >>> strict_number("2 + 3 = 5 #### 5"), strict_number("It is 5.")
    ('5', '[invalid]')
    """
    found = STRICT.findall(text)
    return found[0].strip() if found else NO_NUMBER


def flexible_number(text: str) -> str:
    """The last number of a text.

    >>> flexible_number("First 3, then $1,200 in all."), flexible_number("no")
    ('$1,200', '[invalid]')
    """
    found = FLEXIBLE.findall(text)
    return next(filter(None, found[-1])).strip() if found else NO_NUMBER


def has_number(asked: Question) -> bool:
    """Whether the correct answer is a number, or ends with #### and a number."""
    return any(re.fullmatch(r"-?[0-9.]*[0-9]", bare(answer).strip()) for answer in asked.answers)


TAKEN: dict[str, Callable[[str], str]] = {
    "exact_match": str.strip,
    "number_strict": strict_number,
    "number_flexible": flexible_number,
}


def taken(metric: str, text: str) -> str:
    """Extract the part of a generated text that a metric compares."""
    found = TAKEN[metric](text)
    return found if metric == "exact_match" else bare(found)


def is_right(metric: str, asked: Question, text: str) -> bool:
    """Whether a generated text is correct according to a metric."""
    if metric == "exact_match":
        return text.strip() in {answer.strip() for answer in asked.answers}
    return taken(metric, text) in {bare(answer).strip() for answer in asked.answers}
