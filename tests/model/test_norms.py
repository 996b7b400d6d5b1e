import jax.numpy as jnp
import numpy as np
import pytest
import torch

from consyn_jax.model.norms import rms_norm


@pytest.mark.users_compiler
def test_rms_norm_equals_torch() -> None:
    rng = np.random.default_rng(5)
    x, scale = (
        rng.normal(size=(3, 7, 32)).astype(np.float32),
        rng.normal(size=32).astype(np.float32),
    )
    theirs = torch.nn.functional.rms_norm(torch.tensor(x), (32,), torch.tensor(scale), eps=1e-5)
    np.testing.assert_allclose(
        rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), theirs, atol=1e-6
    )
