"""Parse command lines with parsers made from the option dataclasses.

A dataclass field is the only source of a flag's help, default and type.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

from consyn_jax import __version__
from consyn_jax.errors import UserError, nearest
from consyn_jax.flags import Config, Flag, flags
from consyn_jax.foreign_flags import advise
from consyn_jax.remote.urls import understood

# Values may begin with a dash: numbers, and lines of dashes between documents.
_NO_FLAG = re.compile(r"-(\d|\.\d|inf|nan)|--[^a-z]", re.IGNORECASE)
# Advice about a word that belongs to no flag; it applies to commands that have the flag in the key.
STRAYS = {
    "--data": "give files to read with --data",
    "--prompt": "give texts to continue with --prompt",
    "--to": "name the result with --output",
}
METAVARS = {
    "model": "NAME|DIR|FILE",
    "prompt": "TEXT",
    "stop": "TEXT",
    "file": "FILE",
    "checkpoint": "DIR",
    "replay": "DIR",
    "run": "DIR",
    "watch": "DIR",
    "verify": "DIR",
    "documents_of": "A[:B]",
    "data": "PATH",
    "validation": "PATH",
    "requests": "FILE",
    "eval_requests": "FILE",
    "page": "FILE",
    "chat_template": "auto|plain|FILE",
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
    "lora_targets": "NAME",
    "scheduler": "NAME",
    "search": "FLAG=VALUES",
    "time_budget": "TIME",
    "metric": "NAME",
    "vectorize": "N|auto",
    "storage": "URL",
    "ladder": "N|SIZE,...",
    "predict": "flops=X|tokens=X",
    "mesh": "auto|AXIS=N,...",
    "topology": "GPU:HOSTSxGPUS|TPU:SHAPE[xSLICES]",
    "coordinator_address": "HOST:PORT",
    "ray_address": "auto|HOST:PORT",
    "shared_directory": "DIR",
    "fit": "FILE",
    "output": "PATH",
    "average": "N|STEP,...",
    "shard_size": "SIZE",
    "license": "NAME",
    "push_to_hub": "OWNER/NAME",
    "remote": "URL",
    "resume": "auto|never|STEP",
    "profile_steps": "A:B",
    "logging_backend": "NAME",
    "wandb_project": "NAME",
    "wandb_run_name": "NAME",
}


class _Parser(argparse.ArgumentParser):
    """A parser that raises a short `UserError` instead of printing a usage page.

    Attributes:
        tree: the dataclass of the options.
        common: the flags that `--help` lists; if empty, `--help` lists all flags.
    """

    tree: Any
    common: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        missing = re.match(r"argument ([^:]*): expected (.*)", message)
        strays = re.match(r"unrecognized arguments: (.*)", message)
        if missing:
            name = missing[1].split("/")[0]
            count = "at least one value" if "at least one" in missing[2] else "a value"
            message = f"{name} needs {count}; write a value that begins with a dash as {name}=VALUE"
        elif strays and strays[1].startswith("-") and strays[1].strip("- "):
            word = strays[1].split()[0]
            raise self.unknown(word, word, None)
        elif strays:
            words, known = strays[1], self._option_string_actions
            advice = next((f"; {STRAYS[name]}" for name in STRAYS if name in known), "")
            message = f"{words!r} belongs to no flag{advice}"
        raise UserError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")

    def unknown(self, word: str, name: str, value: str | None) -> UserError:
        """Make the error for an unknown flag, with a suggestion.

        Args:
            word: the command-line argument as the user wrote it.
            name: the flag's name in `word`, without dashes.
            value: the value that the user gave; None if there was none.
        """
        advice = advise(name.lstrip("-"), value, flags(self.tree), "flag")
        if advice is not None:
            return UserError(f"There is no flag {word}{advice}")
        hint = nearest(name, self._option_string_actions)
        return UserError(f"There is no flag {word}{hint} See {self.prog} --help.")


def build_parser(
    prog: str,
    description: str,
    usage: str,
    epilog: str,
    tree: type[Any],
    common: Sequence[str] = (),
    refused: Collection[str] = (),
) -> _Parser:
    """Make a parser that returns the flags of `tree` that the user gave, as strings.

    Args:
        common: the flags that `--help` lists; `--help all` lists every flag. If empty, `--help`
            lists every flag.
        refused: flags of `tree` that the command refuses with a reason, and that no help lists.
    """
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {usage}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Formatter,
    )
    parser.tree, parser.common = tree, common
    more = {"nargs": "?", "metavar": "all"} if common else {"nargs": 0}
    text = "list the most used flags (all: every flag), and stop" if common else "list all flags"
    parser.add_argument("-h", "--help", action=_Help, help=text, **more)
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {__version__}",
        help="print the version and stop",
    )
    groups: dict[str, Any] = {}
    for flag in flags(tree).values():
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        names = [f"--{name}" for name in (flag.name, *flag.aliases)]
        text = argparse.SUPPRESS if flag.name in refused else _help(flag)
        groups[flag.group].add_argument(*names, dest=flag.name, help=text, **_arity(flag))
    return parser


class _Help(argparse.Action):
    """`--help` prints the common flags and stops; `--help all` prints every flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if values not in (None, [], "all"):
            raise UserError(
                f"--help takes no value except all, not {values!r}. Write --help, or --help all."
            )
        if parser.common and values != "all":
            shown = {"help", "version", *parser.common}
            listed = [x for x in parser._actions if x.help != argparse.SUPPRESS]
            hidden = [action for action in listed if action.dest not in shown]
            for action in hidden:
                action.help = argparse.SUPPRESS
            more = f"{len(hidden)} more flags: {parser.prog} --help all"
            parser.epilog = f"{more}\n\n{parser.epilog}"
        parser.print_help()
        parser.exit()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Formats help with a wide column for flags, and keeps the lines of examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Write `--lr, --learning_rate X` instead of repeating the value after each name."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


MODES = {"print_config": "print the value of every flag with its origin, and stop"}


def read(
    parser: _Parser,
    argv: Sequence[str],
    resolve: Callable[..., tuple[Config, dict[str, str]]],
    modes: Mapping[str, str] = MODES,
) -> tuple[Config, dict[str, str], str]:
    """Parse a command line into a configuration, the origins of its values, and a mode.

    Args:
        resolve: function that merges the flags with the content of a `--config` file.
        modes: names and help texts of the flags that replace the command's usual work.

    Returns:
        The configuration, the origin of each value, and the mode: one of `modes`, or "" for the
        command's usual work.

    Raises:
        UserError: an unknown flag, an invalid value, two modes, or an unreadable `--config` file.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of flags and values; flags on the command line override it",
    )
    for name, text in modes.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    given = parse(parser, argv)
    file_name = given.pop("config", None)
    chosen = [name for name in modes if given.pop(name, False)]
    if len(chosen) > 1:
        raise UserError(
            f"--{chosen[0]} and --{chosen[1]} do not work together. Leave one of the two flags out."
        )
    file: dict[str, Any] = {}
    if file_name is not None:
        from consyn_jax.config_file import read_config_file

        understood({"config": file_name})
        file = read_config_file(Path(file_name))
    config, origins = resolve(given, file, file_name=file_name or "")
    return config, origins, "".join(chosen)


def parse(parser: _Parser, argv: Sequence[str]) -> dict[str, Any]:
    """Parse a command line into values by flag name.

    Flags may be written with `_` or `-`. If a flag is given twice, the last value counts. A flag
    that takes several values gets all values that are given.

    Raises:
        UserError: an unknown flag, or a flag without its value.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    words: list[str] = []
    for word, following in zip_longest(argv, argv[1:]):
        # argparse mistakes -1e-3 for a flag.
        if _NO_FLAG.match(word) and words and words[-1] in known:
            words[-1] += f"={word}"
            continue
        if word.startswith("--") and word != "--":
            given, equals, value = word.partition("=")
            name = "--" + given[2:].replace("-", "_")
            if name not in known:
                is_value = following is not None and not following.startswith("--")
                raise parser.unknown(given, name, value or (following if is_value else None))
            word = name + equals + value
        words.append(word)
    return vars(parser.parse_args(words))


def _arity(flag: Flag) -> dict[str, Any]:
    if flag.many:
        return {"action": "extend", "nargs": "+", "metavar": METAVARS[flag.name]}
    if flag.type is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    metavar = METAVARS.get(flag.name) or (
        "|".join(flag.choices) if flag.choices else {int: "N", float: "X", str: "TEXT"}[flag.type]
    )
    return {"metavar": metavar} | ({"nargs": "?", "const": flag.const} if flag.const else {})


def _help(flag: Flag) -> str:
    text = flag.help.replace("%", "%%")
    if flag.choices and flag.name in METAVARS:  # too wide for the column of flags
        text += f": {', '.join(flag.choices)}"
    default = flag.default
    if flag.many:
        default = " ".join(default)
    elif isinstance(default, float):
        default = f"{default:g}"
    elif default is True:
        default = "true"
    return text if default in (None, "", False) else f"{text} ({default})"
