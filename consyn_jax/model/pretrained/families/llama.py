"""The llama layout, from which the other layouts are derived; SmolLM and SmolLM2 use it, too."""

from __future__ import annotations

from typing import Any

from consyn_jax.model.pretrained.families.family import Family
from consyn_jax.model.pretrained.families.hf_config import (
    Fields,
    HfConfig,
    Option,
    optional,
    required,
    truth,
)
from consyn_jax.model_config import ModelConfig


def _head_dim(hf: HfConfig) -> int:
    return int(hf["hidden_size"]) // int(hf["num_attention_heads"])


def _eos_token_id(hf: HfConfig) -> int | tuple[int, ...] | None:
    """The EOS id; a tuple of ids if config.json has a list, as in chat models of Llama 3."""
    ids = hf.get("eos_token_id")
    return (tuple(map(int, ids)) or None) if isinstance(ids, list) else ids


# Fields of `ModelConfig` that all families have, in the order of config.json.
ARCHITECTURE = {
    "vocab_size": required("vocab_size", int),
    "hidden_dim": required("hidden_size", int),
    "mlp_dim": required("intermediate_size", int),
    "num_layers": required("num_hidden_layers", int),
    "num_heads": required("num_attention_heads", int),
    "num_kv_heads": optional("num_key_value_heads", int, lambda hf: hf["num_attention_heads"]),
    "head_dim": optional("head_dim", int, _head_dim),
    "context": required("max_position_embeddings", int),
    "norm_eps": Option("rms_norm_eps", lambda hf: float(hf.get("rms_norm_eps", 1e-6))),
    "tie_embeddings": Option("tie_word_embeddings", lambda hf: bool(hf.get("tie_word_embeddings"))),
}
TOKENS = {
    "bos_token_id": Option("bos_token_id", lambda hf: hf.get("bos_token_id")),
    "eos_token_id": Option("eos_token_id", _eos_token_id),
    "pad_token_id": Option("pad_token_id", lambda hf: hf.get("pad_token_id")),
}
OUTSIDE_BLOCKS = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
}
# Values of fields for which a layout has no keys.
PLAIN: Fields = {
    "qk_norm": False,
    "qkv_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "window_layers": None,
    "rotary_layers": None,
}


def read_biases(hf: HfConfig) -> Fields:
    """Read the bias fields from the keys attention_bias and mlp_bias."""
    in_attention = truth(hf, "attention_bias")
    return {
        "qkv_bias": in_attention,
        "output_bias": in_attention,
        "mlp_bias": truth(hf, "mlp_bias"),
    }


def write_biases(config: ModelConfig) -> dict[str, Any]:
    """The keys attention_bias and mlp_bias of config.json, with their values."""
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def attention(part: str, kind: str = "weight") -> str:
    """Name of an attention tensor in a file, without the prefix of the layer.

    Args:
        part: "q", "k", "v" or "o".
        kind: "weight" or "bias".
    """
    return f"self_attn.{part}_proj.{kind}"


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=lambda hf: PLAIN | read_biases(hf),
    write=write_biases,
    block={
        "attention_norm": "input_layernorm.weight",
        **{part: attention(part) for part in "qkvo"},
        **{f"{part}_bias": attention(part, "bias") for part in "qkvo"},
        "mlp_norm": "post_attention_layernorm.weight",
        **{part: f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
        **{f"{part}_bias": f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")},
    },
)
