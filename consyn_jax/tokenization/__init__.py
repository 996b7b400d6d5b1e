"""Encode text to token ids and decode ids, with bundled, published or trained vocabularies."""

from consyn_jax.tokenization.bpe import BPETokenizer, load_tokenizer, own_tokenizer
from consyn_jax.tokenization.byte_level import GPT2_PATTERN, SPLIT_PATTERN
from consyn_jax.tokenization.special_tokens import SPECIAL_TOKENS

__all__ = [
    "GPT2_PATTERN",
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "BPETokenizer",
    "load_tokenizer",
    "own_tokenizer",
]
