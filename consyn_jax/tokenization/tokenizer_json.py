"""Read and parse a tokenizer.json."""

from __future__ import annotations

import gzip
import json
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer

from consyn_jax.errors import UserError, parse_fault
from consyn_jax.files import LARGEST_TEXT


def bundled_json() -> str:
    """Return the text of the bundled tokenizer.json."""
    file = resources.files("consyn_jax.tokenization").joinpath("default.json.gz")
    return gzip.decompress(file.read_bytes()).decode("utf-8")


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        UserError: the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_TEXT:
            raise UserError(
                f"{path} has {size:,} bytes, but such a file has at most {LARGEST_TEXT:,}. Remove "
                "it, or replace it with the right file."
            )
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}). Convert it to UTF-8 or leave it out."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


def parse(json_text: str) -> Tokenizer:
    """Parse the text of a tokenizer.json.

    The structure is checked first, because messages of the Rust parser give the line of a fault but
    not its cause.

    Raises:
        UserError: the text is damaged, or neither a BPE nor a Unigram tokenizer.
    """
    try:
        content = json.loads(json_text)
    except (ValueError, RecursionError) as error:
        is_cut = isinstance(error, json.JSONDecodeError)
        fault = "is not JSON, or it is truncated" if is_cut else parse_fault(error)
        raise UserError(f"This {fault}. Download or save the tokenizer.json again.") from error
    model = content.get("model") if isinstance(content, dict) else None
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    is_bpe = kind == "BPE" and isinstance(vocabulary, dict) and "merges" in (model or {})
    if not is_bpe and not (kind == "Unigram" and isinstance(vocabulary, list)):
        raise UserError(
            "This is not a BPE or Unigram tokenizer.json: its 'model' must have the type BPE with "
            "'vocab' and 'merges', or the type Unigram with 'vocab'. Give a BPE or Unigram "
            "tokenizer."
        )
    try:
        return Tokenizer.from_str(json_text)
    except BaseException as error:
        # The Rust parser raises a plain Exception, or a PanicException if it panics. A
        # PanicException is not an Exception and cannot be imported, so compare its name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"The tokenizer.json is damaged: {error}. Download or save it again."
        ) from error
