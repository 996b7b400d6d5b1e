import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.errors import UserError
from consyn_jax.model.parameters import layout
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.resolve import resolve
from consyn_jax.training.optim.groups import decay_mask, describe_groups, parameter_groups
from consyn_jax.training.optim.optimizers import build_optimizer

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
    tie_embeddings=False,
)


def by_path(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def options(**given: Any) -> OptimizerOptions:
    return resolve({"model": "haiku", **given})[0].optimizer


def test_matrices_decay_and_norms_do_not() -> None:
    flat = by_path(decay_mask(layout(CONFIG).logical_axes))
    assert {name for name, decays in flat.items() if not decays} == {
        "norm",
        "layers/attention_norm",
        "layers/mlp_norm",
        "layers/q_norm",
        "layers/k_norm",
    }
    assert {name for name, decays in flat.items() if decays} >= {
        "embedding",
        "output",
        "layers/q",
        "layers/o",
        "layers/down",
    }


def test_biases_do_not_decay() -> None:
    biases = {
        "q": ("layers", "heads", "head_dim"),
        "o": ("layers", "embed"),
        "up": ("layers", "mlp"),
        "head": ("vocab",),
    }
    assert not any(decay_mask(biases).values())


def test_every_parameter_has_a_group() -> None:
    groups = by_path(parameter_groups(layout(CONFIG).logical_axes))
    assert {
        name: groups[name]
        for name in (
            "embedding",
            "output",
            "norm",
            "layers/q",
            "layers/o",
            "layers/down",
            "layers/k_norm",
        )
    } == {
        "embedding": "embedding",
        "output": "head",
        "norm": "norms",
        "layers/q": "attention",
        "layers/o": "attention",
        "layers/down": "mlp",
        "layers/k_norm": "norms",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free_adamw"])
def test_a_multiplier_scales_the_rate_of_its_group(name: str) -> None:
    """A multiplier of 3 moves its group, decay included, as three times the rate does."""
    axes = layout(CONFIG).logical_axes
    rng = np.random.default_rng(0)
    params, g = (
        jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), layout(CONFIG).shapes
        )
        for _ in range(2)
    )

    def update(rate: float, text: str | None) -> dict[str, Any]:
        rule = build_optimizer(options(optimizer=name, lr_multipliers=text), rate, axes)
        return by_path(jax.jit(rule.update)(g, rule.init(params), params)[0])

    once, thrice, some = (
        update(1e-3, None),
        update(3e-3, None),
        update(1e-3, "mlp=3,norms=3,head=0"),
    )
    for path, group in by_path(parameter_groups(axes)).items():
        expected = thrice[path] if group in ("mlp", "norms") else once[path]
        np.testing.assert_allclose(
            some[path], 0 * expected if group == "head" else expected, rtol=2e-3, atol=1e-6
        )


def test_a_multiplier_of_a_group_that_the_model_lacks_is_refused() -> None:
    tied = layout(dataclasses.replace(CONFIG, tie_embeddings=True)).logical_axes
    with pytest.raises(
        UserError,
        match="--lr_multipliers has head, but the model has no such parameters: its output "
        "embedding is the input embedding",
    ):
        build_optimizer(options(lr_multipliers="head=2"), 1e-3, tied)


def test_groups_are_described_with_counts() -> None:
    known = layout(CONFIG)
    text = describe_groups(
        options(optimizer="muon", lr_multipliers="embedding=2"), known.shapes, known.logical_axes
    )
    assert text == (
        "decayed: 9 tensors, 43,008 parameters; not decayed: 5 tensors, 192 parameters; "
        "by muon: 7 tensors, 18,432 parameters; "
        "embedding at 2 x the rate: 1 tensor, 12,288 parameters"
    )
    assert known.num_parameters == 43_008 + 192
