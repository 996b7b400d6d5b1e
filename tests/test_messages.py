"""Every message for a user's mistake has at most two sentences."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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
