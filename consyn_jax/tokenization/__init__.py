"""Text to ids and back: byte-level BPE, the bundled default vocabulary, and the vocabularies users bring or train."""

from consyn_jax.tokenization.bpe import GPT2_PATTERN, SPECIAL_TOKENS, SPLIT_PATTERN, BPETokenizer, load_tokenizer

__all__ = ["GPT2_PATTERN", "SPECIAL_TOKENS", "SPLIT_PATTERN", "BPETokenizer", "load_tokenizer"]
