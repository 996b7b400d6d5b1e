"""Read and replace the chat template in a model's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError

TEMPLATE, OLDER_TEMPLATE, CONFIG = (
    *("chat_template.jinja", "chat_template.json", "tokenizer_config.json"),
)
ADDITIONAL = "additional_chat_templates/"
DEFAULT, TOOL_USE = "default", "tool_use"


def template_in(files: Mapping[str, bytes]) -> str | None:
    """Find the chat template in a tokenizer's files; None if there is none.

    If there are several named templates, the template named "default" is returned.

    Args:
        files: contents of the files by name.

    Raises:
        UserError: the template in a file is not text.
    """
    return _named(files).get(DEFAULT)


def tool_template_in(files: Mapping[str, bytes]) -> str | None:
    """Find the separate template for conversations with tools; None if there is none.

    As in transformers (`get_chat_template`), this is the template named "tool_use".

    Raises:
        UserError: the template in a file is not text.
    """
    return _named(files).get(TOOL_USE)


def _named(files: Mapping[str, bytes]) -> dict[str, str]:
    """Collect the templates by name; a template without a name is "default"."""
    if TEMPLATE in files:
        extra = {
            Path(name).stem: _text(name, data)
            for name, data in files.items()
            if name.startswith(ADDITIONAL)
        }
        return {**extra, DEFAULT: _text(TEMPLATE, files[TEMPLATE])}
    for name in (OLDER_TEMPLATE, CONFIG):
        found = _object(files[name]).get("chat_template") if name in files else None
        if found is None:
            continue
        named: dict[Any, Any] = {DEFAULT: found}
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        if not named or not all(isinstance(text, str) for item in named.items() for text in item):
            raise UserError(
                f"The tokenizer's {name} has a chat_template that is not text. Download the file "
                "again."
            )
        return named
    return {}


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"The tokenizer's {name} is not UTF-8 text (byte {error.start}). Download the file "
            "again."
        ) from error


def with_template(files: Mapping[str, bytes], source: str) -> dict[str, bytes]:
    """Return a tokenizer's files with another chat template, stored as transformers 4.43 reads it.

    `split_special_tokens` is set to false, because otherwise special tokens of the template would
    be encoded as ordinary text.
    """
    changed = {
        name: content
        for name, content in files.items()
        if name != OLDER_TEMPLATE and not name.startswith(ADDITIONAL)
    }
    changed[TEMPLATE] = source.encode()
    if CONFIG in files:
        config = _object(files[CONFIG])
        if "chat_template" in config:
            config["chat_template"] = source
        if config.get("split_special_tokens"):
            config["split_special_tokens"] = False
        changed[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def read_template(path: str) -> str:
    """Read the Jinja template of `--chat_template FILE`.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"--chat_template {path} cannot be read: {reason}. Give auto, plain or a Jinja file."
        ) from error


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
