"""Encode documents and parts of documents; a part gets the same ids as in the whole document.

SentencePiece and some byte vocabularies put a space before a text. For a part from the middle of a
document, this space is left out, because the document does not contain it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from consyn_jax.errors import UserError
from consyn_jax.tokenization.bounded import bounded, guarded, limit_s, probe
from consyn_jax.tokenization.byte_level import SPLIT_PATTERN
from consyn_jax.tokenization.sentencepiece_model import LEADING

SPLITTING = ("normalizer", "pre_tokenizer")
Before = str | None
"""The content before a text: "text", "token" (a special token), or None at the document's start."""


class TextEncoder:
    """Encodes texts, and adds no special tokens.

    The ids of a text may depend on what precedes it in its document.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Build the encoder of a tokenizer that `switch_off_changes` has prepared.

        Raises:
            UserError: a regular expression of the tokenizer does not finish on a short text, or
                makes the library `tokenizers` panic.
        """
        content = json.loads(tokenizer.to_str())
        self._whole, self._inner = tokenizer, _without_prefix(content)
        own = {SPLIT_PATTERN, LEADING}
        self._has_expressions = bool(
            set(_expressions([content.get(part) for part in SPLITTING])) - own
        )
        if self._has_expressions:
            probe(lambda texts: _ids(tokenizer, texts))
        self._plain = {None, "token"} if _prefixes_every_piece(content) else {None}

    def encode(
        self, texts: Sequence[str], after: Sequence[Before] | None = None
    ) -> list[list[int]]:
        """Encode texts; return the ids of each text.

        Raises:
            UserError: a text contains a lone surrogate, or a regular expression of the tokenizer
                does not finish or makes the library panic.
        """
        if isinstance(texts, str):
            raise UserError("encode_batch takes a list of texts, not a single text. Pass [text].")
        if not all(isinstance(text, str) for text in texts):
            kind = next(type(text).__name__ for text in texts if not isinstance(text, str))
            raise UserError(
                f"A tokenizer encodes text, not {kind}. Pass a str to encode, or a list of str "
                "to encode_batch."
            )
        if self._has_expressions:
            return bounded(lambda: self._encode(texts, after), limit_s(sum(map(len, texts))))
        return guarded(lambda: self._encode(texts, after))

    def _encode(self, texts: Sequence[str], after: Sequence[Before] | None) -> list[list[int]]:
        if self._inner is None or after is None:
            return _ids(self._whole, texts)
        whole = [before in self._plain for before in after]
        of_whole = iter(_ids(self._whole, [t for t, w in zip(texts, whole, strict=True) if w]))
        of_inner = iter(_ids(self._inner, [t for t, w in zip(texts, whole, strict=True) if not w]))
        return [next(of_whole if is_whole else of_inner) for is_whole in whole]


def plain_ids(ids: Any) -> list[int]:
    """Convert the ids of a text, such as an array of any library, to a list of int.

    Raises:
        UserError: the ids are not whole numbers of at least 0.
    """
    try:
        found = [index(number) for number in ids]
    except TypeError:
        found = [-1]
    if found and min(found) < 0:
        raise UserError(
            "decode takes the ids of one text, which are whole numbers of at least 0. Pass "
            "a list of ids, without the -100 of labels."
        )
    return found


def switch_off_changes(tokenizer: Tokenizer) -> None:
    """Switch off truncation, padding and merge dropout, which published files may set.

    Also make the tokenizer encode special tokens in a text as ordinary text.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, BPE):
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except TypeError:
        _check_surrogates(texts)
        raise
    return [encoding.ids for encoding in encodings]


def _expressions(content: Any) -> list[str]:
    """Collect all regular expressions in a part of a tokenizer.json."""
    if isinstance(content, Mapping):
        own = [content["Regex"]] if isinstance(content.get("Regex"), str) else []
        return own + [each for value in content.values() for each in _expressions(value)]
    if isinstance(content, list):
        return [each for value in content for each in _expressions(value)]
    return []


def _check_surrogates(texts: Sequence[str]) -> None:
    """Raise an error that names the first lone surrogate; the error of `tokenizers` does not."""
    surrogate = re.compile("[\ud800-\udfff]")
    for text in texts:
        if isinstance(text, str) and (found := surrogate.search(text)):
            raise UserError(
                f"A text has the lone surrogate U+{ord(found.group()):04X} at position "
                f"{found.start()}, which is not a character. Remove it from the data."
            )


def _without_prefix(content: Mapping[str, Any]) -> Tokenizer | None:
    """Copy the tokenizer so that it adds no space before a text; None if it never adds a space.

    Args:
        content: content of the tokenizer.json.
    """
    changed = dict(content)
    for part in ("normalizer", "pre_tokenizer"):
        changed[part] = _unprefixed(content.get(part))
    if changed == content:
        return None
    tokenizer = guarded(lambda: Tokenizer.from_str(json.dumps(changed)))
    switch_off_changes(tokenizer)
    return tokenizer


def _unprefixed(part: Any) -> Any:
    """Change a normalizer or pre-tokenizer so that it adds no space before a text.

    Returns None if the part does nothing else; the caller then leaves the part out.
    """
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type")
    for name in ("normalizers", "pretokenizers"):
        if kind == "Sequence" and name in part:
            return {**part, name: [kept for p in part[name] if (kept := _unprefixed(p))]}
    changes: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
        "Strip": {"strip_left": False},
    }
    if kind == "Prepend" or part.get("pattern") == {"Regex": LEADING}:
        return None
    return {**part, **changes.get(str(kind), {})}


def _prefixes_every_piece(content: Mapping[str, Any]) -> bool:
    """Whether the tokenizer also adds a space before text that follows a special token.

    `Prepend` and `ByteLevel` add it to each piece between special tokens. `Metaspace` does so only
    with the scheme "always".
    """

    def every(part: Any) -> bool:
        if not isinstance(part, Mapping):
            return False
        kind = part.get("type")
        inner = [*part.get("normalizers", ()), *part.get("pretokenizers", ())]
        if kind == "Sequence":
            return any(map(every, inner))
        always = kind == "Metaspace" and part.get("prepend_scheme") == "always"
        spaced = kind == "ByteLevel" and part.get("add_prefix_space")
        return bool(kind == "Prepend" or always or spaced)

    return every(content.get("normalizer")) or every(content.get("pre_tokenizer"))
