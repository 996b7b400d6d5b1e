"""Describe a tokenizer to llama.cpp: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

A GGUF file cannot contain the regular expression that splits text into words. llama.cpp knows some
expressions by name, in `src/llama-vocab.cpp`; a tokenizer with another expression is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from consyn_jax.errors import UserError, listed
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import GPT2_PATTERN, SPLIT_PATTERN, BPETokenizer
from consyn_jax.tokenization.byte_level import BYTE_SYMBOLS
from consyn_jax.tokenization.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    read_pieces,
)

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Splitting steps -> values of `tokenizer.ggml.pre` without and with `ignore_merges`.
SPLITS: Mapping[tuple[str, ...], tuple[str | None, str | None]] = {
    (GPT2_PATTERN,): ("gpt-2", None),
    (CL100K,): ("dbrx", "llama-bpe"),
    (CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),): ("qwen2", None),
    (SPLIT_PATTERN,): ("gpt-4o", None),
    ("digits", GPT2_PATTERN): ("smollm", None),
}
LOWEST_SCORE = -1e4  # for tokens that no merge produces


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer metadata of a GGUF file.

    Attributes:
        model: "gpt2" or "llama".
        pre: Name of the rule that splits text.
        merges: Merges of a "gpt2" vocabulary.
        scores: Scores of a "llama" vocabulary.
        adds_space: Whether a space is put in front of a text.
        notes: Sentences about differences between llama.cpp and the tokenizer.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    adds_space: bool = False
    notes: tuple[str, ...] = ()


def vocabulary(tokenizer: BPETokenizer, size: int) -> Vocabulary:
    """Convert the vocabulary of a tokenizer, padded to `size` tokens.

    Raises:
        UserError: llama.cpp would give other ids than this tokenizer.
    """
    content = json.loads(tokenizer.to_json())
    kind = content["model"].get("type", "BPE")
    if kind != "BPE":
        raise _refused(f"the tokenizer is a {kind} model, but only BPE can be converted")
    if content["model"].get("byte_fallback") or not _has_bytes(content):
        return _sentencepiece(tokenizer, content, size)
    return _byte_level(content, size)


def add_tokenizer(writer: Any, tokenizer: BPETokenizer, config: ModelConfig) -> tuple[str, ...]:
    """Add the metadata of a tokenizer to a `gguf.GGUFWriter`; return notes for the user.

    Raises:
        UserError: llama.cpp would give other ids than this tokenizer.
    """
    found = vocabulary(tokenizer, config.vocab_size)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.adds_space)
    notes = list(found.notes)
    ends = [i for i in config.eos_token_ids if i != tokenizer.eos_token_id]
    for role, number in {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unknown_id,
        "eot": ends[0] if ends else None,
        "eom": ends[1] if len(ends) > 1 else None,
    }.items():
        if number is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    if ends[2:]:
        notes.append(
            f"llama.cpp supports at most three end-of-text tokens; {listed(ends[2:])} are left out"
        )
    writer.add_add_bos_token(tokenizer.first_id is not None)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    return tuple(notes)


def _refused(reason: str) -> UserError:
    return UserError(
        f"llama.cpp cannot tokenise as this tokenizer does: {reason}. Convert the model to hf."
    )


def _filled(tokens: dict[int, tuple[str, int]], size: int) -> tuple[list[str], list[int]]:
    """List the texts and types of all ids; an unused id gets the text "[PAD<id>]"."""
    rows = [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    texts = [text for text, _ in rows]
    if len(set(texts)) < size:
        twice = next(text for number, text in enumerate(texts) if text in texts[:number])
        raise _refused(f"two ids have the text {twice!r}")
    return texts, [kind for _, kind in rows]


# ------------------------------------------------------------------------------ bytes, as in GPT-2


def _has_bytes(content: Mapping[str, Any]) -> bool:
    return content["model"]["vocab"].keys() >= set(BYTE_SYMBOLS)


def _byte_level(content: Mapping[str, Any], size: int) -> Vocabulary:
    model = content["model"]
    pre, notes = _split_name(content)
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = {number: (text, NORMAL) for text, number in model["vocab"].items()}
    for number, token in added.items():
        tokens[number] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    texts, types = _filled(tokens, size)
    # llama.cpp does not load a vocabulary without merges; this merge never applies.
    return Vocabulary("gpt2", pre, texts, types, merges or ["[none] [none]"], notes=notes)


def _split_name(content: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The name of the pre-tokenizer, and notes on how llama.cpp differs from the tokenizer."""
    steps = tuple(_steps(content.get("pre_tokenizer")))
    if steps not in SPLITS:
        raise _refused(
            f"llama.cpp has no rule that splits text by {listed([repr(s) for s in steps])}"
        )
    normalizer = content.get("normalizer") or {}
    kinds = [part["type"] for part in normalizer.get("normalizers", [normalizer]) if part]
    if set(kinds) - {"NFC"}:
        raise _refused(f"the tokenizer changes text before splitting it ({', '.join(kinds)})")
    ignores = bool(content["model"].get("ignore_merges"))
    name = SPLITS[steps][ignores]
    if name is None:
        raise _refused(
            "the tokenizer looks up whole words in its vocabulary before merging"
            if ignores
            else "the tokenizer applies merges to words that are themselves tokens"
        )
    notes = []
    if kinds:
        notes.append("this tokenizer normalises text to NFC, but llama.cpp does not")
    if name == "gpt-4o":
        notes.append(
            "llama.cpp splits words with combining marks, or with inner capitals beyond A-Z, "
            "differently from this tokenizer"
        )
    return name, tuple(notes)


def _steps(part: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the steps by which a pre-tokenizer splits text; an unknown step yields its type."""
    part = part or {}
    kind = part.get("type")
    if kind == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        yield part["pattern"].get("Regex", str(part["pattern"]))
    elif kind == "Digits" and part["individual_digits"]:
        yield "digits"
    elif kind == "ByteLevel" and not part["add_prefix_space"]:
        if part["use_regex"]:
            yield GPT2_PATTERN
    else:
        yield str(kind)


# ------------------------------------------------------------------------------------ SentencePiece


def _sentencepiece(tokenizer: BPETokenizer, content: Mapping[str, Any], size: int) -> Vocabulary:
    pieces = read_pieces(tokenizer.kept_files) or list(_pieces(content))
    adds_space = _check_spaces(content)
    for token in content["added_tokens"]:
        kind = CONTROL if token["special"] else USER_DEFINED
        if token["content"] == content["model"].get("unk_token"):
            kind = UNKNOWN
        pieces += [
            Piece(f"[PAD{n}]", LOWEST_SCORE, UNUSED) for n in range(len(pieces), token["id"] + 1)
        ]
        pieces[token["id"]] = Piece(token["content"], 0.0, kind)
    tokens = {number: (piece.text, piece.kind) for number, piece in enumerate(pieces)}
    texts, types = _filled(tokens, size)
    scores = [piece.score for piece in pieces] + [LOWEST_SCORE] * (size - len(pieces))
    return Vocabulary("llama", "default", texts, types, scores=scores, adds_space=adds_space)


def _pieces(content: Mapping[str, Any]) -> Iterator[Piece]:
    """Convert a tokenizer.json to pieces with scores that reproduce the order of its merges.

    SentencePiece merges the pair whose result has the highest score, so the score of a token is the
    negative index of its first merge. SentencePiece then gives the same ids if two conditions hold:
    every two tokens that together spell the result of a merge are themselves a merge, and all
    merges with the same result are adjacent.
    """
    model = content["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    order: dict[str, int] = {}
    results = ["".join(pair) for pair in merges]
    for text in results:
        order.setdefault(text, len(order))
    ranks = [order[text] for text in results]
    known = {tuple(pair) for pair in merges}
    usable = {text for text in model["vocab"] if text in order or len(text) == 1}
    missing = [
        text
        for text in order
        for cut in range(1, len(text))
        if {text[:cut], text[cut:]} <= usable and (text[:cut], text[cut:]) not in known
    ]
    if ranks != sorted(ranks) or missing:
        raise _refused("the order of the merges cannot be expressed by scores of tokens")
    for text, _ in sorted(model["vocab"].items(), key=lambda item: item[1]):
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = BYTE if is_byte else NORMAL
        yield Piece(text, -float(order[text]) if text in order else -float(len(order)), kind)


def _check_spaces(content: Mapping[str, Any]) -> bool:
    """Find out whether the tokenizer puts a space in front of a text.

    Raises:
        UserError: The tokenizer changes text in a way that llama.cpp does not support.
    """
    normalizer, splitter = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = [step for step in normalizer.get("normalizers", [normalizer]) if step]
    adds, replaces = False, False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            adds = True
        elif step["type"] == "Replace" and step["content"] == SPACE:
            replaces = replaces or step["pattern"] == {"String": " "}
        else:
            raise _refused(
                f"the tokenizer changes text before splitting it (normalizer {step['type']})"
            )
    if splitter.get("type") == "Metaspace":
        replaces = splitter["replacement"] == SPACE
        adds = adds or splitter.get("prepend_scheme", "always") != "never"
        if splitter.get("split", True):
            raise _refused("the tokenizer splits text at spaces before merging")
    elif splitter:
        raise _refused(f"the tokenizer splits text by {splitter.get('type')} before merging")
    if not replaces:
        raise _refused(f"the tokenizer does not write spaces as {SPACE}")
    return adds
