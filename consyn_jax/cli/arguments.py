"""argv to values by flag name: parsers are made from the fields of a tree of options, so help, defaults and types have one source."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from consyn_jax import __version__
from consyn_jax.config import Config, Flag, PrepareConfig, RunConfig, UserError, flags, nearest

_NO_FLAG = re.compile(r"-(\d|\.\d|inf|nan)|--[^a-z]", re.IGNORECASE)  # a number, or a line of dashes that separates documents
METAVARS = {
    "model": "NAME|DIR|FILE",
    "checkpoint": "DIR",
    "replay": "DIR",
    "data": "PATH",
    "validation": "PATH",
    "text_key": "KEY",
    "prompt_key": "KEY",
    "completion_key": "KEY",
    "messages_key": "KEY",
    "document_separator": "TEXT",
    "near_duplicates": "SIMILARITY",
    "data_weights": "W",
    "tokenizer": "default|bytes|train:SIZE|PATH",
    "optimizer": "NAME",
    "lr_multipliers": "GROUP=X,...",
    "scheduler": "NAME",
    "mesh": "auto|AXIS=N,...",
    "topology": "GPU:HOSTSxGPUS",
    "fit": "FILE",
    "output": "DIR",
    "resume": "auto|never|STEP",
    "profile_steps": "A:B",
    "wandb_project": "NAME",
    "wandb_run_name": "NAME",
}


class _Parser(argparse.ArgumentParser):
    """Mistakes are `UserError`s of one sentence, not a usage page."""

    def error(self, message: str) -> NoReturn:
        wants = re.match(r"argument ([^:]*): expected (.*)", message)
        strays = re.match(r"unrecognized arguments: (.*)", message)
        if wants:
            name = wants[1].split("/")[0]
            count = "at least one value" if "at least one" in wants[2] else "a value"
            message = f"{name} wants {count}; one that begins with a dash is written {name}=VALUE"
        elif strays and strays[1].startswith("-") and strays[1].strip("- "):
            word = strays[1].split()[0]
            raise UserError(f"There is no flag {word}{nearest(word, self._option_string_actions)} See {self.prog} --help.")
        elif strays:
            message = f"{strays[1]!r} belongs to no flag; files to read go behind --data"
        raise UserError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def build_parser(prog: str, description: str, usage: str, epilog: str, tree: type[RunConfig] | type[PrepareConfig] = RunConfig) -> argparse.ArgumentParser:
    """A parser of the flags of `tree`, whose namespace holds only what was given on the command line, as strings."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {usage}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="print the version and stop")
    groups: dict[str, Any] = {}
    for flag in flags(tree).values():
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        names = [f"--{name}" for name in (flag.name, *flag.aliases)]
        groups[flag.group].add_argument(*names, dest=flag.name, help=_help(flag), **_arity(flag))
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """A column of its own for the flags, and examples that keep their lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--lr, --learning_rate X` instead of the value behind every name."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


MODES = {"print_config": "print every value with its origin, and stop"}


def read(
    parser: argparse.ArgumentParser, argv: Sequence[str], resolve: Callable[..., tuple[Config, dict[str, str]]], modes: Mapping[str, str] = MODES
) -> tuple[Config, dict[str, str], str]:
    """What a command is told, the origins of the values, and what it shall do with that instead of its work: one of `modes`, or "".

    Args:
        resolve: merges flags and the content of a `--config` file, as `resolve.resolve` does.
        modes: the help of flags without a value, each of which asks for something else than the command's work.

    Raises:
        UserError: an unknown flag, a bad value, two modes, or a `--config` file that is none.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file with the flags' names; flags override it")
    for name, text in modes.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    given = parse(parser, argv)
    file_name, asked = given.pop("config", None), [name for name in modes if given.pop(name, False)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two different things to do. Leave one of them out.")
    file: dict[str, Any] = {}
    if file_name is not None:
        from consyn_jax.training.config_file import read_config_file

        file = read_config_file(Path(file_name))
    config, origins = resolve(given, file, file_name=file_name or "")
    return config, origins, "".join(asked)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What was given, by flag name; flags may be written with `_` or `-`, and of one that is given twice the last counts.

    Raises:
        UserError: an unknown flag (with the nearest known one), or a flag without its value.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    words: list[str] = []
    for word in argv:
        if _NO_FLAG.match(word) and words and words[-1] in known:  # argparse takes -1e-3 for a flag
            words[-1] += f"={word}"
            continue
        if word.startswith("--") and word != "--":
            name, equals, value = word.partition("=")
            name = "--" + name[2:].replace("-", "_")
            if name not in known:
                raise UserError(f"There is no flag {word.partition('=')[0]}{nearest(name, known)} See {parser.prog} --help.")
            word = name + equals + value
        words.append(word)
    return vars(parser.parse_args(words))


def _arity(flag: Flag) -> dict[str, Any]:
    if flag.many:
        return {"nargs": "+", "metavar": METAVARS[flag.name]}
    if flag.type is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    metavar = METAVARS.get(flag.name) or ("|".join(flag.choices) if flag.choices else {int: "N", float: "X", str: "TEXT"}[flag.type])
    return {"metavar": metavar} | ({"nargs": "?", "const": flag.const} if flag.const else {})


def _help(flag: Flag) -> str:
    text = flag.help.replace("%", "%%")
    if flag.choices and flag.name in METAVARS:  # too many for the column of flags
        text += f": {', '.join(flag.choices)}"
    default = " ".join(flag.default) if flag.many else f"{flag.default:g}" if isinstance(flag.default, float) else flag.default
    default = "true" if default is True else default
    return text if default in (None, "", False) else f"{text} ({default})"
