"""One small model for each layout, and random parameters for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from consyn_jax.model.parameters import Params, layout
from consyn_jax.model_config import FileFormat, ModelConfig, RopeScaling

BASE: dict[str, Any] = {
    "vocab_size": 259,  # padded to 384
    "hidden_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,  # heads x head_dim is not hidden_dim
    "mlp_dim": 48,
    "context": 64,
    "rope_theta": 5000.0,
    "norm_eps": 1e-6,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LAYOUTS: dict[str, tuple[ModelConfig, str]] = {
    "llama": (ModelConfig(**BASE, qk_norm=False, tie_embeddings=False), "LlamaForCausalLM"),
    "llama tied": (ModelConfig(**BASE, qk_norm=False, tie_embeddings=True), "LlamaForCausalLM"),
    "qwen3": (ModelConfig(**BASE, qk_norm=True, tie_embeddings=False), "Qwen3ForCausalLM"),
    "qwen3 tied": (ModelConfig(**BASE, qk_norm=True, tie_embeddings=True), "Qwen3ForCausalLM"),
    "qwen3 window": (
        ModelConfig(**BASE, qk_norm=True, tie_embeddings=False, sliding_window=5),
        "Qwen3ForCausalLM",
    ),
    "mistral": (
        ModelConfig(**BASE, qk_norm=False, tie_embeddings=False, sliding_window=5),
        "MistralForCausalLM",
    ),
    "mistral tied": (
        ModelConfig(**BASE, qk_norm=False, tie_embeddings=True, sliding_window=5),
        "MistralForCausalLM",
    ),
    "llama biases": (
        ModelConfig(
            **BASE,
            qk_norm=False,
            tie_embeddings=False,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            rope_scaling=RopeScaling("llama3", 8.0, 16, 1.0, 4.0),
        ),
        "LlamaForCausalLM",
    ),
    "qwen2": (ModelConfig(**BASE, qk_norm=False, qkv_bias=True), "Qwen2ForCausalLM"),
    "qwen2 window": (
        ModelConfig(
            **BASE, qk_norm=False, qkv_bias=True, sliding_window=5, window_layers=(False, True)
        ),
        "Qwen2ForCausalLM",
    ),
    "qwen3 windows": (
        ModelConfig(**BASE, sliding_window=5, window_layers=(True, False)),
        "Qwen3ForCausalLM",
    ),
    "ministral": (
        ModelConfig(**BASE, qk_norm=False, sliding_window=5, window_layers=(True, False)),
        "MinistralForCausalLM",
    ),
    "smollm3": (
        ModelConfig(
            **BASE,
            qk_norm=False,
            rotary_layers=(True, False),
            sliding_window=5,
            window_layers=(False, True),
        ),
        "SmolLM3ForCausalLM",
    ),
    "phi3": (
        ModelConfig(
            **BASE, qk_norm=False, rotary_fraction=0.75, files=FileFormat(model_type="phi3")
        ),
        "Phi3ForCausalLM",
    ),
}


def random_params(config: ModelConfig) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
        layout(config).shapes,
    )
