"""The qwen2 layout, for qwen2 and qwen2.5: llama with query, key and value biases and a window."""

from __future__ import annotations

from dataclasses import replace

from consyn_jax.model.pretrained.families.llama import LLAMA, PLAIN
from consyn_jax.model.pretrained.families.windows import read_late, write_late

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=lambda hf: PLAIN | {"qkv_bias": True} | read_late(hf),
    write=write_late,
    defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
)
