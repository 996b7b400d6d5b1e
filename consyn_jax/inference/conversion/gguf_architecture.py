"""Describe a model to llama.cpp by GGUF keys and tensor names, or refuse it.

Keys and transpositions follow llama.cpp's directory `conversion/`, as of llama-cpp-python 0.3.36.
The mathematics of each architecture follows llama.cpp's `src/models/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from consyn_jax.errors import UserError
from consyn_jax.model.pretrained.config_json import family_of
from consyn_jax.model.rope import SCALINGS, attention_factor, plain_frequencies
from consyn_jax.model_config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, and the model options that it supports.

    Attributes:
        name: Value of `general.architecture`.
        biases: Supported bias options, fields of `ModelConfig`.
        scalings: Supported scalings of the rotary embedding.
        is_interleaved: Whether the architecture rotates pairs (2i, 2i+1), so that rows of queries
            and keys must be reordered.
        is_square: Whether num_heads x head_dim must equal hidden_dim.
    """

    name: str
    biases: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ("linear", "yarn", "dynamic")
    is_interleaved: bool = False
    is_square: bool = False


# Hugging Face layout -> llama.cpp architecture. No architecture supports sliding windows here.
LLAMA = Architecture(
    "llama",
    ("qkv_bias", "output_bias", "mlp_bias"),
    ("linear", "yarn", "dynamic", "llama3", "longrope"),
    is_interleaved=True,
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen2": Architecture("qwen2", ("qkv_bias",), is_square=True),
    "qwen3": Architecture("qwen3", ("qkv_bias",)),
    "smollm3": Architecture("smollm3", ("qkv_bias",), is_interleaved=True),
    "phi3": Architecture("phi3", (), ("dynamic", "longrope"), is_square=True),
}
SMOLLM3_INTERVAL = 4  # llama.cpp skips rotation in every fourth layer; no GGUF key changes this
TO_HF = "Convert the model to hf."


def architecture_of(config: ModelConfig, context: int) -> Architecture:
    """Find the llama.cpp architecture that computes `config` for texts up to `context` tokens.

    Raises:
        UserError: No architecture computes this model.
    """
    family = family_of(config).model_type
    own = ARCHITECTURES[family]
    for reason in _reasons(config, context, family, own):
        raise UserError(f"llama.cpp cannot run this {family}: {reason}")
    return own


def _reasons(config: ModelConfig, context: int, family: str, own: Architecture) -> list[str]:
    reasons = []
    window = config.sliding_window
    if window is not None and window < context:
        reasons.append(
            "llama.cpp has no sliding window for this layout, but the model's window is "
            f"{window:,} tokens. Give --context {window}: up to this length, the results agree."
        )
    for name, what in (
        ("qkv_bias", "queries, keys and values"),
        ("output_bias", "the output of attention"),
        ("mlp_bias", "the MLP"),
    ):
        if getattr(config, name) and name not in own.biases:
            reasons.append(f"llama.cpp reads no biases of {what} for this layout. {TO_HF}")
    if own.is_square and config.num_heads * config.head_dim != config.hidden_dim:
        reasons.append(
            "for llama.cpp, all heads must together be as wide as the model, but "
            f"{config.num_heads} heads x {config.head_dim} is not {config.hidden_dim}. {TO_HF}"
        )
    rotates = config.rotary_layers or (True,) * config.num_layers
    known = [
        family != "smollm3" or (layer + 1) % SMOLLM3_INTERVAL != 0
        for layer in range(config.num_layers)
    ]
    if list(rotates) != known:
        reasons.append(
            f"llama.cpp leaves every {SMOLLM3_INTERVAL}th layer of this layout unrotated, but this "
            f"model has other unrotated layers. {TO_HF}"
        )
    scaling = config.rope_scaling
    if scaling is not None:
        if scaling.rope_type not in own.scalings:
            reasons.append(f"llama.cpp has no {scaling.rope_type} scaling for this layout. {TO_HF}")
        if scaling.rope_type == "dynamic" and context > config.context:
            reasons.append(
                "llama.cpp has no dynamic scaling, which this model uses beyond "
                f"{config.context:,} tokens. Give --context {config.context}: up to this length, "
                "the scaling changes nothing."
            )
        if not scaling.truncate:
            reasons.append(
                "llama.cpp's YaRN scaling always truncates, but the YaRN scaling of this model "
                f"does not. {TO_HF}"
            )
    return reasons


def model_keys(writer: Any, config: ModelConfig, context: int) -> None:
    """Add the keys of the architecture to a `gguf.GGUFWriter`."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    if family_of(config).model_type == "phi3":
        writer.add_sliding_window(0)  # as in Phi-4, where this value means no sliding window
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type not in ("linear", "yarn", "longrope"):
        return
    import gguf

    original = scaling.original_max_position_embeddings
    factor = scaling.factor or config.context / (original or config.context)
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
    if scaling.rope_type != "longrope":
        writer.add_rope_scaling_factor(factor)
    if original is not None:
        writer.add_rope_scaling_orig_ctx_len(original)
    if scaling.rope_type == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(float(scaling.beta_fast or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(scaling.beta_slow or 1))
    # llama.cpp multiplies by yarn's default attention factor itself.
    implied = 0.1 * math.log(factor) + 1 if scaling.rope_type == "yarn" and factor > 1 else 1.0
    writer.add_rope_scaling_attn_factors(attention_factor(config) / implied)


def rope_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return divisors of the rotary frequencies, for scalings that have no GGUF key."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    if scaling.rope_type == "llama3":
        plain = plain_frequencies(config)
        scaled = SCALINGS["llama3"](plain, scaling, config, False)
        return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    if scaling.rope_type == "longrope":
        return {
            "rope_factors_long.weight": np.array(scaling.long_factor, np.float32),
            "rope_factors_short.weight": np.array(scaling.short_factor, np.float32),
        }
    return {}


def tensor_names(config: ModelConfig, own: Architecture) -> Callable[[str], str]:
    """Return a function that maps Hugging Face tensor names to GGUF tensor names."""
    import gguf

    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[own.name], config.num_layers)

    def gguf_name(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"gguf has no name for {name}"
        return found

    return gguf_name


def reordered(
    config: ModelConfig, own: Architecture, name: str, value: np.ndarray, *, back: bool = False
) -> np.ndarray:
    """Reorder the rows of query and key projections to the architecture's rotation order.

    Args:
        name: Hugging Face's name of the tensor. All tensors except these projections are returned
            unchanged.
        back: Whether to reorder from GGUF to Hugging Face instead.
    """
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    number = next((n for part, n in heads.items() if f".{part}." in name), None)
    if number is None or not own.is_interleaved:
        return value
    half = config.head_dim // 2
    shape = (number, half, 2) if back else (number, 2, half)
    return value.reshape(*shape, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
