"""The qwen3 layout: llama with query and key norms, and a sliding window on some layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from consyn_jax.model.pretrained.families.hf_config import Fields, HfConfig
from consyn_jax.model.pretrained.families.llama import LLAMA, PLAIN, read_biases
from consyn_jax.model.pretrained.families.qwen2 import QWEN2
from consyn_jax.model.pretrained.families.windows import read_late, write_late
from consyn_jax.model_config import ModelConfig


def _read(hf: HfConfig) -> Fields:
    biases = read_biases(hf) | {"mlp_bias": False}
    return PLAIN | {"qk_norm": True} | biases | read_late(hf)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, **write_late(config)}


QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read,
    write=_write,
    block=LLAMA.block | {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"},
    defaults=QWEN2.defaults | {"head_dim": 128},
)
