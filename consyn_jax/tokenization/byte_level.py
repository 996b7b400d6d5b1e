"""Byte-level vocabularies: symbols of bytes, patterns that split text, and the tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from consyn_jax.tokenization.special_tokens import BOS

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Regular expression with which GPT-2 splits text into words."""

SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regular expression with which o200k (GPT-4o, Llama 4) splits text into words.

Letters stay together with their combining marks, digits are split into groups of up to three, and
runs of newlines or of indentation stay together.
"""


def _byte_symbols() -> list[str]:
    """List the printable character that represents each byte, as in GPT-2's `bytes_to_unicode`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(value) if value in printable else chr(next(others)) for value in range(256)]


BYTE_SYMBOLS = _byte_symbols()


def spelling(token: bytes) -> str:
    """Convert the bytes of a token to their symbols, as in a vocabulary file."""
    return "".join(BYTE_SYMBOLS[value] for value in token)


def build_json(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    special_tokens: Sequence[str],
    pattern: str,
) -> str:
    """Build the tokenizer.json of a byte-level BPE.

    Its post-processor puts BOS before a text if the caller asks for special tokens.

    Args:
        tokens: all tokens, in the order of their ids.
    """
    tokenizer = Tokenizer(
        BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges))
    )
    tokenizer.pre_tokenizer = PreTokenizers(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    if BOS in special_tokens:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS}:1 $B:1",
            special_tokens=[(BOS, tokens.index(BOS))],
        )
    return tokenizer.to_str()
