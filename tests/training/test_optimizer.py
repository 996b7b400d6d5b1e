import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from consyn_jax.config import ModelConfig
from consyn_jax.model.parameters import layout
from consyn_jax.training.optimizer import build_optimizer, decay_mask

CONFIG = ModelConfig(vocab_size=259, hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, context=64, tie_embeddings=False)


def test_matrices_decay_and_norms_do_not() -> None:
    mask = decay_mask(layout(CONFIG).logical_axes)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): decays for path, decays in jax.tree_util.tree_leaves_with_path(mask)}
    assert {name for name, decays in flat.items() if not decays} == {
        "norm",
        "layers/attention_norm",
        "layers/mlp_norm",
        "layers/q_norm",
        "layers/k_norm",
    }
    assert {name for name, decays in flat.items() if decays} >= {"embedding", "output", "layers/q", "layers/o", "layers/down"}


def test_adamw_is_torchs() -> None:
    rng = np.random.default_rng(0)
    first = {"matrix": rng.normal(size=(8, 5)).astype(np.float32), "norm": rng.normal(size=5).astype(np.float32)}
    gradients = [{k: (rng.normal(size=v.shape) * 10.0 ** rng.integers(-3, 2)).astype(np.float32) for k, v in first.items()} for _ in range(30)]
    rates = [1e-2 * (i + 1) / 30 for i in range(30)]

    theirs = {k: torch.tensor(v, requires_grad=True) for k, v in first.items()}
    groups = [{"params": [theirs["matrix"]], "weight_decay": 0.3}, {"params": [theirs["norm"]], "weight_decay": 0.0}]
    rule = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for rate, g in zip(rates, gradients, strict=True):
        for group in rule.param_groups:
            group["lr"] = rate
        for k, v in g.items():
            theirs[k].grad = torch.tensor(v)
        rule.step()

    table = jnp.array(rates)
    ours = build_optimizer("adamw", lambda s: table[s], beta1=0.9, beta2=0.95, weight_decay=0.3, mask={"matrix": True, "norm": False})
    params = jax.tree.map(jnp.asarray, first)
    state = ours.init(params)
    for g in gradients:
        updates, state = ours.update(g, state, params)
        params = optax.apply_updates(params, updates)
    for k in first:
        np.testing.assert_allclose(params[k], theirs[k].detach(), rtol=1e-5, atol=1e-6)


def test_another_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'sgd' is not known"):
        build_optimizer("sgd", 1e-3, beta1=0.9, beta2=0.95, weight_decay=0.0, mask=True)
