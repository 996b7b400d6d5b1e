"""A command's settings as YAML: written with the origin of each, and read back for `--config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from consyn_jax.config import PrepareConfig, RunConfig, UserError, flags

DERIVED = "derived"  # in config.yaml: what follows from the flags and the data; two runs that differ there are different runs
DOCUMENT_END = "...\n"  # what YAML puts behind a lone scalar


def describe(config: RunConfig | PrepareConfig, origins: dict[str, str]) -> str:
    """What a command was told as YAML, grouped, each line with the origin of its value."""
    lines: list[str] = []
    group = ""
    for name, f in flags(type(config)).items():
        if f.group != group:
            lines += ([""] if lines else []) + [f"# {f.group}"]
            group = f.group
        value = getattr(getattr(config, f.group), name)
        shown = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, allow_unicode=True, width=10**6)
        text = f"{name}: {shown.removesuffix(DOCUMENT_END).rstrip()}"
        lines.append(f"{text:<40} # {origins[name]}")
    return "\n".join(lines) + "\n\n"


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a `--config` file.

    Raises:
        UserError: no such file, not YAML, or no flat mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node, content = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}. Give a YAML file with the names of the flags.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}. Give a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 40th of May
        at = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise UserError(f"--config {path}{f':{at.line + 1}' if at else ''} is not YAML: {problem}. Write `setting: value` lines.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path} must consist of `setting: value` lines, with the names of the flags.")
    lines: dict[str, int] = {}
    for key, _ in node.value if node is not None else ():
        line = key.start_mark.line + 1
        if lines.setdefault(key.value, line) != line:  # YAML would silently take the later one
            raise UserError(f"--config {path} sets {key.value} twice, in lines {lines[key.value]} and {line}. Leave one out.")
    content.pop(DERIVED, None)
    return content
