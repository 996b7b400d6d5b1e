"""The model and the data of trials that take a moment."""

import numpy as np

from consyn_jax.model_config import ModelConfig

MODEL = ModelConfig(
    vocab_size=64,
    hidden_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    context=32,
    eos_token_id=0,
)
ROWS = np.random.default_rng(0).integers(1, 64, (64, 16))
