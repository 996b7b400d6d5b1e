"""Detect role markers of chat models in data that is read as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Markers of ChatML and Qwen, Llama 3, Llama 2 and Mistral, Gemma, Phi 3 and Zephyr.
KNOWN = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
)


def pattern(special_tokens: Iterable[str] = ()) -> re.Pattern[str]:
    """Build a pattern that finds the role markers of chat models, and a tokenizer's special tokens.

    >>> bool(pattern().search("<|im_start|>user"))
    True
    """
    return re.compile("|".join(map(re.escape, dict.fromkeys((*KNOWN, *special_tokens)))))
