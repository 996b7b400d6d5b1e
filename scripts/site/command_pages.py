"""A page for each command, made from the parser that reads its command line."""

from __future__ import annotations

import argparse
import importlib
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from consyn_jax.errors import UserError
from consyn_jax.flags import Flag, flags

ROOT = Path(__file__).parents[2]


def command_modules() -> dict[str, ModuleType]:
    """The module of each command, by the command's name, in the order of pyproject.toml."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "scripts"
    ]
    return {
        name: importlib.import_module(entry.partition(":")[0]) for name, entry in scripts.items()
    }


def parser_of(module: Any) -> argparse.ArgumentParser:
    """The parser that `read_arguments` of a command builds, with everything added to it."""
    made: list[Any] = []

    def build(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

    original = module.build_parser
    with patch.object(module, "build_parser", build):
        try:
            module.read_arguments([])
        except UserError:  # what is missing from an empty command line
            assert made
    return made[0]


def command_page(name: str, module: Any) -> str:
    """Markdown: what the command does, how it is called, examples, and every flag."""
    parser = parser_of(module)
    known = flags(parser.tree)  # type: ignore[attr-defined]
    usage = str(parser.usage).replace("%%", "%")
    lines = [
        f"# {name}",
        "",
        " ".join(str(parser.description).split()),
        "",
        *fence(usage),
        *fence(str(parser.epilog)),
        f"Every flag of `{name}`; this page is made from its parser. `_` and `-` in flags are the "
        "same.",
        "",
    ]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.option_strings]
        if actions:
            title = "Modes" if group.title == "options" else str(group.title)
            lines += [f"## {title}", "", "| flag | value | default | |", "|---|---|---|---|"]
            lines += [row(action, known.get(action.dest)) for action in actions]
            lines.append("")
    return "\n".join(lines)


def row(action: argparse.Action, flag: Flag | None) -> str:
    """A line of the table: names, value, default, help."""
    names = " ".join(f"`{name}`" for name in action.option_strings)
    if flag is None:  # a mode, --help, --version
        value = "" if action.nargs == 0 else f"`{action.metavar}`"
        return f"| {names} | {cell(value)} | | {cell((action.help or '').replace('%%', '%'))} |"
    value = "true or false" if flag.type is bool else f"`{action.metavar}`"
    if flag.choices and "|" in value:
        value = ", ".join(f"`{choice}`" for choice in flag.choices)
    elif "|" in value:
        value = ", ".join(f"`{choice}`" for choice in str(action.metavar).split("|"))
    if flag.many:
        value += " ..."
    text = flag.help
    if flag.choices and f"`{flag.choices[0]}`" not in value:
        text += f": {', '.join(flag.choices)}"
    return f"| {names} | {cell(value)} | {cell(default_of(flag))} | {cell(text)} |"


def default_of(flag: Flag) -> str:
    """The default as a person would type it; empty where there is none."""
    default = flag.default
    if flag.many:
        default = " ".join(default)
    elif isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, float):
        default = f"{default:g}"
    return "" if default in (None, "") else f"`{default}`"


def cell(text: str) -> str:
    """Text as a cell of a table can hold it; what is between backticks stays code."""
    parts = text.replace("|", "&#124;" if "`" not in text else "\\|").replace("\n", " ").split("`")
    return "`".join(
        part if i % 2 else re.sub(r"([*\[\]<])", r"\\\1", part) for i, part in enumerate(parts)
    )


def fence(text: str) -> list[str]:
    """Lines of a block of plain text."""
    return ["```text", *text.split("\n"), "```", ""]
