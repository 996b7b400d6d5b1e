import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.parameters import Params, initial_parameters, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import OPTIMIZERS, OptimizerOptions
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.optim.optimizers import build_optimizer
from consyn_jax.training.optim.state import RateScale, place_state, with_rate_scale
from consyn_jax.training.program import TRAIN_AXES, Program

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


def mesh_of(**axes: int) -> Mesh:
    return build_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: math.prod(axes.values())])


def batch(mesh: Mesh) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 259, (1, 8, 17)).astype(np.int32)
    parts = {
        "input_ids": ids[..., :-1],
        "labels": ids[..., 1:],
        "segment_ids": np.ones((1, 8, 16), np.int32),
        "loss_mask": np.ones((1, 8, 16), bool),
    }
    return {
        name: jax.device_put(values, sharding(mesh, TRAIN_AXES)) for name, values in parts.items()
    }


@pytest.fixture(scope="module")
def first_values() -> Params:
    return jax.device_get(initial_parameters(CONFIG, 42))


def on(mesh: Mesh, params: Params) -> Params:
    return jax.device_put(params, layout(CONFIG).shardings(mesh))


def program_of(name: str, mesh: Mesh, **given: Any) -> Program:
    chosen = resolve(
        {"model": "haiku", "optimizer": name, "lr": 1e-3, "lr_multipliers": "head=2", **given}
    )[0].optimizer
    return Program(
        CONFIG,
        Compute(),
        build_optimizer(chosen, 1e-3, layout(CONFIG).logical_axes),
        1.0,
        mesh,
    )


def distance(found: Any, expected: Any) -> float:
    return math.sqrt(
        sum(
            float(np.sum((np.asarray(a) - np.asarray(b)) ** 2))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        )
    )


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (
            jax.tree_util.keystr(path),
            np.linalg.norm(a - b) / np.linalg.norm(b),
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "adamw" else pytest.mark.exhaustive)
        for name in OPTIMIZERS
    ],
)
def test_a_mesh_trains_as_one_device_and_its_checkpoint_continues_on_another(
    name: str, first_values: Params, tmp_path: Path
) -> None:
    given = (
        {"moment_dtype": "bfloat16"}
        if name in ("adamw", "muon")
        else {"momentum": 0.5}
        if name == "adafactor"
        else {}
    )
    results = {}
    for mesh in (mesh_of(data=1), mesh_of(fsdp=2, tensor=2)):
        program = program_of(name, mesh, **given)
        state = program.initial_state(on(mesh, first_values))
        step = program.lower_train_step(1, 8, 16).compile()
        for _ in range(2):
            state, metrics = step(state, batch(mesh))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
            lambda leaf: leaf.sharding, program.state_like
        )
        results[mesh.size] = program, step, state, float(metrics["loss"])
    one, four = results[1], results[4]
    assert one[3] == pytest.approx(four[3], rel=1e-5)
    # The sign of a number near 0, which is Lion's update, depends on rounding.
    assert_close(four[2].params, one[2].params, 5e-3 if name == "lion" else 1e-3)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, four[2], {"step": 2})
    checkpoints.wait()
    there, _ = checkpoints.restore(2, four[0].state_like)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(there), jax.device_get(four[2]))
    other, _ = checkpoints.restore(2, one[0].state_like)
    assert jax.tree.structure(other) == jax.tree.structure(one[2])
    _, again = four[1](there, batch(four[0].mesh))
    _, elsewhere = one[1](other, batch(one[0].mesh))
    assert float(elsewhere["loss"]) == pytest.approx(float(again["loss"]), rel=1e-5)
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"fsdp": 2, "context": 2, "tensor": 2}],
    ids=str,
)
def test_moments_are_placed_with_their_parameters(name: str, axes: dict[str, int]) -> None:
    program = program_of(
        name, mesh_of(**axes), **({"momentum": 0.5} if name == "adafactor" else {})
    )
    program.lower_train_step(2, 8, 16)
    where = {
        "/".join(path.split("/")[-2:]): leaf
        for path, leaf in by_path(program.state_like.params).items()
    }
    moments = {
        path: leaf
        for path, leaf in by_path(program.state_like.opt_state).items()
        if path.endswith(("layers/q", "layers/down", "/embedding"))
    }
    assert moments or name == "sgd"
    for path, leaf in moments.items():
        own = where["/".join(path.split("/")[-2:])] if "layers" in path else where["embedding"]
        factors = any(part in path for part in ("v_row", "v_col", "/v/"))
        assert leaf.sharding == (
            own.sharding if leaf.shape == own.shape else sharding(program.mesh, ())
        ), path
        assert (leaf.shape == own.shape) != factors, path


def test_parameters_whose_paths_end_alike_are_told_apart() -> None:
    mesh = mesh_of(fsdp=2)
    shapes = {
        "norm": jax.ShapeDtypeStruct((8,), jnp.float32),
        "layers": {"norm": jax.ShapeDtypeStruct((8,), jnp.float32)},
    }
    places = {"norm": sharding(mesh, ("embed",)), "layers": {"norm": sharding(mesh, ("norm",))}}
    placed = by_path(
        place_state(
            optax.scale_by_lion().init(jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)),
            shapes,
            places,
            sharding(mesh, ()),
        )
    )
    assert placed["mu/norm"].sharding == places["norm"]
    assert placed["mu/layers/norm"].sharding == places["layers"]["norm"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_new_scale_of_the_rate_needs_no_new_program(first_values: Params) -> None:
    mesh = mesh_of(fsdp=2)
    program = program_of("adamw", mesh, scheduler="plateau", weight_decay=0.0)
    assert isinstance(program.state_like.opt_state[-1], RateScale)
    step = program.lower_train_step(1, 8, 16).compile()
    moved = {}
    for scale in (1.0, 0.25, 0.0):
        state = program.initial_state(on(mesh, first_values))
        state = state._replace(opt_state=with_rate_scale(state.opt_state, scale))
        state, _ = step(state, batch(mesh))
        assert float(state.opt_state[-1].scale) == scale
        moved[scale] = distance(state.params, first_values)
    assert moved[0.25] == pytest.approx(0.25 * moved[1.0], rel=1e-3)
    assert moved[0.0] == 0
    plain = program_of("adamw", mesh).state_like.opt_state
    assert with_rate_scale(plain, 0.5) == plain


def test_a_plateau_scales_every_update() -> None:
    params, axes = {"x": jnp.ones((4, 8))}, {"x": ("embed", "mlp")}
    given = {"beta2": 0.95, "weight_decay": 0.1}
    plateau = build_optimizer(OptimizerOptions(scheduler="plateau", **given), 0.1, axes)
    whole, _ = plateau.update(params, plateau.init(params), params)
    scaled, _ = plateau.update(params, with_rate_scale(plateau.init(params), 0.25), params)
    np.testing.assert_allclose(scaled["x"], 0.25 * whole["x"])
    plain = build_optimizer(OptimizerOptions(**given), 0.1, axes)
    np.testing.assert_array_equal(
        whole["x"], plain.update(params, plain.init(params), params)[0]["x"]
    )
