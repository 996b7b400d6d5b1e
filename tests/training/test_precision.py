"""Number types in the traced program, the loss scale, and float16 against float32."""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import Mesh

from consyn_jax.config import RegularisationOptions
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Params, initial_parameters, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.training import precision
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.loss import LossSums
from consyn_jax.training.precision import (
    ScaledState,
    choose_precision,
    make_scaled_train_step,
    with_loss_scale,
)
from consyn_jax.training.program import BATCH_DTYPES, TRAIN_AXES, Program
from consyn_jax.training.step import Batch, TrainState, make_train_step

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
)
A, B, T = 2, 4, 16


def mesh_of(**axes: int) -> Mesh:
    return build_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: math.prod(axes.values())])


def program(dtype: Any, mesh: Mesh | None = None, **regularisation: float) -> Program:
    rule = optax.adamw(3e-3, b2=0.95, weight_decay=0.1)
    return Program(
        CONFIG,
        Compute(dtype),
        rule,
        1.0,
        mesh if mesh is not None else mesh_of(data=1),
        RegularisationOptions(**regularisation),
    )


# -------------------------------------------------------------------------------------- number type


@pytest.mark.parametrize(
    ("wanted", "platform", "capability", "kind", "dtype", "reason"),
    [
        (
            "auto",
            "gpu",
            "9.0",
            "NVIDIA H100",
            jnp.bfloat16,
            "bfloat16 with float32 weights: the NVIDIA H100 multiplies bfloat16 at full rate",
        ),
        (
            "auto",
            "cuda",
            "8.6",
            "RTX 3090",
            jnp.bfloat16,
            "bfloat16 with float32 weights: the RTX 3090 multiplies bfloat16 at full rate",
        ),
        (
            "auto",
            "gpu",
            "10.0",
            "B200",
            jnp.bfloat16,
            "bfloat16 with float32 weights: the B200 multiplies bfloat16 at full rate",
        ),
        (
            "auto",
            "gpu",
            "7.5",
            "T4",
            jnp.float16,
            "float16 with float32 weights: the T4 multiplies float16 faster than float32, and has no "
            "bfloat16",
        ),
        (
            "auto",
            "gpu",
            "6.1",
            "P40",
            jnp.float32,
            "float32: the P40 has compute capability 6.1, and 16-bit types are fast only from 7.0 on",
        ),
        (
            "auto",
            "gpu",
            "",
            "",
            jnp.bfloat16,
            "bfloat16 with float32 weights: the gpu multiplies bfloat16 at full rate",
        ),
        (
            "auto",
            "cpu",
            "",
            "cpu",
            jnp.float32,
            "float32: a CPU gains nothing from 16-bit types",
        ),
        (
            "no",
            "gpu",
            "9.0",
            "H100",
            jnp.float32,
            "float32: as requested; the default for the H100 is bfloat16",
        ),
        (
            "fp16",
            "cpu",
            "",
            "cpu",
            jnp.float16,
            "float16 with float32 weights: as requested; a CPU gains nothing from 16-bit types",
        ),
        (
            "bf16",
            "gpu",
            "9.0",
            "H100",
            jnp.bfloat16,
            "bfloat16 with float32 weights: the H100 multiplies bfloat16 at full rate",
        ),
        (
            "bf16",
            "gpu",
            "7.0",
            "V100",
            jnp.bfloat16,
            "bfloat16 with float32 weights: as requested; the default for the V100 is float16",
        ),
    ],
)
def test_the_type_is_chosen_with_a_reason(
    wanted: str, platform: str, capability: str, kind: str, dtype: Any, reason: str
) -> None:
    choice = choose_precision(wanted, platform, capability, kind)
    assert (choice.dtype, choice.reason) == (dtype, reason)


@pytest.mark.parametrize(
    ("platform", "capability", "kind"),
    [
        ("gpu", "9.0", "NVIDIA H200"),
        ("cuda", "8.9", "RTX 4090"),
        ("gpu", "12.0", "RTX 5090"),
        ("cpu", "", "cpu"),
    ],
)
def test_fp8_is_for_ada_and_later_and_a_cpu_simulates_it(
    platform: str, capability: str, kind: str
) -> None:
    choice = choose_precision("fp8", platform, capability, kind)
    assert (choice.dtype, choice.fp8) == (jnp.bfloat16, True)
    assert choice.reason.startswith(
        "bfloat16 with float32 weights, the matmuls of the blocks in 8 bits: as requested; "
    )


@pytest.mark.parametrize(
    ("platform", "capability"), [("gpu", "8.0"), ("cuda", "7.5"), ("gpu", ""), ("tpu", "")]
)
def test_fp8_on_other_devices_is_refused(platform: str, capability: str) -> None:
    with pytest.raises(
        UserError,
        match=r"--mixed_precision fp8 needs an NVIDIA GPU of compute capability 8\.9 or later",
    ):
        choose_precision("fp8", platform, capability, "some device")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_logits_may_be_bfloat16_where_the_head_is(precision: str) -> None:
    narrow = choose_precision(precision, "gpu", "9.0", "H100", "bfloat16")
    wide = choose_precision(precision, "gpu", "9.0", "H100")
    assert (wide.logits, narrow.logits) == (jnp.float32, jnp.bfloat16)
    assert narrow.reason == f"{wide.reason}; logits in bfloat16, too"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", "float32"), ("fp16", "float16"), ("auto", "float32")]
)
def test_logits_in_bfloat16_need_matmuls_in_bfloat16(precision: str, dtype: str) -> None:
    with pytest.raises(UserError, match=f"--logits_dtype bfloat16 .* computes in {dtype}. Use"):
        choose_precision(precision, "cpu", logits="bfloat16")


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a traced program and of its inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(p: Program) -> Any:
    make = make_scaled_train_step if p.compute.dtype == jnp.float16 else make_train_step
    batch = {name: jax.ShapeDtypeStruct((A, B, T), dtype) for name, dtype in BATCH_DTYPES.items()}
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, p.layout.shapes, jax.eval_shape(p.rule.init, p.layout.shapes), count)
    return jax.make_jaxpr(make(p.objective, p.rule, 1.0))(state, batch)


NARROW = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
SUMS = (
    "reduce_sum",
    "cumsum",
    "scatter-add",
    "scatter_add",
    "psum",
    "psum_invariant",
    "reduce_scatter",
)
CURVES = (
    "exp",
    "exp2",
    "log",
    "log1p",
    "rsqrt",
    "sqrt",
    "integer_pow",
    "square",
    "sin",
    "cos",
    "reduce_max",
    "argmax",
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "extras", [{}, {"label_smoothing": 0.1, "z_loss": 1e-4}], ids=["plain", "extras"]
)
def test_sums_norms_softmax_and_loss_are_float32(dtype: Any, extras: dict[str, float]) -> None:
    closed = traced(program(dtype, **extras))
    found = list(equations(closed.jaxpr))
    seen = {e.primitive.name for e in found}
    assert {"reduce_sum", "exp", "log", "rsqrt", "scatter-add", "dot_general"} <= seen, (
        "names of primitives have changed"
    )
    for e in found:
        if e.primitive.name in SUMS + CURVES:
            assert not [
                v for v in [*e.invars, *e.outvars] if getattr(v.aval, "dtype", None) in NARROW
            ], e
    products = [e for e in found if e.primitive.name == "dot_general"]
    assert all(any(v.aval.dtype == dtype for v in e.invars) for e in products), (
        "no product is of float32 alone"
    )
    # logits, the gradients of the head and of all weights; the scores of attention
    into_float32 = [e for e in products if e.outvars[0].aval.dtype == jnp.float32]
    shapes = {v.aval.shape for e in into_float32 for v in e.outvars}
    rows = CONFIG.padded_vocab_size
    assert {
        (B * T, rows),
        (rows, CONFIG.hidden_dim),
        (CONFIG.hidden_dim, CONFIG.mlp_dim),
        (CONFIG.mlp_dim, CONFIG.hidden_dim),
    } <= shapes
    assert any(len(shape) == 5 and shape.count(T) == 2 for shape in shapes)
    assert {leaf.dtype for leaf in closed.out_avals} == {
        jnp.dtype(jnp.float32),
        jnp.dtype(jnp.int32),
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_float16_has_a_loss_scale(dtype: Any) -> None:
    with_scale = {e.primitive.name for e in equations(traced(program(jnp.float16)).jaxpr)}
    without = {e.primitive.name for e in equations(traced(program(dtype)).jaxpr)}
    assert "is_finite" in with_scale
    assert "is_finite" not in without
    assert not isinstance(program(dtype).state_like.opt_state, ScaledState)


def test_without_dropout_no_random_number_is_drawn() -> None:
    drawing = {"random_bits", "random_fold_in", "threefry2x32", "random_seed", "random_wrap"}
    assert not drawing & {e.primitive.name for e in equations(traced(program(jnp.float32)).jaxpr)}


# --------------------------------------------------------------------------------------- loss scale


@pytest.mark.users_compiler
def test_the_scale_changes_like_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    rule = with_loss_scale(optax.sgd(1.0))
    params = {"w": jnp.zeros(2)}
    state: Any = rule.init(params)
    scale, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    rng = np.random.default_rng(0)
    for bad in rng.random(200) < 0.3:
        gradients = {"w": jnp.array([1.0, np.inf if bad else 2.0])}
        _, state = rule.update(gradients, state, params)
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(bad)), 2.0, 0.5, 3)
        scale.clamp_(min=1.0)  # our floor
        assert (float(state.scale), int(state.good_steps)) == (scale.item(), tracker.item())
    assert 1 <= float(state.scale) < 2.0**16


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_non_finite_gradient_changes_only_the_scale(bad: float) -> None:
    rule = with_loss_scale(
        optax.chain(
            optax.scale_by_adam(), optax.scale_by_schedule(lambda count: -0.1 * (count + 1))
        )
    )
    params = {"a": jnp.arange(3.0), "b": jnp.ones(2)}
    _, before = rule.update({"a": jnp.ones(3), "b": jnp.ones(2)}, rule.init(params), params)
    updates, after = rule.update({"a": jnp.ones(3), "b": jnp.array([1.0, bad])}, before, params)
    jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(params, updates), params)
    was, now = (ScaledState(*s) for s in (before, after))  # type: ignore[misc]
    jax.tree.map(np.testing.assert_array_equal, now.optimizer, was.optimizer)
    assert (float(now.scale), int(now.good_steps), int(now.skipped_steps)) == (2.0**15, 0, 1)
    assert (float(was.scale), int(was.good_steps), int(was.skipped_steps)) == (2.0**16, 1, 0)


def test_the_constants_are_torchs() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert scaler.get_growth_interval() == precision.GROWTH_STEPS
    state: Any = with_loss_scale(optax.sgd(1.0)).init({"w": jnp.zeros(1)})
    assert float(state.scale) == scaler._init_scale


def test_the_scale_has_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GROWTH_STEPS", 1)
    rule, params = with_loss_scale(optax.sgd(1.0)), {"w": jnp.zeros(1)}
    state: Any = rule.init(params)._replace(scale=jnp.float32(2.0**63))  # type: ignore[attr-defined]
    for _ in range(3):
        _, state = rule.update({"w": jnp.ones(1)}, state, params)
        assert (float(state.scale), int(state.good_steps)) == (2.0**64, 0)


def test_the_scale_has_a_floor() -> None:
    rule = with_loss_scale(optax.sgd(1.0))
    state: Any = rule.init({"w": jnp.zeros(1)})
    for _ in range(20):
        _, state = rule.update({"w": jnp.array([np.nan])}, state, {"w": jnp.zeros(1)})
    assert (float(state.scale), int(state.skipped_steps)) == (1.0, 20)


def test_scaling_alone_changes_no_gradient() -> None:
    """In float32 the scaled step is the plain step, also with micro-batches."""

    def objective(params: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
        nll = jnp.sum(jnp.square(params["x"] - batch["labels"]) * batch["loss_mask"])
        return nll, LossSums(nll, jnp.sum(batch["loss_mask"], dtype=jnp.float32), jnp.float32(0))

    params, batch = (
        {"x": jnp.float32(2.5)},
        {
            "labels": jnp.array([[[1, 2, 3]], [[4, 5, 6]]]),
            "loss_mask": jnp.array([[[True, True, False]], [[True] * 3]]),
        },
    )
    rule = with_loss_scale(optax.sgd(0.1))
    scaled, more = make_scaled_train_step(objective, rule, 1.5)(
        TrainState(jnp.int32(0), params, rule.init(params), jnp.int32(0)), batch
    )
    plain, metrics = make_train_step(objective, optax.sgd(0.1), 1.5)(
        TrainState(jnp.int32(0), params, optax.sgd(0.1).init(params), jnp.int32(0)), batch
    )
    assert float(scaled.params["x"]) == pytest.approx(float(plain.params["x"]), rel=1e-6)
    assert {name: float(more[name]) for name in metrics} == pytest.approx(
        {name: float(value) for name, value in metrics.items()}, rel=1e-6
    )
    assert {name: float(more[name]) for name in ("loss_scale", "skipped", "skipped_steps")} == {
        "loss_scale": 2.0**16,
        "skipped": 0,
        "skipped_steps": 0,
    }


def test_the_scale_is_that_of_the_mean() -> None:
    """With 100 tokens the backward pass starts at 2**16 / 100, which float16 holds."""

    def objective(params: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
        nll = params["x"].astype(jnp.float16).astype(jnp.float32)
        return nll, LossSums(nll, jnp.sum(batch["loss_mask"], dtype=jnp.float32), jnp.float32(0))

    params, rule = {"x": jnp.float32(2.5)}, with_loss_scale(optax.sgd(1.0))
    ones = jnp.ones((1, 10, 10), bool)
    batch = {"loss_mask": ones, "labels": ones.astype(jnp.int32)}
    after, metrics = make_scaled_train_step(objective, rule, 0.0)(
        TrainState(jnp.int32(0), params, rule.init(params), jnp.int32(0)), batch
    )
    assert (float(metrics["loss_scale"]), int(metrics["skipped"])) == (2.0**16, 0)
    assert float(after.params["x"]) == pytest.approx(2.5 - 1 / 100, rel=1e-3)


# ----------------------------------------------------------------------- whole steps of the decoder


def learnable(rng: np.random.Generator, mesh: Mesh) -> dict[str, jax.Array]:
    """Counting modulo 40 in steps of 1 or 2, with one wrong number in ten and ragged ends."""
    ids = (rng.integers(0, 40, (A, B, 1)) + rng.integers(1, 3, (A, B, 1)) * np.arange(T + 1)) % 40
    ids = np.where(rng.random(ids.shape) < 0.1, rng.integers(0, 40, ids.shape), ids)
    mask = np.arange(T) < rng.integers(T // 2, T + 1, (A, B, 1))
    batch = {
        "input_ids": ids[..., :-1].astype(np.int32),
        "labels": ids[..., 1:].astype(np.int32),
        "segment_ids": mask.astype(np.int32),
        "loss_mask": mask,
    }
    return {
        name: jax.device_put(values, sharding(mesh, TRAIN_AXES)) for name, values in batch.items()
    }


STEPS = 200


@cache
def first_values(seed: int) -> Params:
    return jax.device_get(initial_parameters(CONFIG, seed))


def first_state(p: Program, seed: int) -> TrainState:
    return p.initial_state(jax.device_put(first_values(seed), p.layout.shardings(p.mesh)))


@cache
def train_step(dtype: Any, mesh: Mesh) -> tuple[Program, Any]:
    p = program(dtype, mesh)
    return p, p.lower_train_step(A, B, T).compile()


def train(
    dtype: Any,
    steps: int,
    seed: int,
    first_scale: float | None = None,
    mesh: Mesh | None = None,
    without: tuple[int, ...] = (),
) -> tuple[TrainState, list[dict[str, float]]]:
    """State and metrics after `steps` batches without those in `without`."""
    p, step = train_step(dtype, mesh if mesh is not None else mesh_of(data=1))
    state = first_state(p, seed)
    if first_scale is not None:
        where = state.opt_state.scale.sharding  # type: ignore[union-attr]
        state = state._replace(
            opt_state=state.opt_state._replace(
                scale=jax.device_put(jnp.float32(first_scale), where)
            )
        )  # type: ignore[union-attr]
    rng, history = np.random.default_rng(seed), []
    for number in range(steps):
        batch = learnable(rng, p.mesh)
        if number in without:
            continue
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in jax.device_get(metrics).items()})
    return state, history


@pytest.fixture(scope="module")
def in_float32() -> list[dict[str, float]]:
    return train(jnp.float32, STEPS, 0)[1]


def end(history: list[dict[str, float]]) -> float:
    return float(np.mean([m["loss"] for m in history[-20:]]))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_type_reaches_the_loss_of_float32(
    dtype: Any, in_float32: list[dict[str, float]]
) -> None:
    history = train(dtype, STEPS, 0)[1]
    assert end(in_float32) < 0.4 * in_float32[0]["loss"], "it learns, so the losses say something"
    assert end(history) == pytest.approx(end(in_float32), rel=0.01)
    assert ("loss_scale" in history[0]) == (dtype == jnp.float16)
    if dtype == jnp.float16:
        assert history[-1]["skipped_steps"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        {"data": 1},
        pytest.param({"fsdp": 2, "context": 2, "tensor": 2}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_float16_recovers_from_an_overflow(axes: dict[str, int]) -> None:
    state, history = train(jnp.float16, STEPS, 0, first_scale=2.0**34, mesh=mesh_of(**axes))
    skipped = [m["skipped"] for m in history]
    number = int(sum(skipped))
    assert 5 <= number <= 20
    assert sum(skipped[:10]) == 10, "nearly all at the start"
    assert sum(skipped[STEPS // 2 :]) == 0
    for i, m in enumerate(m for m in history if m["skipped"]):
        assert m["loss_scale"] == 2.0 ** (34 - i)
        assert not math.isfinite(m["grad_norm"])
        assert math.isfinite(m["loss"])
        assert m["clipped"] == 0
    opt_state: Any = state.opt_state
    assert (int(state.step), int(opt_state.skipped_steps)) == (STEPS, number)
    assert (
        int(
            optax.tree_utils.tree_get(
                opt_state, "count", filtering=lambda path, _: "ScaleByAdamState" in str(path)
            )
        )
        == STEPS - number
    )
    assert float(opt_state.scale) == 2.0 ** (34 - number)
    assert int(opt_state.good_steps) == skipped[::-1].index(1)
    assert [m["skipped_steps"] for m in history] == np.cumsum(skipped).tolist()
    # the batches of the skipped steps are lost, and nothing else
    without = tuple(i for i, m in enumerate(history) if m["skipped"])
    assert end(history) == pytest.approx(
        end(train(jnp.float32, STEPS, 0, without=without)[1]), rel=0.01
    )


@pytest.mark.slow
def test_a_skipped_step_changes_no_bit() -> None:
    p, step = train_step(jnp.float16, mesh_of(data=1))
    state = first_state(p, 0)
    state, _ = step(state, learnable(np.random.default_rng(0), p.mesh))
    state = state._replace(
        opt_state=state.opt_state._replace(
            scale=jax.device_put(jnp.float32(2.0**60), state.opt_state.scale.sharding)
        )
    )
    before = jax.device_get(state)
    after, metrics = step(state, learnable(np.random.default_rng(1), p.mesh))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.params), before.params)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(after.opt_state.optimizer),
        before.opt_state.optimizer,
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_checkpoint_keeps_the_scale(tmp_path: Path) -> None:
    mesh = mesh_of(fsdp=2)
    state, _ = train(jnp.float16, 6, 0, first_scale=2.0**40, mesh=mesh)
    saved: Any = jax.device_get(state)
    assert int(saved.opt_state.skipped_steps) == 6
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(6, state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(6, program(jnp.float16, mesh_of(tensor=2)).state_like)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), saved)
    assert float(restored.opt_state.scale) == 2.0**34  # type: ignore[union-attr]


def test_moments_are_placed_with_their_parameters_in_float16() -> None:
    like: Any = program(jnp.float16, mesh_of(fsdp=2, tensor=2)).state_like
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    assert (
        places.opt_state.optimizer[0].mu
        == places.params
        == layout(CONFIG).shardings(mesh_of(fsdp=2, tensor=2))
    )
