"""Rate and expectation of dropout, and draws that depend on seed and place alone."""

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.attention import causal_attention
from consyn_jax.model.dropout import Dropout, drop_out
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=64,
    context=64,
)
B, T = 8, 16
MESHES = [
    {"data": 2},
    {"fsdp": 4},
    {"tensor": 4},
    {"context": 2},
    {"data": 2, "context": 4},
    {"fsdp": 2, "context": 2, "tensor": 2},
]


def mesh_of(**axes: int) -> Mesh:
    return build_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: math.prod(axes.values())])


@pytest.fixture(scope="module")
def params() -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32),
        layout(CONFIG).shapes,
    )


@pytest.fixture(scope="module")
def ids() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, 64, (B, T)), jnp.int32)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_dropped_share_and_the_mean(rate: float) -> None:
    x = jnp.ones((64, 128, 32))
    out = np.asarray(drop_out(x, Dropout(jax.random.key(0), rate), 0))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / (1 - rate))}
    assert (out == 0).mean() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / out.size))
    assert out.mean() == pytest.approx(1, abs=5 * math.sqrt(rate / (1 - rate) / out.size))
    for axis in range(3):  # no row, column or channel is special
        shares = (out == 0).mean(tuple(a for a in range(3) if a != axis))
        assert np.abs(shares - rate).max() < 6 * math.sqrt(
            rate * (1 - rate) / (out.size / out.shape[axis])
        )


def test_attention_drops_weights_and_not_outputs() -> None:
    """With equal scores and one-hot values the output is the weights: 1/(t+1)/(1-rate) or 0."""
    q, v = jnp.zeros((4, T, 4, T)), jnp.broadcast_to(jnp.eye(T)[None, :, None, :], (4, T, 4, T))
    dropout = Dropout(jax.random.key(3), 0.25)
    run = partial(causal_attention, inside=None, backend="xla", dropout=dropout)
    weights = np.asarray(jax.jit(run)(q, q, v))
    expected = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    kept = weights > 0
    causal = np.broadcast_to((expected > 0)[None, :, None], weights.shape)
    np.testing.assert_allclose(
        weights[kept],
        np.broadcast_to(expected[None, :, None] / 0.75, weights.shape)[kept],
        rtol=1e-6,
    )
    assert not kept[~causal].any()
    assert kept[causal].mean() == pytest.approx(0.75, abs=0.03)
    assert len({kept[b, :, n].tobytes() for b in range(4) for n in range(4)}) == 16, (
        "every row and head draws its own"
    )


def test_places_layers_and_keys_draw_differently() -> None:
    x, key = jnp.ones((2, 8, 8)), jax.random.key(0)
    draws = [
        drop_out(x, Dropout(k, 0.5).at(layer), place)
        for k in (key, jax.random.key(1))
        for layer in range(3)
        for place in range(4)
    ]
    assert len({np.asarray(d).tobytes() for d in draws}) == 24


def hidden(params: Params, ids: jax.Array, compute: Compute, dropout: Dropout | None) -> jax.Array:
    return ConsynLMHeadModel.from_parameters(CONFIG, params).hidden(ids, None, compute, dropout)


def gradients(params: Params, ids: jax.Array, compute: Compute) -> tuple[jax.Array, Params]:
    def loss(p: Params, ids: jax.Array) -> jax.Array:
        return jnp.sum(
            jnp.square(hidden(p, ids, compute, Dropout(jax.random.key(7), 0.3)))
            * jnp.arange(32)
            / 32
        )

    return jax.jit(jax.value_and_grad(loss))(params, ids)


@pytest.fixture(scope="module")
def plain(params: Params, ids: jax.Array) -> tuple[jax.Array, Params]:
    return gradients(params, ids, Compute())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"remat": "attention"}, marks=pytest.mark.slow),
        {"remat": "full"},
        {"unroll": True},
    ],
    ids=str,
)
def test_recomputation_draws_the_same(
    how: dict[str, Any], params: Params, ids: jax.Array, plain: tuple[jax.Array, Params]
) -> None:
    loss, found = gradients(params, ids, Compute(**how))
    assert float(loss) == pytest.approx(float(plain[0]), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain[1]), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


DRAWS = [
    pytest.param(*pair, marks=pytest.mark.exhaustive)
    for pair in zip(MESHES[:-1], itertools.cycle(["none", "full"]))
]
DRAWS += [(MESHES[-1], "none"), (MESHES[-1], "full")]


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "remat"), DRAWS, ids=str)
def test_every_mesh_draws_the_same(
    remat: str,
    axes: dict[str, int],
    params: Params,
    ids: jax.Array,
    plain: tuple[jax.Array, Params],
) -> None:
    mesh = mesh_of(**axes)
    placed = jax.tree.map(jax.device_put, params, layout(CONFIG).shardings(mesh))
    with jax.set_mesh(mesh):
        loss, found = gradients(
            placed, jax.device_put(ids, sharding(mesh, ("batch", "sequence"))), Compute(remat=remat)
        )
    assert float(loss) == pytest.approx(float(plain[0]), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain[1]), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_every_mesh_keeps_the_same_elements(axes: dict[str, int]) -> None:
    drawn = jax.jit(
        lambda key: (
            Dropout(key, 0.5).kept((B, T, 32), ("batch", "sequence", None)),
            Dropout(key, 0.5).kept((B, 4, T, T), ("batch", "heads", "sequence", None)),
        )
    )
    alone = drawn(jax.random.key(5))
    with jax.set_mesh(mesh_of(**axes)):
        there = drawn(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, there, alone)


def test_the_model_itself_has_no_dropout(params: Params, ids: jax.Array) -> None:
    """Inference draws nothing; with a key the hidden states differ."""
    without, with_ = (
        jax.jit(lambda p, dropout=dropout: hidden(p, ids, Compute(), dropout))(params)
        for dropout in (None, Dropout(jax.random.key(0), 0.1))
    )
    assert np.abs(without - with_).max() > 0.01
    traced = str(
        jax.make_jaxpr(lambda p: ConsynLMHeadModel.from_parameters(CONFIG, p)(ids))(params)
    )
    assert "threefry" not in traced
    assert "random_bits" not in traced
