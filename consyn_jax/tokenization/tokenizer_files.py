"""Find and read the files of a tokenizer in a directory.

Without a tokenizer.json, a SentencePiece model is converted by this package. Other vocabularies
(`vocab.json` with `merges.txt`) are converted by transformers, which knows how each model family
splits text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from consyn_jax.errors import UserError, brief, listed, parse_fault
from consyn_jax.files import refuse_strays
from consyn_jax.tokenization.sentencepiece_model import MODEL_FILES, sentencepiece_json
from consyn_jax.tokenization.special_tokens import KNOWN_NAMES, Roles
from consyn_jax.tokenization.tokenizer_json import read_text

JSON, CONFIG, TOKEN_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
SENTENCEPIECE = MODEL_FILES
VOCABULARIES = (
    *SENTENCEPIECE,
    *("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "*.tiktoken"),
)
KEPT = (JSON, CONFIG, TOKEN_MAP, "added_tokens.json", *VOCABULARIES, *TEMPLATES)
"""Glob patterns of the files that belong to a tokenizer. Exports copy these files unchanged."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of a tokenizer's files.

    Attributes:
        json_text: the text of the tokenizer.json, converted from other files if there is none.
        roles: the special token that the files assign to each role, such as "bos_token".
        add_bos: `add_bos_token` of tokenizer_config.json; None if absent.
        kept: original content of the files, by name.
        model_type: model type in the config.json of the same directory; None if absent.
        declared: added tokens that tokenizer_config.json declares, by id.
    """

    json_text: str
    roles: Roles = field(default_factory=dict)
    add_bos: bool | None = None
    kept: Mapping[str, bytes] = field(default_factory=dict)
    model_type: str | None = None
    declared: Mapping[int, AddedToken] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the original files can be loaded without an added tokenizer.json."""
        return any(name in self.kept for name in (JSON, *SENTENCEPIECE))


def read_tokenizer(path: Path) -> TokenizerFiles:
    """Read a tokenizer.json, another vocabulary file, or a directory with one.

    Raises:
        UserError: there is no tokenizer, it is damaged, or transformers is needed and missing.
    """
    directory = path if path.is_dir() else path.parent
    refuse_strays(directory, KEPT, named=None if path.is_dir() else path)
    kept = _kept(directory)
    json_file = directory / JSON if path.is_dir() or path.name in kept else path
    config = _object(directory / CONFIG)
    roles = _roles(_object(directory / TOKEN_MAP)) | _roles(config)
    model_type = _object(directory / "config.json").get("model_type")
    model = _sentencepiece(path)
    if model is not None:
        try:
            json_text, from_model = sentencepiece_json(model.read_bytes())
        except UserError as error:
            raise UserError(f"{model}: {error}") from error
        kept = {name: data for name, data in kept.items() if name not in (JSON, *SENTENCEPIECE)}
        kept[model.name if model.name in SENTENCEPIECE else SENTENCEPIECE[0]] = model.read_bytes()
        roles = from_model | roles
    elif json_file.is_file():
        json_text = read_text(json_file)
        kept = {**kept, JSON: json_file.read_bytes()}
    elif found := [name for pattern in VOCABULARIES for name in kept if Path(name).match(pattern)]:
        json_text, from_classes = _converted(directory, found)
        roles = from_classes | roles
    else:
        raise UserError(
            f"There is no tokenizer at {json_file}. Give a tokenizer.json or a directory that "
            "contains one."
        )
    add_bos = config.get("add_bos_token")
    return TokenizerFiles(
        json_text,
        roles,
        add_bos if isinstance(add_bos, bool) else None,
        kept,
        model_type if isinstance(model_type, str) else None,
        _declared(config),
    )


def _sentencepiece(path: Path) -> Path | None:
    """Find the SentencePiece model: `path`, or a file in a directory without a tokenizer.json."""
    if path.is_file():
        return path if path.suffix == ".model" else None
    if (path / JSON).is_file():
        return None
    files = (path / name for name in SENTENCEPIECE)
    return next((file for file in files if file.is_file()), None)


def holds_tokenizer(directory: Path) -> bool:
    """Whether a directory contains a vocabulary of any kind.

    A damaged or unsupported vocabulary counts, so that it is reported and not silently ignored.
    """
    return (directory / JSON).exists() or any(
        next(directory.glob(pattern), None) is not None for pattern in VOCABULARIES
    )


def _kept(directory: Path) -> dict[str, bytes]:
    files = [file for pattern in KEPT for file in sorted(directory.glob(pattern))]
    return {str(f.relative_to(directory)): f.read_bytes() for f in files if f.is_file()}


def _object(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"The tokenizer's {file.name} {parse_fault(error)}. Repair it or remove it."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"The tokenizer's {file.name} is not a JSON object. Repair it or remove it."
        )
    return content


def _roles(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Read the roles in a tokenizer_config.json or special_tokens_map.json; null means no token."""
    names: dict[str, str | None] = {}
    for role in KNOWN_NAMES.keys() & config.keys():
        entry = config[role]
        name = entry.get("content") if isinstance(entry, dict) else entry
        if not isinstance(name, str | None):
            raise UserError(
                f"The tokenizer's {CONFIG} has {entry!r} as {role}, which is not a token. Write "
                "the text of the token there."
            )
        names[role] = name
    return names


def _declared(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Read the added tokens in tokenizer_config.json, by id."""
    entries = config.get("added_tokens_decoder") or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        return {
            int(number): AddedToken(
                entry["content"], **{name: bool(entry[name]) for name in flags if name in entry}
            )
            for number, entry in sorted(entries.items(), key=lambda item: int(item[0]))
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The tokenizer's {CONFIG} has a damaged added_tokens_decoder ({error}). Download the "
            "file again."
        ) from error


def add_declared(tokenizer: Tokenizer, declared: Mapping[int, AddedToken]) -> None:
    """Add to the tokenizer the tokens that only tokenizer_config.json declares.

    As in transformers, they are added in the order of their ids. If tokenizer.json describes a
    token differently, tokenizer_config.json takes precedence.

    Raises:
        UserError: a token would get an id other than the declared id.
    """
    present = tokenizer.get_added_tokens_decoder()
    for number, token in declared.items():
        if number in present and present[number] == token:
            continue
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise UserError(
                f"The tokenizer's {CONFIG} gives {token.content!r} the id {number}, but the "
                f"vocabulary gives it {tokenizer.token_to_id(token.content)}. Download both files "
                "again."
            )


def _converted(directory: Path, found: list[str]) -> tuple[str, dict[str, str | None]]:
    """Convert a vocabulary such as `vocab.json` with transformers.

    Returns:
        The text of the tokenizer.json, and the special tokens by role.
    """
    what = f"{directory} has no {JSON}, only {listed(found, 4)}"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"{what}, which need transformers. Install it with pip install transformers, or "
            "give a directory with a tokenizer.json."
        ) from error
    named = any((directory / name).is_file() for name in (CONFIG, "config.json"))
    if not named:
        raise UserError(
            f"{what}, which do not define how to split text. Put the model's {CONFIG} and "
            "config.json beside them, or give a directory with a tokenizer.json."
        )
    try:
        theirs = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
        json_text = theirs.backend_tokenizer.to_str()
    # transformers raises errors of many kinds, from the libraries that read each format.
    except Exception as error:
        raise UserError(
            f"{what}, which transformers cannot convert ({brief(error)}). Give a "
            "directory with a tokenizer.json."
        ) from error
    return json_text, {role: getattr(theirs, role) for role in KNOWN_NAMES}
