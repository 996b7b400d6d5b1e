"""Each promise of docs/survival.md links to an existing test."""

import ast
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "survival.md"


def names_of(file: Path) -> set[str]:
    """Names of the tests in a file, as Class::name for those of a class."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        parts = (
            [(f"{node.name}::", part) for part in node.body]
            if isinstance(node, ast.ClassDef)
            else [("", node)]
        )
        names |= {
            f"{before}{part.name}" for before, part in parts if isinstance(part, ast.FunctionDef)
        }
    return names


def test_every_promise_is_linked_to_tests_that_exist() -> None:
    promises = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| promise ")
    ]
    assert len(promises) > 30
    for promise in promises:
        links = re.findall(r"\[(test_\w+\.py)::([\w:]+)\]\((\.\./tests/[\w/.]+)\)", promise)
        assert links, promise
        for file, name, place in links:
            path = PAGE.parent / place
            assert path.name == file
            assert name in names_of(path), f"{place} has no {name}"
