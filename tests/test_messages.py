"""Every message for a user's mistake has at most two sentences."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from consyn_jax.errors import advised, leave_out_overwrite

PACKAGE = Path(__file__).parents[1] / "consyn_jax"
ERRORS = ("UserError", "Interrupted")
# Sentences that end inside a message: a full stop, a space, and a capital, quote or flag.
END = re.compile(r"[a-z0-9)}'`\]][.!?] (?=[A-Z`{])")


def messages() -> Iterator[tuple[str, str]]:
    """The place and the text of every message that is written where it is raised."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_error = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS
            if is_error and node.args and (text := text_of(node.args[0])):
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", text


def text_of(node: ast.expr) -> str:
    """The text of a literal, with {} for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            "{}" if isinstance(v, ast.FormattedValue) else text_of(v) for v in node.values
        )
    return ""


def test_no_message_is_longer_than_two_sentences() -> None:
    found = list(messages())
    assert len(found) > 200
    long = [f"{place}: {text}" for place, text in found if len(END.findall(text)) > 1]
    assert long == []


@pytest.mark.parametrize(
    ("advice", "shown"),
    [
        ("Free space, and run the same command again.", "again without --overwrite."),
        ("The same command continues from step 9.", "The same command without --overwrite cont"),
        ("With the same command, each continues.", "the same command without --overwrite, each"),
        ("Run the same command without --overwrite again.", "without --overwrite again."),
        ("Nothing is saved. The same command starts anew.", "The same command starts anew."),
        ("Run the same command again to start anew.", "the same command again to start anew."),
    ],
)
def test_advice_to_continue_does_not_delete_what_is_saved(advice: str, shown: str) -> None:
    assert advised(advice) == advice
    leave_out_overwrite()
    assert shown in advised(advice)
