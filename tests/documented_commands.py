"""Commands as README and docs have them, and what stands in for placeholders."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MODULES = {name: entry.partition(":")[0] for name, entry in SCRIPTS.items()}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
INDENTED = re.compile(r"(?:^    .*\n)+", re.M)
SPAN = re.compile(r"(?<!`)`(consyn-[^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Command:
    """A command of ours: its name, its arguments, and where it stands."""

    name: str
    arguments: tuple[str, ...]
    place: str

    @property
    def module(self) -> Any:
        return importlib.import_module(MODULES[self.name])


def commands(page: Path) -> Iterator[Command]:
    """All commands of a page, in its order: of code blocks that are no output (```text)."""
    text = page.read_text(encoding="utf-8")
    for number, line in code_lines(text):
        yield from commands_in(line, f"{page.relative_to(ROOT)}:{number}")


def span_commands(page: Path) -> Iterator[Command]:
    """All commands inside of sentences, which may leave out what they need to run."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        for match in SPAN.finditer(line):
            yield from commands_in(match[1], f"{page.relative_to(ROOT)}:{number}")


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines of code blocks with their numbers; continued lines are one."""
    blocks = [(m.start("text"), m["text"]) for m in FENCE.finditer(text) if m["language"] != "text"]
    outside = FENCE.sub(lambda m: re.sub(r"[^\n]", "", m[0]), text)
    blocks += [(0, m[0]) for m in INDENTED.finditer(outside) if "consyn-" in m[0]]
    for start, block in blocks:
        number = text.count("\n", 0, start) + 1
        for line in block.replace("\\\n", " ").splitlines():
            yield number, line
            number += 1


def commands_in(line: str, place: str) -> Iterator[Command]:
    """The commands of ours on a line for a shell; `!` in front of it is a notebook's."""
    if "consyn-" not in line:
        return
    lexer = shlex.shlex(line.strip().lstrip("!$ "), posix=True, punctuation_chars="|&>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = list(lexer)
    except ValueError:  # a sentence with an apostrophe
        return
    parts: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("|&>"):
            parts.append([])
        else:
            parts[-1].append(word)
    for part in parts:
        while part and re.fullmatch(r"[A-Z_]+=.*|nohup|nice|srun", part[0]):
            part.pop(0)
        if part and (name := part[0].removeprefix(".venv/bin/")) in MODULES:
            yield Command(name, tuple(part[1:]), place)


def filled_in(arguments: tuple[str, ...], numbers: Mapping[str, Any]) -> list[str]:
    """Arguments without placeholders.

    `...` stands for flags that are left out. A single capital, or STEP, after a flag that takes a
    number is one. A --config that the repository does not have is the reader's own, and is left out.

    Args:
        numbers: the flags of the command by name.
    """
    words: list[str] = []
    for word in arguments:
        flag = numbers.get(words[-1].lstrip("-").replace("-", "_")) if words else None
        if word in ("...", "[FLAG"):
            continue
        if flag is not None and flag.type in (int, float) and re.fullmatch(r"[A-Z]|STEP", word):
            word = "1"
        if words and words[-1] == "--config" and not (ROOT / word).is_file():
            words.pop()
            continue
        words.append(word)
    return words
