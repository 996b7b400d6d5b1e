"""Layers that differ, biases and stretched rotations: in loops, on meshes, in packed rows, cached."""

import json
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.arithmetic import num_parameters, train_flops_per_token
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model.transformer import Block, Compute
from consyn_jax.model_config import FileFormat, ModelConfig, RopeScaling
from consyn_jax.planning.roofline import _attention_flops
from consyn_jax.planning.workload import Workload
from consyn_jax.training.checkpointing.run_state import checked

T = 32
PLAIN = ModelConfig(
    vocab_size=64,
    hidden_dim=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
    qk_norm=False,
    tie_embeddings=False,
)
MIXED = replace(
    PLAIN,
    sliding_window=5,
    window_layers=(True, False, True, False),
    rotary_layers=(True, True, False, True),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
LONG = RopeScaling(
    "longrope",
    original_max_position_embeddings=12,
    short_factor=(1.0, 1.5, 2.0, 2.0),
    long_factor=(1.0, 3.0, 5.0, 6.0),
)
LONGROPE = replace(PLAIN, rope_scaling=LONG)
DYNAMIC = replace(PLAIN, context=12, rope_scaling=RopeScaling("dynamic", factor=4.0))
IDS = np.random.default_rng(0).integers(0, 64, (2, T)).astype(np.int32)
SEGMENTS = np.repeat([[1, 2, 3], [1, 2, 3]], [9, 4, 19], axis=1).astype(np.int32)


def random_params(config: ModelConfig) -> Params:
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
        layout(config).shapes,
    )


@cache
def program(config: ModelConfig, unroll: bool) -> Any:
    def run(params: Params, ids: jax.Array, segments: jax.Array) -> jax.Array:
        model = ConsynLMHeadModel.from_parameters(config, params)
        return model(ids, segments, Compute(unroll=unroll))

    return jax.jit(run)


def logits(
    config: ModelConfig, params: Params, ids: Any, segments: Any, unroll: bool = False
) -> jax.Array:
    return program(config, unroll)(params, jnp.asarray(ids), jnp.asarray(segments))


def alone(config: ModelConfig, params: Params, document: np.ndarray) -> jax.Array:
    """Logits of documents [B, t], with other tokens after them."""
    t = document.shape[1]
    rest = ((0, 0), (0, T - t))
    segments = np.pad(np.ones_like(document), rest)
    return logits(config, params, np.pad(document, rest), segments)[:, :t]


@pytest.mark.parametrize("config", [MIXED, LONGROPE, DYNAMIC], ids=["mixed", "longrope", "dynamic"])
def test_packed_documents_give_the_same_as_each_alone(config: ModelConfig) -> None:
    """Also where rotations depend on the length of the document."""
    params = random_params(config)
    together = logits(config, params, IDS[:1], SEGMENTS[:1])[0]
    for start, end in ((0, 9), (9, 13), (13, 32)):
        expected = alone(config, params, IDS[:1, start:end])[0]
        np.testing.assert_allclose(together[start:end], expected, atol=2e-5)


def test_a_loop_and_unrolled_layers_give_the_same() -> None:
    params = random_params(MIXED)
    loop, unrolled = (logits(MIXED, params, IDS, SEGMENTS, unroll) for unroll in (False, True))
    np.testing.assert_allclose(loop, unrolled, atol=2e-5)
    ablated = logits(replace(MIXED, window_layers=None), params, IDS, SEGMENTS)
    rotated = logits(replace(MIXED, rotary_layers=None), params, IDS, SEGMENTS)
    assert np.abs(loop - ablated).max() > 1e-2
    assert np.abs(loop - rotated).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("config", [MIXED, LONGROPE], ids=["mixed", "longrope"])
def test_a_mesh_changes_neither_logits_nor_gradients(config: ModelConfig) -> None:
    params = random_params(config)

    def loss(params: Params, ids: jax.Array, segments: jax.Array) -> jax.Array:
        model = ConsynLMHeadModel.from_parameters(config, params)
        out = model(ids, segments, Compute(remat="full"))
        return jnp.mean(jnp.square(out))

    grad = jax.value_and_grad(loss)
    alone = jax.jit(grad)(params, jnp.asarray(IDS), jnp.asarray(SEGMENTS))
    mesh = build_mesh({"data": 1, "fsdp": 2, "context": 2, "tensor": 2})
    rows = sharding(mesh, ("batch", "sequence"))
    placed = jax.device_put(params, layout(config).shardings(mesh))
    with jax.set_mesh(mesh):
        spread = jax.jit(grad)(placed, *(jax.device_put(a, rows) for a in (IDS, SEGMENTS)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), alone, spread)


@pytest.mark.slow
@pytest.mark.parametrize("config", [MIXED, LONGROPE], ids=["mixed", "longrope"])
def test_the_cache_gives_the_same_as_the_whole_text(config: ModelConfig) -> None:
    """Longrope's rotations change at 12 tokens: then the cache is made anew."""
    params = random_params(config)
    model = ConsynLMHeadModel.from_parameters(config, params)
    text = IDS[:, :5]
    for _ in range(12):
        text = np.append(text, np.argmax(alone(config, params, text)[:, -1:], -1), 1)
    np.testing.assert_array_equal(model.generate(jnp.asarray(IDS[:, :5]), 12), text)
    start = jnp.asarray(text[:, :13])
    np.testing.assert_array_equal(model.generate(start, 4), text)


@pytest.mark.parametrize("config", [PLAIN, MIXED, replace(PLAIN, qkv_bias=True)])
def test_biases_are_counted_and_begin_at_zero(config: ModelConfig) -> None:
    assert num_parameters(config) == layout(config).num_parameters
    params = nnx.to_pure_dict(nnx.split(Block(config, nnx.Rngs(0)))[1])
    assert all(not params[name].any() for name in params if name.endswith("_bias"))
    without = nnx.to_pure_dict(nnx.split(Block(PLAIN, nnx.Rngs(0)))[1])
    for name, value in without.items():  # the biases draw no random numbers
        np.testing.assert_array_equal(value, params[name])


def test_windows_on_some_layers_are_counted_by_the_layer() -> None:
    every = replace(MIXED, window_layers=None)
    none = replace(every, sliding_window=None)
    flops = [train_flops_per_token(config, T) for config in (none, MIXED, every)]
    assert flops[1] == (flops[0] + flops[2]) / 2
    seen = [
        _attention_flops(Workload(config, dict.fromkeys(AXES, 1), 2, 1, T))
        for config in (none, MIXED, every)
    ]
    assert seen[1] == (seen[0] + seen[2]) / 2


@pytest.mark.parametrize("config", [MIXED, LONGROPE, DYNAMIC, PLAIN])
def test_an_architecture_survives_json(config: ModelConfig) -> None:
    config = replace(config, files=FileFormat("llama", "bfloat16", ("a=float32",), True, "{}"))
    record = json.loads(json.dumps(asdict(config)))
    assert ModelConfig(**record) == config
    assert checked(ModelConfig, record) == config
    with pytest.raises(TypeError):
        checked(ModelConfig, record | {"window_layers": ["yes"] * 4})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 3}, "which sets the window separately for each of its 4 layers"),
        ({"sliding_window": None}, "its size is not set. Give --sliding_window"),
        ({"rotary_fraction": 0.4}, "of the 8 elements of a head"),
        ({"rotary_fraction": 1.5}, "partial_rotary_factor is 1.5, but"),
        ({"rope_scaling": replace(LONG, long_factor=(1.0,))}, "rotates 4 pairs"),
        (
            {"rotary_fraction": 0.25, "rope_scaling": DYNAMIC.rope_scaling},
            "more than 2 rotated elements",
        ),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(MIXED, **changes)
    assert words in str(caught.value)


def test_options_that_are_off_add_no_operations() -> None:
    """The program of a plain model has no comparison, choice or addition for them."""
    config = replace(PLAIN, num_layers=2)

    def operations(config: ModelConfig) -> str:
        params = layout(config).shapes
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return str(
            jax.make_jaxpr(lambda p, ids: ConsynLMHeadModel.from_parameters(config, p)(ids))(
                params, ids
            )
        )

    plain = operations(config)
    assert operations(replace(config, window_layers=(True, True))) == plain
    assert operations(replace(config, files=FileFormat("llama"))) == plain
    assert len(operations(replace(config, rotary_layers=(True, False)))) > len(plain)
