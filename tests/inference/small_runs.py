"""A tiny run of four steps, as `consyn-train` from Python leaves it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training import ConsynTrainer

SIZES = {"vocab_size": 259, "hidden_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
CONFIG = ModelConfig(
    **SIZES,
    head_dim=8,
    mlp_dim=48,
    context=64,
    qk_norm=False,
    qkv_bias=True,
    sliding_window=9,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=256,
)
ROWS = [[i % 250 for i in range(n, n + 17)] for n in range(16)]
MESH = {"data": 1, "fsdp": 2, "context": 1, "tensor": 2}


def trained(path: Path, **settings: object) -> ConsynLMHeadModel:
    """A run of four steps from Python, and its model."""
    model = ConsynLMHeadModel.from_config(CONFIG)
    trainer = ConsynTrainer(
        model,
        ROWS,
        output_dir=path,
        max_steps=4,
        save_steps=2,
        batch_size=8,
        tokenizer=BPETokenizer.bytes(),
        logging_backend="none",
        quiet=True,
        **settings,
    )
    trainer.train()
    return model


def same(one: Any, other: Any) -> None:
    """But for the rows that pad the vocabulary, of which files know nothing."""
    trimmed = ({**p, "embedding": p["embedding"][:259]} for p in (one, other))
    jax.tree.map(np.testing.assert_array_equal, *trimmed)
