"""Convert SentencePiece's `tokenizer.model` to a tokenizer.json that gives the same ids.

The file is a protocol buffer, defined in sentencepiece_model.proto
(github.com/google/sentencepiece). Other converters are not used, because their results drop the
space before a text, or the second of two spaces.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from consyn_jax.errors import UserError

SPACE = "▁"
MODEL_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
UNIGRAM, BPE = 1, 2
LEADING = r"\A +"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Fields of TrainerSpec.
MODEL_TYPE, SUFFIX, BYTE_FALLBACK = 3, 24, 35
ROLE_IDS = {"bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}  # field, default


@dataclass(frozen=True)
class Piece:
    """A token of the vocabulary; `kind` is one of the constants NORMAL to BYTE."""

    text: str
    score: float
    kind: int


def read_pieces(files: Mapping[str, bytes]) -> list[Piece] | None:
    """Read the pieces of a SentencePiece model; None if no file in `files` is such a model.

    Args:
        files: contents of a tokenizer's files, by name.
    """
    name = next((name for name in MODEL_FILES if name in files), None)
    if name is None:
        return None
    return [_piece(value) for number, value in _fields(files[name]) if number == 1]


def sentencepiece_json(data: bytes) -> tuple[str, dict[str, str | None]]:
    """Convert a SentencePiece model.

    Returns:
        The content of tokenizer.json, and the special tokens by role. If the model has BOS, the
        tokenizer puts BOS before every text.

    Raises:
        UserError: the model is damaged, or of a kind that `tokenizers` does not support.
    """
    try:
        fields = list(_fields(data))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = dict(_fields(next((v for n, v in fields if n == 2), b"")))
        rules = dict(_fields(next((v for n, v in fields if n == 3), b"")))
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise UserError(
            f"This is not a SentencePiece model, or it is truncated ({error}). Download it again."
        ) from error
    kind = trainer.get(MODEL_TYPE, UNIGRAM)
    unknown = [index for index, piece in enumerate(pieces) if piece.kind == UNKNOWN]
    if kind not in (UNIGRAM, BPE) or trainer.get(SUFFIX, 0) or len(unknown) != 1:
        raise UserError(
            "This SentencePiece model is not supported: it has a vocabulary of words or "
            "characters, or puts spaces at the ends of words. Give a BPE or Unigram model."
        )
    roles: dict[str, str | None] = {}
    for role, (field, default) in ROLE_IDS.items():
        index = _signed(trainer.get(field, default))
        roles[role] = pieces[index].text if 0 <= index < len(pieces) else None
    model = _bpe(pieces, unknown[0]) if kind == BPE else _unigram(pieces, unknown[0])
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(pieces)),
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(rules))},
        "pre_tokenizer": _user_defined(pieces) if kind == BPE else _split_of_controls(pieces),
        "post_processor": _post_processor(pieces, roles["bos_token"]),
        "decoder": {"type": "Sequence", "decoders": list(_decoders(rules))},
        "model": model | {"byte_fallback": bool(trainer.get(BYTE_FALLBACK, 0))},
    }
    return json.dumps(content, ensure_ascii=False), roles


# ------------------------------------------------------------------------------ the protocol buffer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protocol buffer; values are integers or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or at + size > len(data):
            fault = f"of wire type {wire}, has the impossible length {size}"
            raise ValueError(f"the field at byte {at}, {fault}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    if not isinstance(fields.get(1), bytes):
        raise TypeError("a piece has no text")
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL))


# ---------------------------------------------------------------------------- the tokenizer.json


def _bpe(pieces: list[Piece], unknown: int) -> dict[str, Any]:
    """Build the BPE model of a tokenizer.json.

    There is a merge for every two pieces whose concatenation is a normal piece. The merges are
    sorted by the score of that concatenation, highest first.
    """
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    mergeable = {p.text for p in pieces if p.kind in (NORMAL, USER_DEFINED, UNUSED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece in pieces:
        if piece.kind != NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-piece.score, ids[left], ids[right], left, right))
    merges.sort()
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unknown].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "ignore_merges": _user_defined(pieces) is not None,
        "vocab": ids,
        "merges": [[left, right] for _, _, _, left, right in merges],
    }


def _unigram(pieces: list[Piece], unknown: int) -> dict[str, Any]:
    found = (NORMAL, USER_DEFINED)
    lowest = min((piece.score for piece in pieces if piece.kind in found), default=0.0)
    vocabulary = [[p.text, p.score if p.kind in found else lowest] for p in pieces]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary}


def _split_of_controls(pieces: list[Piece]) -> dict[str, Any]:
    """Build a pre-tokenizer that keeps Unigram from matching control and byte tokens in a text.

    SentencePiece never matches these tokens in a text. The pre-tokenizer splits the text of such a
    token before its last character.
    """
    spelled = [p.text for p in pieces if p.kind not in (NORMAL, USER_DEFINED) and len(p.text) > 1]
    begun = "|".join(f"{re.escape(text[:-1])}(?={re.escape(text[-1])})" for text in spelled)
    behavior = {"behavior": "MergedWithPrevious", "invert": False}
    return {"type": "Split", "pattern": {"Regex": begun}, **behavior}


def _user_defined(pieces: list[Piece]) -> dict[str, Any] | None:
    """Build a pre-tokenizer that splits off user-defined pieces; None if there are none.

    The pieces are not added tokens, because an extra space would follow an added token. A BPE model
    with such pieces has `ignore_merges`: it looks up a whole word before it merges. The
    pre-tokenizer therefore also splits the text of control tokens, so that no lookup finds one.
    """
    found = sorted((p.text for p in pieces if p.kind == USER_DEFINED), key=len, reverse=True)
    if not found:
        return None
    pattern = {"Regex": "|".join(map(re.escape, found))}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _split_of_controls(pieces)]}


def _added(pieces: list[Piece]) -> Iterator[dict[str, Any]]:
    for index, piece in enumerate(pieces):
        if piece.kind in (UNKNOWN, CONTROL):
            yield {
                "id": index,
                "content": piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }


def _normalizers(rules: dict[int, Any]) -> Iterator[dict[str, Any]]:
    if rules.get(2):
        charsmap = base64.b64encode(rules[2]).decode("ascii")
        yield {"type": "Precompiled", "precompiled_charsmap": charsmap}
    if rules.get(4, 1):  # remove_extra_whitespaces
        for spaces, content in ((LEADING, ""), (f"[ {SPACE}]+\\z", ""), (" {2,}", " ")):
            yield {"type": "Replace", "pattern": {"Regex": spaces}, "content": content}
    if rules.get(3, 1):  # add_dummy_prefix
        yield {"type": "Prepend", "prepend": SPACE}
    yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _decoders(rules: dict[int, Any]) -> Iterator[dict[str, Any]]:
    yield {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if rules.get(3, 1):
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _post_processor(pieces: list[Piece], bos: str | None) -> dict[str, Any] | None:
    if bos is None:
        return None
    index = next(i for i, piece in enumerate(pieces) if piece.text == bos)
    front = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [front, text[0]],
        "pair": [front, text[0], front, text[1]],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
