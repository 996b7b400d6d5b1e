"""Rows of `--requests`: a context with possible continuations, or a question with its answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consyn_jax.data.sources.byte_stream import ByteStream
from consyn_jax.data.sources.row_formats.fields import (
    BadRow,
    decoded,
    json_type,
    shown,
    string,
    text_of,
)
from consyn_jax.errors import UserError, listed
from consyn_jax.scoring import question_rows
from consyn_jax.scoring.question_rows import Question, is_question, question

ANSWERS = ("continuation", "continuations", "choices")
KEYS = ("context", "contexts", *ANSWERS, "gold", "task", *question_rows.KEYS)
REMEDY = "Fix the row; docs/evaluate.md has the format."
SHOWN_KEYS = 5  # unread keys that a note lists


@dataclass(frozen=True)
class Request:
    """A row with a context and given continuations.

    Attributes:
        place: Place of the row, for messages: "FILE:LINE".
        pairs: (context, continuation), in the order of the row.
        gold: Indices of the correct continuations, from 0; empty if the row does not ask for a
            choice.
    """

    place: str
    pairs: tuple[tuple[str, str], ...]
    gold: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """Requests whose results are reported together.

    Attributes:
        requests: Rows with given answers, which are judged by their likelihoods.
        unused: Keys that are not read, with the number of rows that have them.
        questions: Rows whose answers the model generates.
    """

    name: str
    requests: tuple[Request, ...]
    unused: dict[str, int] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.requests) + len(self.questions)

    @property
    def notes(self) -> list[str]:
        """A note about keys that are not read, with the number of rows that have them."""
        if not self.unused:
            return []
        keys = listed([f"{key} ({count:,})" for key, count in self.unused.items()], SHOWN_KEYS)
        return [f"unread keys, and the number of rows with each: {keys}"]


def read_tasks(files: tuple[str, ...], flag: str = "--requests") -> list[Task]:
    """Read files of requests, and group their rows into tasks.

    The key `task` of a row names its task. Without the key, the task has the name of the file.

    Args:
        flag: The flag that names the files, for messages.

    Raises:
        UserError: A file cannot be read or is empty, or a row is invalid; the message names the
            file or the row.
    """
    found: dict[str, list[Request | Question]] = {}
    unused: dict[str, Counter[str]] = {}
    for name in files:
        if files.count(name) > 1:
            raise UserError(f"{name} is given twice in {flag}. Give each file once.")
        before = sum(map(len, found.values()))
        for number, line in enumerate(_read(name, flag).split(b"\n"), 1):
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                row = _parsed(line)
                task = string(row.get("task", Path(name).name), "under the key 'task'", "a string")
                found.setdefault(task, []).append(_read_row(row, place))
            except BadRow as fault:
                raise UserError(f"{place} {fault} {REMEDY}") from None
            unused.setdefault(task, Counter()).update(row.keys() - set(KEYS))
        if sum(map(len, found.values())) == before:
            raise UserError(f"{name} in {flag} has no rows. Give a file of JSON Lines.")
    return [
        Task(
            task,
            tuple(row for row in rows if isinstance(row, Request)),
            dict(unused[task].most_common()),
            tuple(row for row in rows if isinstance(row, Question)),
        )
        for task, rows in found.items()
    ]


def _read(name: str, flag: str) -> bytes:
    if not Path(name).is_file():
        what = "is a directory" if Path(name).is_dir() else "does not exist"
        raise UserError(f"{name} in {flag} {what}. Give a file of JSON Lines.")
    parts = []
    with ByteStream(Path(name)) as stream:
        while data := stream.read(1 << 20):
            parts.append(data)
    return b"".join(parts)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = decoded(line.decode())
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8 (byte {error.start} of the row).") from None
    if not isinstance(row, dict):
        raise BadRow(f"holds {json_type(row)}, not an object.")
    return row


def _read_row(row: dict[str, Any], place: str) -> Request | Question:
    return question(row, place) if is_question(row) else _request(row, place)


def _request(row: dict[str, Any], place: str) -> Request:
    """Read the request of a row.

    Raises:
        BadRow: A key is missing, or a value is invalid.
    """
    given = [key for key in ANSWERS if key in row]
    if len(given) != 1:
        wrong = " and ".join(given) if given else f"none; its keys are {shown(row)}"
        raise BadRow(
            f"must have one of {', '.join(ANSWERS)}, or prompt and answer, but has {wrong}."
        )
    if ("context" in row) == ("contexts" in row):
        wrong = "both" if "context" in row else f"neither; its keys are {shown(row)}"
        raise BadRow(f"must have context or contexts, but has {wrong}.")
    (key,) = given
    answers = [text_of(row, key)] if key == "continuation" else _texts(row, key)
    if "contexts" in row:
        if key != "continuation":
            raise BadRow(f"has contexts and {key}; a row with contexts needs the key continuation.")
        contexts = _texts(row, "contexts")
        answers *= len(contexts)
    else:
        contexts = [text_of(row, "context")] * len(answers)
    if "" in answers:
        raise BadRow(f"has an empty text under the key {key!r}. It has no token to score.")
    pairs = tuple(zip(contexts, answers, strict=True))
    return Request(place, pairs, _gold(row, key, len(pairs)))


def _texts(row: dict[str, Any], key: str) -> list[str]:
    value = row[key]
    if not isinstance(value, list) or not value:
        what = "an empty array" if value == [] else json_type(value)
        raise BadRow(f"holds {what} under the key {key!r}, not an array of strings.")
    return [string(item, f"in the array under {key!r}", "a string") for item in value]


def _gold(row: dict[str, Any], key: str, count: int) -> tuple[int, ...]:
    if row.get("gold") is None:
        if key == "choices":
            raise BadRow(
                "has choices but no gold. Give the number of the correct choice, from 0, as gold."
            )
        return ()
    gold = row["gold"] if isinstance(row["gold"], list) else [row["gold"]]
    right = range(count)
    if not gold or any(isinstance(n, bool) or not isinstance(n, int) for n in gold):
        raise BadRow("must have one or several whole numbers of at least 0 under the key 'gold'.")
    wrong = next((n for n in gold if n not in right), None)
    if wrong is not None:
        raise BadRow(
            f"has gold {wrong}, but its {count} answers have the numbers 0 to {count - 1}."
        )
    if count == 1:
        raise BadRow("has gold but only one answer, so there is nothing to choose.")
    return tuple(gold)
