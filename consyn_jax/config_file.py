"""Write settings as YAML, with the origin of each value, and read them for `--config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from consyn_jax.errors import UserError, parse_fault
from consyn_jax.flags import flags

# The key in config.yaml for values derived from flags and data. A resumed run must not change them.
DERIVED = "derived"
LARGEST = 1 << 24  # characters; a list of data may have thousands of files
DOCUMENT_END = "...\n"  # YAML writes it after a lone scalar


def describe(config: Any, origins: dict[str, str]) -> str:
    """Format all settings as YAML, by group, with the origin of each value in a comment."""
    lines: list[str] = []
    group = ""
    for name, f in flags(type(config)).items():
        if f.group != group:
            lines += ([""] if lines else []) + [f"# {f.group}"]
            group = f.group
        value = getattr(getattr(config, f.group), name)
        plain = list(value) if isinstance(value, tuple) else value
        shown = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6)
        text = f"{name}: {shown.removesuffix(DOCUMENT_END).rstrip()}"
        lines.append(f"{text:<40} # {origins[name]}")
    return "\n".join(lines) + "\n\n"


def read_config_file(path: Path) -> dict[str, Any]:
    """Read the settings in a `--config` file.

    Raises:
        UserError: there is no such file, or it is not a flat mapping in YAML.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(
                f"--config {path} has more than {LARGEST:,} characters, too many for a file of "
                "settings. Give a YAML file whose keys are flag names."
            )
        node, content = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise UserError(
            f"--config {path} cannot be read: {error.strerror}. Give a YAML file whose keys are "
            "flag names."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--config {path} is not UTF-8 text: byte {error.start} is "
            f"0x{error.object[error.start]:02x}. Give a YAML file."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(
            f"--config {where} {parse_fault(error, 'YAML')}. Write `setting: value` lines."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"--config {path} must consist of `setting: value` lines whose keys are flag names."
        )
    lines: dict[str, int] = {}
    for key, _ in node.value if node is not None else ():
        line = key.start_mark.line + 1
        if lines.setdefault(key.value, line) != line:  # YAML would silently take the later one
            raise UserError(
                f"--config {path} sets {key.value} twice, in lines {lines[key.value]} and {line}. "
                "Leave one of them out."
            )
    content.pop(DERIVED, None)
    return content
