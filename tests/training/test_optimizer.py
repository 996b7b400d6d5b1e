import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import Mesh

from consyn_jax.config import MOMENTUM, OPTIMIZERS, ModelConfig, OptimizerOptions, UserError
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.parameters import Params, initial_parameters, layout
from consyn_jax.model.pretrained import load_parameters, read_config
from consyn_jax.model.transformer import Compute
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpoint import Checkpoints
from consyn_jax.training.optimizer import (
    RateScale,
    build_optimizer,
    configured_optimizer,
    decay_mask,
    describe_groups,
    evaluation_params,
    lr_warning,
    parameter_groups,
    place_state,
    round_at_random,
    with_rate_scale,
)
from consyn_jax.training.program import TRAIN_AXES, Program

CONFIG = ModelConfig(vocab_size=259, hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, context=64, tie_embeddings=False)
STEPS = 20
RATES = [1e-3 * min(1, (s + 1) / 5) for s in range(STEPS)]
DECAY = 0.1
Weights = dict[str, np.ndarray]  # one entry for every matrix [inputs, outputs] and vector of every layer


def by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_matrices_decay_and_norms_do_not() -> None:
    flat = by_path(decay_mask(layout(CONFIG).logical_axes))
    assert {name for name, decays in flat.items() if not decays} == {
        "norm",
        "layers/attention_norm",
        "layers/mlp_norm",
        "layers/q_norm",
        "layers/k_norm",
    }
    assert {name for name, decays in flat.items() if decays} >= {"embedding", "output", "layers/q", "layers/o", "layers/down"}


def test_biases_do_not_decay() -> None:
    biases = {"q": ("layers", "heads", "head_dim"), "o": ("layers", "embed"), "up": ("layers", "mlp"), "head": ("vocab",)}
    assert not any(decay_mask(biases).values())


# --------------------------------------------------------------------------- each rule on trained weights, against another's formulas


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Params, list[Params], Any]:
    """The weights of stories260K, 20 real gradients at them (of single rows, so that they differ), and the axes."""
    directory = shared_data / "parity" / "stories260K"
    config = read_config(directory / "hf")
    params = load_parameters(directory / "hf", config)
    program = Program(config, Compute(), optax.sgd(1.0), 0.0, mesh_of(data=1))
    ids = np.load(directory / "golden.npz")["input_ids"]

    @jax.jit
    def gradient(row: jax.Array) -> Params:
        part = {"input_ids": row[:, :-1], "labels": row[:, 1:], "segment_ids": jnp.ones((1, 31), jnp.int32), "loss_mask": jnp.ones((1, 31), bool)}
        return jax.grad(lambda p: program.loss(p, part).nll / 31)(params)

    rows = ids[:, :128].reshape(-1, 32)
    return params, [gradient(jnp.asarray(rows[s % len(rows)][None])) for s in range(STEPS)], layout(config).logical_axes


def split(tree: Params) -> Weights:
    """Every layer's weights by themselves, as matrices [inputs, outputs]."""
    found = {}
    for name, value in by_path(tree).items():
        value = np.asarray(value, np.float64)
        if not name.startswith("layers/"):
            found[name] = value
            continue
        for i, own in enumerate(value):
            width = own.shape[-1] if name == "layers/o" else own.shape[0]
            found[f"{name}/{i}"] = own if own.ndim < 3 else own.reshape(-1, width) if name == "layers/o" else own.reshape(width, -1)
    return found


def ours(name: str, stories: tuple[Params, list[Params], Any], faster: float = 1.0, **settings: Any) -> tuple[Params, Params]:
    """What 20 steps make of the parameters, and of those that are evaluated."""
    params, gradients, axes = stories
    table = faster * jnp.array(RATES)
    rule = build_optimizer(
        name, lambda s: table[s], **{"beta1": 0.9, "beta2": 0.95, "weight_decay": DECAY, "mask": decay_mask(axes), "logical_axes": axes} | settings
    )

    @jax.jit
    def step(params: Params, state: Any, g: Params) -> tuple[Params, Any]:
        updates, state = rule.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = rule.init(params)
    for g in gradients:
        params, state = step(params, state, g)
    return params, evaluation_params(state, params)


def assert_same_way(found: Params, expected: Weights, start: Params, tolerance: float = 1e-4) -> None:
    """Every matrix went where it should, to this share of the way that it went."""
    begun = split(start)
    for name, value in split(found).items():
        way = np.linalg.norm(expected[name] - begun[name])
        assert way > 0, name
        assert np.linalg.norm(value - expected[name]) <= tolerance * way, (name, np.linalg.norm(value - expected[name]) / way)


def by_torch(build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], stories: tuple[Params, list[Params], Any], scale: float = 1.0) -> Weights:
    """20 steps of a rule of torch's in double precision, matrices in one group and vectors in another, its rate divided by `scale`."""
    params, gradients, _ = stories
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in split(params).items()}
    matrices, vectors = ([p for p in theirs.values() if (p.ndim > 1) is is_matrix] for is_matrix in (True, False))
    rule = build([{"params": matrices, "weight_decay": DECAY * scale}, {"params": vectors, "weight_decay": 0.0}])
    for rate, g in zip(RATES, gradients, strict=True):
        for group in rule.param_groups:
            group["lr"] = rate / scale
        for name, value in split(g).items():
            theirs[name].grad = torch.tensor(value)
        rule.step()
    return {name: p.detach().numpy() for name, p in theirs.items()}


def steps(stories: tuple[Params, list[Params], Any]) -> Iterator[tuple[int, float, str, np.ndarray]]:
    """(step from 1, rate, name, gradient) of every step and weight."""
    for t, (rate, g) in enumerate(zip(RATES, stories[1], strict=True), 1):
        for name, value in split(g).items():
            yield t, rate, name, value


def decay_of(value: np.ndarray) -> float:
    return DECAY if value.ndim > 1 else 0.0


@pytest.mark.users_compiler
def test_adamw_is_torchs(stories: tuple[Params, list[Params], Any]) -> None:
    found, evaluated = ours("adamw", stories, eps=1e-7)
    assert evaluated is found
    assert_same_way(found, by_torch(lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-7), stories), stories[0])


@pytest.mark.users_compiler
def test_adafactor_is_torchs(stories: tuple[Params, list[Params], Any]) -> None:
    """Theirs multiplies the rate by max(eps2, root mean square of the weights): with an eps2 above all of those, by a constant."""
    scale = 100.0
    found, _ = ours("adafactor", stories)
    expected = by_torch(lambda groups: torch.optim.Adafactor(groups, beta2_decay=-0.8, eps=(1e-30, scale), d=1.0), stories, scale)
    assert_same_way(found, expected, stories[0])


@pytest.mark.users_compiler
def test_sgd_is_torchs_with_decoupled_decay(stories: tuple[Params, list[Params], Any]) -> None:
    class SGDW(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(1 - group["lr"] * group["decoupled"])
            super().step(closure)

    def build(momentum: float | None, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        parts = [{"params": group["params"], "decoupled": 100 * group["weight_decay"]} for group in groups]
        return SGDW(parts, lr=1.0, momentum=MOMENTUM["sgd"] if momentum is None else momentum)

    for momentum in (None, 0.0):
        expected = by_torch(partial(build, momentum), stories, 1e-2)
        assert_same_way(ours("sgd", stories, 100.0, momentum=momentum)[0], expected, stories[0])


@pytest.mark.users_compiler
def test_lion_is_the_papers(stories: tuple[Params, list[Params], Any]) -> None:
    """Chen et al. (2023), algorithm 2."""
    p = split(stories[0])
    m = {name: np.zeros_like(value) for name, value in p.items()}
    for _, rate, name, g in steps(stories):
        p[name] = p[name] - rate * (np.sign(0.9 * m[name] + 0.1 * g) + decay_of(g) * p[name])
        m[name] = 0.99 * m[name] + 0.01 * g
    assert_same_way(ours("lion", stories, beta2=0.99)[0], p, stories[0])


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Jordan et al. (2024): five steps of x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5 on the singular values, by way of them."""
    u, s, vt = np.linalg.svd(g / np.linalg.norm(g), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


@pytest.mark.users_compiler
def test_muon_is_the_papers(stories: tuple[Params, list[Params], Any]) -> None:
    """Nesterov momentum with Dozat's (2016) correction, as Optax has it; Liu et al. (2025), equation 4; AdamW outside the blocks."""
    p, b = split(stories[0]), MOMENTUM["muon"]
    m = {name: np.zeros_like(value) for name, value in p.items()}
    v = {name: np.zeros_like(value) for name, value in p.items()}
    for t, rate, name, g in steps(stories):
        if name.startswith("layers/") and g.ndim > 1:
            m[name] = b * m[name] + (1 - b) * g
            ahead = b * m[name] / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)
            direction = 0.2 * math.sqrt(max(g.shape)) * newton_schulz(ahead)
        else:
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.95 * v[name] + 0.05 * g**2
            direction = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
        p[name] = p[name] - rate * (direction + decay_of(g) * p[name])
    assert_same_way(ours("muon", stories)[0], p, stories[0])


@pytest.mark.users_compiler
def test_schedule_free_is_the_papers(stories: tuple[Params, list[Params], Any]) -> None:
    """Defazio et al. (2024), equations 1 to 3, with Adam's denominator, decay at y, and averages weighted by the highest rate squared."""
    y = split(stories[0])
    z, x = dict(y), dict(y)
    v = {name: np.zeros_like(value) for name, value in y.items()}
    for t, rate, name, g in steps(stories):
        v[name] = 0.95 * v[name] + 0.05 * g**2
        z[name] = z[name] - rate * (g / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8) + decay_of(g) * y[name])
        weight = max(RATES[:t]) ** 2 / sum(max(RATES[:i]) ** 2 for i in range(1, t + 1))
        x[name] = (1 - weight) * x[name] + weight * z[name]
        y[name] = 0.1 * z[name] + 0.9 * x[name]
    trained, evaluated = ours("schedule_free_adamw", stories)
    assert_same_way(trained, y, stories[0])
    assert_same_way(evaluated, x, stories[0])


# --------------------------------------------------------------------------------------------------------------- groups and rates


def options(**given: Any) -> OptimizerOptions:
    return resolve({"model": "haiku", **given})[0].optimizer


def test_every_parameter_has_a_group() -> None:
    groups = by_path(parameter_groups(layout(CONFIG).logical_axes))
    assert {name: groups[name] for name in ("embedding", "output", "norm", "layers/q", "layers/o", "layers/down", "layers/k_norm")} == {
        "embedding": "embedding",
        "output": "head",
        "norm": "norms",
        "layers/q": "attention",
        "layers/o": "attention",
        "layers/down": "mlp",
        "layers/k_norm": "norms",
    }


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free_adamw"])
def test_a_multiplier_is_another_rate(name: str) -> None:
    """One step with a multiplier of 3 moves its group as one of three times the rate does, decay included, and no other."""
    axes = layout(CONFIG).logical_axes
    rng = np.random.default_rng(0)
    params, g = (jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), layout(CONFIG).shapes) for _ in range(2))

    def update(rate: float, text: str | None) -> dict[str, Any]:
        rule = configured_optimizer(options(optimizer=name, lr_multipliers=text), rate, axes)
        return by_path(jax.jit(rule.update)(g, rule.init(params), params)[0])

    once, thrice, some = update(1e-3, None), update(3e-3, None), update(1e-3, "mlp=3,norms=3,head=0")
    for path, group in by_path(parameter_groups(axes)).items():
        expected = thrice[path] if group in ("mlp", "norms") else once[path]
        np.testing.assert_allclose(some[path], 0 * expected if group == "head" else expected, rtol=2e-3, atol=1e-6)


def test_a_group_that_the_model_has_not() -> None:
    tied = layout(dataclasses.replace(CONFIG, tie_embeddings=True)).logical_axes
    with pytest.raises(UserError, match="--lr_multipliers has head, and the model has no such parameters: its output embedding is the input embedding"):
        configured_optimizer(options(lr_multipliers="head=2"), 1e-3, tied)


def test_the_groups_in_words() -> None:
    known = layout(CONFIG)
    text = describe_groups(options(optimizer="muon", lr_multipliers="embedding=2"), known.shapes, known.logical_axes)
    assert text == (
        "decayed: 9 tensors, 43,008 parameters; not decayed: 5 tensors, 192 parameters; by muon: 7 tensors, 18,432 parameters; "
        "embedding at 2 x the rate: 1 tensor, 12,288 parameters"
    )
    assert known.num_parameters == 43_008 + 192


@pytest.mark.parametrize(
    ("lr", "optimizer", "from_weights", "word"),
    [
        (3e-5, "adamw", False, "low"),
        (6e-4, "adamw", True, "high"),
        (6e-4, "adamw", False, None),
        (3e-5, "muon", True, None),
        (3e-5, "lion", False, None),
        (3e-4, "lion", True, "high"),
        (1e-6, "sgd", False, None),
    ],
)
def test_rates_of_the_other_regime(lr: float, optimizer: str, from_weights: bool, word: str | None) -> None:
    said = lr_warning(lr, optimizer, from_weights)
    assert (said is None) == (word is None)
    assert said is None or f" is {word} for " in said


def test_lions_recipe_and_schedule_frees() -> None:
    adamw, lion = options(), options(optimizer="lion")
    assert lion.lr == pytest.approx(adamw.lr / 5)
    assert lion.weight_decay == pytest.approx(5 * adamw.weight_decay)
    assert lion.beta2 == 0.99
    assert options(optimizer="lion", lr=1e-3, beta2=0.9).lr == 1e-3
    assert options(optimizer="schedule_free_adamw").scheduler == "constant_with_warmup"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adam"}, r"--optimizer 'adam' is not known; did you mean adamw\? Known: adamw, adafactor, lion, muon, sgd, schedule_free_adamw"),
        ({"optimizer": "sgd"}, "--optimizer sgd wants a much higher one. Give --lr"),
        ({"lr": -1}, "--lr must be greater than 0"),
        ({"eps": 0}, "--eps must be greater than 0"),
        ({"momentum": 0.9}, "--momentum belongs to sgd, muon, adafactor; --optimizer adamw has --beta1"),
        ({"momentum": 1, "optimizer": "muon"}, "--momentum must be at least 0 and below 1"),
        ({"lr_multipliers": "embedings=2"}, r"no group 'embedings'; did you mean embedding\?.*the groups are embedding, head, attention, mlp, norms"),
        ({"lr_multipliers": "embedding"}, "--lr_multipliers embedding wants a number, not ''"),
        ({"lr_multipliers": "embedding=nan"}, "--lr_multipliers embedding wants a number, not 'nan'"),
        ({"lr_multipliers": "head=-1"}, "--lr_multipliers head must not be negative"),
        ({"lr_multipliers": "head=1,head=2"}, "--lr_multipliers has head twice"),
        ({"lr_multipliers": ""}, "--lr_multipliers has no group ''"),
        ({"optimizer": "schedule_free_adamw", "scheduler": "cosine"}, "averages its weights in place of lowering the rate, so --scheduler cosine"),
        ({"optimizer": "schedule_free_adamw", "beta1": 0}, "--beta1 0 leaves schedule_free_adamw without an average"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(**given)


def test_another_rule_is_refused() -> None:
    with pytest.raises(UserError, match=r"--optimizer 'sgdm' is not known; did you mean sgd\?"):
        build_optimizer("sgdm", 1e-3, beta1=0.9, beta2=0.95, weight_decay=0.0, mask=True)


# ------------------------------------------------------------------------------------------------------------------ small moments


def test_rounding_at_random_is_right_in_the_mean() -> None:
    x = jnp.full(200_000, 1.0 + 2**-7 / 5)
    rounded = round_at_random(x, jax.random.key(1))
    assert rounded.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(rounded, np.float32))) == {1.0, 1.0078125}
    assert float(jnp.mean(rounded.astype(jnp.float32))) == pytest.approx(1 + 2**-7 / 5, abs=3e-5)
    exact = jnp.array([0.0, 1.0, 0.375, 1e30], jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(round_at_random(exact.astype(jnp.float32), jax.random.key(2)), exact)


def test_small_second_moments_follow_where_rounding_to_nearest_stands_still() -> None:
    """Gradients fall to a tenth, and with beta2 0.999 the second moment by 0.1 % a step: less than bfloat16 sees at once."""
    rule = build_optimizer("adamw", 1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0, mask=True, moment_dtype="bfloat16")
    params = {"x": jnp.zeros(4096)}
    state = rule.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((state[0].mu, state[0].nu))} == {jnp.dtype(jnp.bfloat16)}
    step = jax.jit(lambda state, size: rule.update({"x": jnp.full(4096, size)}, state, params)[1])
    nu = 0.0
    for size in [1.0] * 50 + [0.1] * 1000:
        state = step(state, size)
        nu = 0.999 * nu + 0.001 * size**2
    assert float(jnp.mean(state[0].nu["x"].astype(jnp.float32))) == pytest.approx(nu, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "adamw" else pytest.mark.exhaustive) for name in OPTIMIZERS])
def test_small_moments_go_nearly_the_same_way(name: str, stories: tuple[Params, list[Params], Any]) -> None:
    momentum = {"momentum": 0.9} if name == "adafactor" else {}
    whole, small = (ours(name, stories, moment_dtype=dtype, **momentum)[0] for dtype in ("float32", "bfloat16"))
    way = float(optax.tree.norm(optax.tree.sub(whole, stories[0])))
    apart = float(optax.tree.norm(optax.tree.sub(whole, small)))
    assert 1e-5 * way < apart < 0.05 * way


# ------------------------------------------------------------------------------------------------------------- meshes, checkpoints


def mesh_of(**axes: int) -> Mesh:
    return build_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: math.prod(axes.values())])


def batch(mesh: Mesh) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 259, (1, 8, 17)).astype(np.int32)
    parts = {"input_ids": ids[..., :-1], "labels": ids[..., 1:], "segment_ids": np.ones((1, 8, 16), np.int32), "loss_mask": np.ones((1, 8, 16), bool)}
    return {name: jax.device_put(values, sharding(mesh, TRAIN_AXES)) for name, values in parts.items()}


@pytest.fixture(scope="module")
def first_values() -> Params:
    return jax.device_get(initial_parameters(CONFIG, 42))


def on(mesh: Mesh, params: Params) -> Params:
    return jax.device_put(params, layout(CONFIG).shardings(mesh))


def program_of(name: str, mesh: Mesh, **given: Any) -> Program:
    chosen = resolve({"model": "haiku", "optimizer": name, "lr": 1e-3, "lr_multipliers": "head=2", **given})[0].optimizer
    return Program(CONFIG, Compute(), configured_optimizer(chosen, 1e-3, layout(CONFIG).logical_axes), 1.0, mesh)


def distance(found: Any, expected: Any) -> float:
    return math.sqrt(sum(float(np.sum((np.asarray(a) - np.asarray(b)) ** 2)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (jax.tree_util.keystr(path), np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "adamw" else pytest.mark.exhaustive) for name in OPTIMIZERS])
def test_a_mesh_trains_as_one_device_does_and_its_checkpoint_goes_on_another(name: str, first_values: Params, tmp_path: Path) -> None:
    given = {"moment_dtype": "bfloat16"} if name in ("adamw", "muon") else {"momentum": 0.5} if name == "adafactor" else {}
    results = {}
    for mesh in (mesh_of(data=1), mesh_of(fsdp=2, tensor=2)):
        program = program_of(name, mesh, **given)
        state = program.initial_state(on(mesh, first_values))
        step = program.lower_train_step(1, 8, 16).compile()
        for _ in range(2):
            state, metrics = step(state, batch(mesh))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(lambda leaf: leaf.sharding, program.state_like)
        results[mesh.size] = program, step, state, float(metrics["loss"])
    one, four = results[1], results[4]
    assert one[3] == pytest.approx(four[3], rel=1e-5)
    assert_close(four[2].params, one[2].params, 5e-3 if name == "lion" else 1e-3)  # a sign of nearly nothing is anyone's

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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
def test_moments_lie_where_their_parameters_lie(name: str, axes: dict[str, int]) -> None:
    program = program_of(name, mesh_of(**axes), **({"momentum": 0.5} if name == "adafactor" else {}))
    program.lower_train_step(2, 8, 16)
    where = {"/".join(path.split("/")[-2:]): leaf for path, leaf in by_path(program.state_like.params).items()}
    moments = {path: leaf for path, leaf in by_path(program.state_like.opt_state).items() if path.endswith(("layers/q", "layers/down", "/embedding"))}
    assert moments or name == "sgd"
    for path, leaf in moments.items():
        own = where["/".join(path.split("/")[-2:])] if "layers" in path else where["embedding"]
        factors = any(part in path for part in ("v_row", "v_col", "/v/"))
        assert leaf.sharding == (own.sharding if leaf.shape == own.shape else sharding(program.mesh, ())), path
        assert (leaf.shape == own.shape) != factors, path


def test_a_path_that_ends_alike_is_not_the_same_parameter() -> None:
    mesh = mesh_of(fsdp=2)
    shapes = {"norm": jax.ShapeDtypeStruct((8,), jnp.float32), "layers": {"norm": jax.ShapeDtypeStruct((8,), jnp.float32)}}
    places = {"norm": sharding(mesh, ("embed",)), "layers": {"norm": sharding(mesh, ("norm",))}}
    placed = by_path(place_state(optax.scale_by_lion().init(jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)), shapes, places, sharding(mesh, ())))
    assert placed["mu/norm"].sharding == places["norm"]
    assert placed["mu/layers/norm"].sharding == places["layers"]["norm"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_scale_of_the_rate_is_state_and_needs_no_new_program(first_values: Params) -> None:
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
