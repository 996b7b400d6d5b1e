import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from consyn_jax.model.rope import apply_rope, rope_table

T = 16


@pytest.mark.users_compiler
def test_the_rotation_equals_transformers() -> None:
    x = np.random.default_rng(6).normal(size=(1, T, 2, 8)).astype(np.float32)
    positions = np.arange(T)[None] + 100
    angles = positions[..., None] * 500.0 ** (-np.arange(0, 8, 2) / 8)
    cos, sin = (
        torch.tensor(np.concatenate([f(angles)] * 2, -1), dtype=torch.float32)
        for f in (np.cos, np.sin)
    )
    theirs, _ = apply_rotary_pos_emb(
        torch.tensor(x).transpose(1, 2), torch.tensor(x).transpose(1, 2), cos, sin
    )
    ours = apply_rope(jnp.asarray(x), rope_table(jnp.asarray(positions), 100 + T, 8, 500.0))
    np.testing.assert_allclose(ours, theirs.transpose(1, 2), atol=2e-5)
