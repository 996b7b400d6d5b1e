import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file

from consyn_jax.config import RegularisationOptions
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.attention import choose_attention
from consyn_jax.model.parameters import Params, initial_parameters, layout, map_axes
from consyn_jax.model.pretrained.config_json import read_config
from consyn_jax.model.pretrained.weights import load_parameters, save_parameters
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import NO_LORA, ModelConfig
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.resolve import resolve
from consyn_jax.training import program as module
from consyn_jax.training.optim.groups import mup_rates
from consyn_jax.training.optim.optimizers import build_optimizer
from consyn_jax.training.program import TRAIN_AXES, Program, build_program
from consyn_jax.training.step import make_train_step, with_dropout

TINY = ModelConfig(
    vocab_size=259,
    hidden_dim=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_dim=64,
    context=64,
    tie_embeddings=False,
)


def mesh_of(**axes: int) -> Mesh:
    return build_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: math.prod(axes.values())])


def adamw(config: ModelConfig, rate: float) -> optax.GradientTransformation:
    """AdamW that decays everything, norms included."""
    matrices = map_axes(lambda _: ("embed", "mlp"), layout(config).logical_axes)
    return build_optimizer(OptimizerOptions(beta2=0.95, weight_decay=0.1), rate, matrices)


def place(
    batch: dict[str, np.ndarray], mesh: Mesh, axes: tuple[str | None, ...]
) -> dict[str, jax.Array]:
    return {name: jax.device_put(values, sharding(mesh, axes)) for name, values in batch.items()}


# ------------------------------------------------------------------- parity with torch, stories260K


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "parity" / "stories260K"


@pytest.fixture(scope="module")
def golden(stories: Path) -> dict[str, np.ndarray]:
    return dict(np.load(stories / "golden.npz"))


@pytest.fixture(scope="module")
def next_tokens(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids = golden["input_ids"]
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "segment_ids": np.ones((4, 127), np.int32),
        "loss_mask": np.ones((4, 127), bool),
    }


def in_torch_names(directory: Path, config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    save_parameters(directory, config, params)
    return load_file(directory / "model.safetensors")


@pytest.mark.users_compiler
def test_logits_and_losses_are_torchs(stories: Path, golden: dict[str, np.ndarray]) -> None:
    logits = ConsynLMHeadModel.from_pretrained(stories / "hf")(jnp.asarray(golden["input_ids"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    nll = -np.take_along_axis(np.asarray(log_probs), golden["input_ids"][:, 1:, None], axis=-1)[
        ..., 0
    ]
    np.testing.assert_allclose(nll, golden["token_nll"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.users_compiler
def test_every_gradient_is_torchs(
    stories: Path, next_tokens: dict[str, np.ndarray], tmp_path: Path
) -> None:
    config = read_config(stories / "hf")
    program = Program(config, Compute(), adamw(config, 1e-3), 1.0, mesh_of(data=1))

    def mean_loss(params: Params) -> jax.Array:
        sums = program.loss(params, jax.tree.map(jnp.asarray, next_tokens))
        return sums.nll / sums.tokens

    found = in_torch_names(
        tmp_path, config, jax.jit(jax.grad(mean_loss))(load_parameters(stories / "hf", config))
    )
    expected = np.load(stories / "grads.npz")
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert np.linalg.norm(gradient - expected[name]) <= 1e-4 * np.linalg.norm(expected[name]), (
            name
        )


@pytest.mark.slow
@pytest.mark.users_compiler
def test_twenty_steps_are_torchs(
    stories: Path, next_tokens: dict[str, np.ndarray], tmp_path: Path
) -> None:
    expected = json.loads((stories / "golden.json").read_text())["adamw"]
    config, mesh = read_config(stories / "hf"), mesh_of(data=1)
    program = Program(config, Compute(), adamw(config, 1e-3), 1.0, mesh)
    state = program.initial_state(load_parameters(stories / "hf", config, mesh))
    step = program.lower_train_step(1, 4, 127).compile()
    batch = place({name: values[None] for name, values in next_tokens.items()}, mesh, TRAIN_AXES)
    losses, norms = [], []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(losses, expected["losses_before_step"], rtol=1e-4)
    np.testing.assert_allclose(norms, expected["grad_norms_preclip"], rtol=1e-4)
    after = {
        name: float(np.linalg.norm(value))
        for name, value in in_torch_names(tmp_path, config, state.params).items()
    }
    assert after == pytest.approx(expected["param_norms_after"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.users_compiler
def test_greedy_text_is_torchs(stories: Path, golden: dict[str, np.ndarray]) -> None:
    ids = golden["greedy_ids"]
    out = ConsynLMHeadModel.from_pretrained(stories / "hf").generate(
        jnp.asarray(ids[None, :1]), len(ids) - 1, stop_at_eos=False
    )
    np.testing.assert_array_equal(out[0], ids)


# ----------------------------------------------------------------------------- one device and eight


@pytest.fixture(scope="module")
def packed() -> dict[str, np.ndarray]:
    """[2, 8, 16]: rows of up to three documents, 0 to 16 real tokens each."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 259, (2, 8, 17)).astype(np.int32)
    at, real = np.arange(16), rng.integers(0, 17, (2, 8, 1))
    cuts = np.sort(rng.integers(1, 16, (2, 8, 2, 1)), axis=2)
    segments = 1 + (at >= cuts[:, :, 0]) + (at >= cuts[:, :, 1])
    mask = at < real
    return {
        "input_ids": ids[..., :-1],
        "labels": ids[..., 1:],
        "segment_ids": np.where(mask, segments, 0).astype(np.int32),
        "loss_mask": mask,
    }


def train(
    mesh: Mesh,
    packed: dict[str, np.ndarray],
    first: Params | None = None,
    remat: str = "none",
    **regularisation: float,
) -> tuple[Params, list[float], Params]:
    """The first parameters (made on the mesh, or given), 20 losses and the last parameters."""
    program = Program(
        TINY,
        Compute(remat=remat),
        adamw(TINY, 3e-3),
        1.0,
        mesh,
        RegularisationOptions(**regularisation),
    )
    made = (
        initial_parameters(TINY, 42, mesh)
        if first is None
        else jax.device_put(first, program.layout.shardings(mesh))
    )
    state = program.initial_state(made)
    first = jax.device_get(state.params)
    step = program.lower_train_step(2, 8, 16).compile()
    batch = place(packed, mesh, TRAIN_AXES)
    losses = []
    for _ in range(20):
        before, (state, metrics) = state, step(state, batch)
        losses.append(float(metrics["loss"]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), (
        "two copies of the state would halve the model that fits"
    )
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, program.state_like
    )
    return first, losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def on_one_device(packed: dict[str, np.ndarray]) -> tuple[Params, list[float], Params]:
    return train(mesh_of(data=1), packed)


OF_EIGHT = [
    dict(zip(AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if math.prod(sizes) == 8
]
IN_CI = [axes for axes in OF_EIGHT if max(axes.values()) == 2]  # three axes at once


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(axes, marks=[] if axes in IN_CI else pytest.mark.exhaustive)
        for axes in OF_EIGHT
    ],
    ids=lambda axes: " ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1),
)
def test_every_mesh_of_eight_trains_like_one_device(
    axes: dict[str, int],
    packed: dict[str, np.ndarray],
    on_one_device: tuple[Params, list[float], Params],
) -> None:
    _, losses, last = train(mesh_of(**axes), packed, on_one_device[0])
    np.testing.assert_allclose(losses, on_one_device[1], rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0], "it learns, so the losses say something"
    for ours, theirs in zip(jax.tree.leaves(last), jax.tree.leaves(on_one_device[2]), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)


@pytest.mark.slow
def test_a_mesh_has_the_initial_values_and_gradients_of_one_device(
    packed: dict[str, np.ndarray],
) -> None:
    def first_and_gradient(mesh: Mesh) -> tuple[Params, Params]:
        program = Program(TINY, Compute(), optax.sgd(1.0), 0.0, mesh)
        state = program.initial_state(initial_parameters(TINY, 42, mesh))
        first = jax.device_get(state.params)
        after, _ = program.lower_train_step(2, 8, 16).compile()(
            state, place(packed, mesh, TRAIN_AXES)
        )
        return first, jax.tree.map(np.subtract, first, jax.device_get(after.params))

    (first, gradient), (expected, one) = (
        first_and_gradient(mesh_of(fsdp=2, context=2, tensor=2)),
        first_and_gradient(mesh_of(data=1)),
    )
    jax.tree.map(np.testing.assert_array_equal, first, expected)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(one), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


REGULARISED = {"dropout": 0.2, "label_smoothing": 0.1, "z_loss": 1e-3}


@pytest.fixture(scope="module")
def regularised(packed: dict[str, np.ndarray]) -> tuple[Params, list[float], Params]:
    return train(mesh_of(data=1), packed, **REGULARISED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "remat"),
    [
        pytest.param({"data": 2}, "none", marks=pytest.mark.exhaustive),
        pytest.param({"fsdp": 4}, "full", marks=pytest.mark.exhaustive),
        pytest.param({"tensor": 2, "context": 2}, "attention", marks=pytest.mark.exhaustive),
        ({"fsdp": 2, "context": 2, "tensor": 2}, "none"),
    ],
    ids=str,
)
def test_dropout_trains_the_same_model_on_every_mesh(
    axes: dict[str, int],
    remat: str,
    packed: dict[str, np.ndarray],
    regularised: tuple[Params, list[float], Params],
) -> None:
    _, losses, last = train(mesh_of(**axes), packed, regularised[0], remat, **REGULARISED)
    np.testing.assert_allclose(losses, regularised[1], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(last), jax.tree.leaves(regularised[2]), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_step_micro_batch_and_seed_has_its_own_dropout(packed: dict[str, np.ndarray]) -> None:
    mesh, same = (
        mesh_of(data=1),
        {name: np.stack([values[0], values[0]]) for name, values in packed.items()},
    )
    program = Program(
        TINY, Compute(), optax.sgd(0.0), 0.0, mesh, RegularisationOptions(dropout=0.5)
    )
    losses, first = set(), program.initial_state(random_params())
    for seed in (0, 1):
        run = jax.jit(with_dropout(make_train_step(program.objective, program.rule, 0.0), seed))
        for step in (0, 1):
            for accumulation in (1, 2):
                taken = {name: jnp.asarray(values[:accumulation]) for name, values in same.items()}
                losses.add(float(run(first._replace(step=jnp.int32(step)), taken)[1]["loss"]))
    assert len(losses) == 8, "a micro-batch that drew as the first would leave the mean as it was"


# ----------------------------------------------------------------- recomputation and unrolled loops


def random_params() -> Params:
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32),
        layout(TINY).shapes,
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_recomputing_and_unrolling_change_nothing(packed: dict[str, np.ndarray]) -> None:
    batch = {name: jnp.asarray(values[0]) for name, values in packed.items()}

    def gradients(**how: Any) -> tuple[jax.Array, Params]:
        program = Program(TINY, Compute(**how), adamw(TINY, 1e-3), 1.0, mesh_of(data=1))
        return jax.jit(jax.value_and_grad(lambda p: program.loss(p, batch).nll))(random_params())

    loss, kept = gradients()
    for how in ({"remat": "attention"}, {"remat": "full"}, {"unroll": True}):
        again, found = gradients(**how)
        assert float(loss) == pytest.approx(float(again), rel=1e-6)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(kept), strict=True):
            assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        ({}, 1),
        ({"on_nonfinite": "skip"}, 10),
        ({"on_nonfinite": "skip", "max_nonfinite_steps": 4}, 4),
    ],
)
def test_the_flags_of_a_run_reach_its_program(
    flags: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, built = Mock(wraps=choose_attention), Mock(wraps=build_optimizer)
    monkeypatch.setattr(module, "choose_attention", chosen)
    monkeypatch.setattr(module, "build_optimizer", built)
    own = {"model": "haiku", "parametrization": "mup", "base_hidden_dim": 64, "dropout": 0.25}
    own |= {"gradient_checkpointing": "full", "max_grad_norm": 0.3, "seed": 5}
    run, _ = resolve(own | flags)
    model, options = replace(TINY, head_dim=16), run.optimizer
    program = build_program(
        *(model, run.budget, run.hardware, options, run.regularisation),
        length=64,
        schedule=optax.constant_schedule(1.0),
        devices=jax.devices(),
    ).program
    chosen.assert_called_once_with("cpu", jnp.float32, 16, "", 0.25)
    given, _, axes, rates = built.call_args.args
    assert (given, axes) == (options, layout(model).logical_axes)
    assert rates == mup_rates(model, options, axes) is not None
    assert (program.max_nonfinite_steps, program.seed, program.max_grad_norm) == (limit, 5, 0.3)
    assert (program.compute.remat, program.host_moments, program.lora) == ("full", False, NO_LORA)
    assert program.regularisation is run.regularisation


def test_the_learning_rate_of_a_logged_step_is_computed_on_the_host() -> None:
    """A device that computes a step would answer only after it."""
    seen: set[jax.Device] = set()

    def schedule(count: Any) -> jax.Array:
        rate = jnp.float32(0.5) * count
        seen.update(rate.devices())
        return rate

    program = Program(TINY, Compute(), adamw(TINY, 0.1), 1.0, mesh_of(fsdp=8), schedule=schedule)
    with jax.default_device(jax.devices()[5]):  # in the place of a GPU
        assert program.learning_rate(3) == 1.5
    assert seen == {jax.local_devices(backend="cpu")[0]}
