"""argv to values by flag name: the parser is made from the fields of `RunConfig`, so help, defaults and types have one source."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from consyn_jax import __version__
from consyn_jax.config import Flag, UserError, flags, nearest


class _Parser(argparse.ArgumentParser):
    """Mistakes are `UserError`s, not a usage page."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser whose namespace holds only what was given on the command line, as strings."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    groups: dict[str, Any] = {}
    for flag in flags().values():
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        names = [f"--{name}" for name in (flag.name, *flag.aliases)]
        groups[flag.group].add_argument(*names, dest=flag.name, help=_help(flag), **_arity(flag))
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What was given, by flag name; flags may be written with `_` or `-`.

    Raises:
        UserError: an unknown flag (with the nearest known one), or a flag without its value.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    words = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = "--" + name[2:].replace("-", "_")
            if name not in known:
                raise UserError(f"There is no flag {word.partition('=')[0]}{nearest(name, known)} See {parser.prog} --help.")
            word = name + equals + value
        words.append(word)
    return vars(parser.parse_args(words))


def _arity(flag: Flag) -> dict[str, Any]:
    if flag.many:
        return {"nargs": "+", "metavar": flag.name.upper()}
    if flag.type is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    metavar = "|".join(flag.choices) if flag.choices else {int: "N", float: "X", str: "TEXT"}[flag.type]
    return {"metavar": metavar} | ({"nargs": "?", "const": flag.const} if flag.const else {})


def _help(flag: Flag) -> str:
    text = flag.help.replace("%", "%%")
    default = " ".join(flag.default) if flag.many else flag.default
    return text if default in (None, "", False) else f"{text} ({default})"
