import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.model.parameters import Params, forward_order, initial_parameters, layout, map_axes
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import preset_architecture

TINY = ModelConfig(
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


@pytest.mark.parametrize(
    ("name", "exact", "low", "high"),
    [
        ("haiku", 7_144_832, 7e6, 7.3e6),
        ("verse", 122_704_128, 120e6, 130e6),
        ("stanza", 1_333_895_168, 1.2e9, 1.4e9),
        ("epic", 13_086_653_440, 12.8e9, 13.4e9),
    ],
)
def test_parameters_of_the_presets_are_counted_without_allocating(
    name: str, exact: int, low: float, high: float
) -> None:
    before = len(jax.live_arrays())
    form = layout(preset_architecture(name))
    assert form.num_parameters == exact
    assert low <= exact <= high
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(form.shapes))
    assert len(jax.live_arrays()) <= before


def test_every_parameter_has_a_logical_axis_for_each_dimension() -> None:
    form = layout(TINY)
    assert map_axes(len, form.logical_axes) == jax.tree.map(lambda leaf: leaf.ndim, form.shapes)
    assert form.logical_axes["layers"]["q"] == ("layers", "embed", "heads", "head_dim")
    where = form.shardings(build_mesh({"data": 1, "fsdp": 2, "context": 1, "tensor": 4}))
    assert where["layers"]["down"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert where["embedding"].spec == PartitionSpec("tensor", "fsdp")


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"qk_norm": False}])
def test_the_forward_order_names_every_parameter_once(options: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **options)
    order, shapes = forward_order(config), layout(config).shapes
    assert sorted(order) == sorted(shapes)
    assert sorted(order["layers"]) == sorted(shapes["layers"])
    assert list(order)[:3] == ["embedding", "layers", "norm"]
    norms = ("q_norm", "k_norm") if config.qk_norm else ()
    attention = ("attention_norm", "q", "k", "v", *norms, "o")
    assert order["layers"] == (*attention, "mlp_norm", "gate", "up", "down")


@pytest.fixture(scope="module")
def params() -> Params:
    return initial_parameters(TINY, seed=0)


def test_initial_values_have_their_scales_and_layers_differ(params: Params) -> None:
    layers = params["layers"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert not params["output"].any(), "the untrained model predicts the uniform distribution"
    np.testing.assert_array_equal(layers["attention_norm"], np.ones((2, 32)))
    assert float(jnp.std(params["embedding"])) == pytest.approx(1.0, rel=0.05), (
        "it would be 0.02 if tied"
    )
    assert float(jnp.std(layers["gate"])) == pytest.approx(32**-0.5, rel=0.05)
    assert float(jnp.std(layers["down"])) == pytest.approx((64 * 4) ** -0.5, rel=0.05)
    assert (layers["q"][0] != layers["q"][1]).any()
    assert (layers["gate"] != layers["up"]).any()


def test_another_seed_gives_other_values(params: Params) -> None:
    other = initial_parameters(TINY, seed=1)
    assert (params["layers"]["q"] != other["layers"]["q"]).mean() > 0.99
    assert (params["embedding"] != other["embedding"]).mean() > 0.99
