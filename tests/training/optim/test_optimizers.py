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

from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model.pretrained.config_json import read_config
from consyn_jax.model.pretrained.weights import load_parameters
from consyn_jax.model.transformer import Compute
from consyn_jax.optimizer_config import OPTIMIZERS, OptimizerOptions
from consyn_jax.resolve import resolve
from consyn_jax.training.optim.optimizers import RULES, build_optimizer, lr_warning
from consyn_jax.training.optim.state import evaluation_params
from consyn_jax.training.program import Program

STEPS = 20
RATES = [1e-3 * min(1, (s + 1) / 5) for s in range(STEPS)]
DECAY = 0.1
# Every matrix [inputs, outputs] and vector of every layer, by name.
Weights = dict[str, np.ndarray]


def by_path(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# ---------------------------------- each rule on trained weights, against another implementation


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Params, list[Params], Any]:
    """The weights of stories260K, 20 gradients at them for different rows, and the axes."""
    directory = shared_data / "parity" / "stories260K"
    config = read_config(directory / "hf")
    params = load_parameters(directory / "hf", config)
    mesh = build_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    program = Program(config, Compute(), optax.sgd(1.0), 0.0, mesh)
    ids = np.load(directory / "golden.npz")["input_ids"]

    @jax.jit
    def gradient(row: jax.Array) -> Params:
        part = {
            "input_ids": row[:, :-1],
            "labels": row[:, 1:],
            "segment_ids": jnp.ones((1, 31), jnp.int32),
            "loss_mask": jnp.ones((1, 31), bool),
        }
        return jax.grad(lambda p: program.loss(p, part).nll / 31)(params)

    rows = ids[:, :128].reshape(-1, 32)
    return (
        params,
        [gradient(jnp.asarray(rows[s % len(rows)][None])) for s in range(STEPS)],
        layout(config).logical_axes,
    )


def split(tree: Params) -> Weights:
    """The weights of each layer, as matrices [inputs, outputs]."""
    found = {}
    for name, value in by_path(tree).items():
        value = np.asarray(value, np.float64)
        if not name.startswith("layers/"):
            found[name] = value
            continue
        for i, own in enumerate(value):
            width = own.shape[-1] if name == "layers/o" else own.shape[0]
            found[f"{name}/{i}"] = (
                own
                if own.ndim < 3
                else own.reshape(-1, width)
                if name == "layers/o"
                else own.reshape(width, -1)
            )
    return found


def ours(
    name: str, stories: tuple[Params, list[Params], Any], faster: float = 1.0, **settings: Any
) -> tuple[Params, Params]:
    """The parameters after 20 steps, and those to evaluate."""
    params, gradients, axes = stories
    table = faster * jnp.array(RATES)
    given = {"beta2": 0.95, "weight_decay": DECAY} | settings
    rule = build_optimizer(OptimizerOptions(optimizer=name, **given), lambda s: table[s], axes)

    @jax.jit
    def step(params: Params, state: Any, g: Params) -> tuple[Params, Any]:
        updates, state = rule.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = rule.init(params)
    for g in gradients:
        params, state = step(params, state, g)
    return params, evaluation_params(state, params)


def assert_same_way(
    found: Params, expected: Weights, start: Params, tolerance: float = 1e-4
) -> None:
    """Check that every matrix moved as expected, up to this share of its move."""
    begun = split(start)
    for name, value in split(found).items():
        way = np.linalg.norm(expected[name] - begun[name])
        assert way > 0, name
        assert np.linalg.norm(value - expected[name]) <= tolerance * way, (
            name,
            np.linalg.norm(value - expected[name]) / way,
        )


def by_torch(
    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    stories: tuple[Params, list[Params], Any],
    scale: float = 1.0,
) -> Weights:
    """20 steps of a torch optimizer in double precision, with its rate divided by `scale`.

    Matrices are in one group, vectors in another.
    """
    params, gradients, _ = stories
    theirs = {
        name: torch.tensor(value, requires_grad=True) for name, value in split(params).items()
    }
    matrices, vectors = (
        [p for p in theirs.values() if (p.ndim > 1) is is_matrix] for is_matrix in (True, False)
    )
    rule = build(
        [
            {"params": matrices, "weight_decay": DECAY * scale},
            {"params": vectors, "weight_decay": 0.0},
        ]
    )
    for rate, g in zip(RATES, gradients, strict=True):
        for group in rule.param_groups:
            group["lr"] = rate / scale
        for name, value in split(g).items():
            theirs[name].grad = torch.tensor(value)
        rule.step()
    return {name: p.detach().numpy() for name, p in theirs.items()}


def steps(
    stories: tuple[Params, list[Params], Any],
) -> Iterator[tuple[int, float, str, np.ndarray]]:
    """(step from 1, rate, name, gradient) for every step and weight."""
    for t, (rate, g) in enumerate(zip(RATES, stories[1], strict=True), 1):
        for name, value in split(g).items():
            yield t, rate, name, value


def decay_of(value: np.ndarray) -> float:
    return DECAY if value.ndim > 1 else 0.0


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"adafactor"}))
def test_scale_free_rules_forget_the_size_of_gradients(name: str) -> None:
    """muP is refused for the others. Adafactor's bound on an update is that of a whole matrix."""
    shape = {"layers": {"q": jnp.ones((2, 8, 8))}, "embedding": jnp.ones((16, 8))}
    axes = {"layers": {"q": ("layers", "embed", "heads")}, "embedding": ("vocab", "embed")}
    options = resolve({"model": "haiku", "optimizer": name, "lr": 0.1})[0].optimizer
    rule = build_optimizer(options, 0.1, axes)
    gradients = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32), shape
    )
    moves = []
    for scale in (1.0, 100.0):
        scaled = jax.tree.map(lambda g, scale=scale: g * scale, gradients)
        updates, _ = rule.update(scaled, rule.init(shape), shape)
        moves.append(np.concatenate([np.ravel(u) for u in jax.tree.leaves(updates)]))
    is_free = np.allclose(*moves, rtol=1e-3, atol=1e-5)
    assert is_free == OPTIMIZERS[name].scale_free


@pytest.mark.slow
@pytest.mark.users_compiler
def test_adamw_is_torchs(stories: tuple[Params, list[Params], Any]) -> None:
    found, evaluated = ours("adamw", stories, beta1=0.8, eps=1e-3)
    assert evaluated is found
    expected = by_torch(
        lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-3), stories
    )
    assert_same_way(found, expected, stories[0])


@pytest.mark.users_compiler
def test_cautious_adamw_is_the_papers(stories: tuple[Params, list[Params], Any]) -> None:
    """Liang et al. (2024), algorithm 2, with decay as in AdamW."""
    p = split(stories[0])
    m = {name: np.zeros_like(value) for name, value in p.items()}
    v = {name: np.zeros_like(value) for name, value in p.items()}
    for t, rate, name, g in steps(stories):
        m[name], v[name] = 0.8 * m[name] + 0.2 * g, 0.95 * v[name] + 0.05 * g**2
        u = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-5)
        mask = u * g > 0
        u = u * mask * (u.size / (mask.sum() + 1))
        p[name] = p[name] - rate * (u + decay_of(g) * p[name])
    assert_same_way(ours("cautious_adamw", stories, beta1=0.8, eps=1e-5)[0], p, stories[0])


@pytest.mark.users_compiler
def test_adafactor_is_torchs(stories: tuple[Params, list[Params], Any]) -> None:
    """Torch multiplies the rate by max(eps2, root mean square of the weights), here by eps2."""
    scale = 100.0
    found, _ = ours("adafactor", stories)
    expected = by_torch(
        lambda groups: torch.optim.Adafactor(groups, beta2_decay=-0.8, eps=(1e-30, scale), d=1.0),
        stories,
        scale,
    )
    assert_same_way(found, expected, stories[0])


@pytest.mark.parametrize(
    ("shape", "is_factored"),
    [((2, 32, 33), True), ((2, 31, 40), False), ((33, 33, 64), False), ((33, 34, 64), True)],
)
def test_adafactor_factors_matrices_but_no_layers(
    shape: tuple[int, ...], is_factored: bool
) -> None:
    """Of the two largest dimensions, none may be that of the layers."""
    chosen = OptimizerOptions(optimizer="adafactor", weight_decay=0.0)
    rule = build_optimizer(chosen, 1.0, {"x": ("layers", "embed", "mlp")})
    state = jax.eval_shape(rule.init, {"x": jax.ShapeDtypeStruct(shape, jnp.float32)})
    sizes = {leaf.shape for leaf in jax.tree.leaves(state)}
    layers, *sides = shape
    assert (shape not in sizes) == is_factored
    assert {(layers, side) for side in sides} <= sizes or not is_factored


def test_adafactor_averages_its_directions_with_momentum() -> None:
    params, axes = {"x": jnp.ones((4, 8))}, {"x": ("embed", "mlp")}
    rng = np.random.default_rng(0)
    gradients = [{"x": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)} for _ in range(3)]

    def updates(momentum: float | None) -> list[np.ndarray]:
        chosen = OptimizerOptions(optimizer="adafactor", momentum=momentum, weight_decay=0.0)
        rule = build_optimizer(chosen, 1.0, axes)
        state, found = rule.init(params), []
        for g in gradients:
            u, state = rule.update(g, state, params)
            found.append(np.asarray(u["x"]))
        return found

    average = np.zeros((4, 8))
    for plain, with_momentum in zip(updates(None), updates(0.7), strict=True):
        average = 0.7 * average + 0.3 * plain
        np.testing.assert_allclose(with_momentum, average, rtol=1e-5)


@pytest.mark.users_compiler
def test_sgd_is_torchs_with_decoupled_decay(stories: tuple[Params, list[Params], Any]) -> None:
    class SGDW(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(1 - group["lr"] * group["decoupled"])
            super().step(closure)

    def build(momentum: float | None, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        parts = [
            {"params": group["params"], "decoupled": 100 * group["weight_decay"]}
            for group in groups
        ]
        return SGDW(
            parts, lr=1.0, momentum=OPTIMIZERS["sgd"].momentum if momentum is None else momentum
        )

    for momentum in (None, 0.0):
        expected = by_torch(partial(build, momentum), stories, 1e-2)
        assert_same_way(ours("sgd", stories, 100.0, momentum=momentum)[0], expected, stories[0])


@pytest.mark.users_compiler
def test_lion_is_the_papers(stories: tuple[Params, list[Params], Any]) -> None:
    """Chen et al. (2023), algorithm 2."""
    p = split(stories[0])
    m = {name: np.zeros_like(value) for name, value in p.items()}
    for _, rate, name, g in steps(stories):
        p[name] = p[name] - rate * (np.sign(0.8 * m[name] + 0.2 * g) + decay_of(g) * p[name])
        m[name] = 0.99 * m[name] + 0.01 * g
    assert_same_way(ours("lion", stories, beta1=0.8, beta2=0.99)[0], p, stories[0])


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Jordan et al. (2024): five steps of x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5 on the singular
    values, by way of them."""
    u, s, vt = np.linalg.svd(g / np.linalg.norm(g), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


@pytest.mark.slow
@pytest.mark.users_compiler
@pytest.mark.parametrize("momentum", [None, 0.8])
def test_muon_is_the_papers(
    momentum: float | None, stories: tuple[Params, list[Params], Any]
) -> None:
    """Nesterov momentum with Dozat's (2016) correction, as in Optax; Liu et al. (2025), equation 4;
    AdamW outside the blocks."""
    b = OPTIMIZERS["muon"].momentum if momentum is None else momentum
    p = split(stories[0])
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
    assert_same_way(ours("muon", stories, momentum=momentum)[0], p, stories[0])


@pytest.mark.users_compiler
def test_schedule_free_is_the_papers(stories: tuple[Params, list[Params], Any]) -> None:
    """Defazio et al. (2024), equations 1 to 3, with Adam's denominator, decay at y, and averages
    weighted by the highest rate squared."""
    y = split(stories[0])
    z, x = dict(y), dict(y)
    v = {name: np.zeros_like(value) for name, value in y.items()}
    for t, rate, name, g in steps(stories):
        v[name] = 0.95 * v[name] + 0.05 * g**2
        z[name] = z[name] - rate * (
            g / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-5) + decay_of(g) * y[name]
        )
        weight = max(RATES[:t]) ** 2 / sum(max(RATES[:i]) ** 2 for i in range(1, t + 1))
        x[name] = (1 - weight) * x[name] + weight * z[name]
        y[name] = 0.2 * z[name] + 0.8 * x[name]
    trained, evaluated = ours("schedule_free_adamw", stories, beta1=0.8, eps=1e-5)
    assert_same_way(trained, y, stories[0])
    assert_same_way(evaluated, x, stories[0])


# ---------------------------------------------------------------------------------------- settings


def options(**given: Any) -> OptimizerOptions:
    return resolve({"model": "haiku", **given})[0].optimizer


def test_both_tables_have_the_same_optimizers() -> None:
    assert list(RULES) == list(OPTIMIZERS)


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
        (4e-5, "schedule_free_adamw", False, "low"),
        (6e-5, "schedule_free_adamw", False, None),
        (9e-4, "schedule_free_adamw", True, None),
        (2e-3, "schedule_free_adamw", True, "high"),
    ],
)
def test_rates_usual_for_the_other_kind_of_training_are_pointed_out(
    lr: float, optimizer: str, from_weights: bool, word: str | None
) -> None:
    warning = lr_warning(lr, optimizer, from_weights)
    assert (warning is None) == (word is None)
    assert warning is None or f" is {word} for " in warning


def test_the_usual_rates_of_an_adapter_are_higher() -> None:
    """Ten times those of a full fine-tune."""
    for lr, factor, is_high in ((2e-4, 1.0, True), (9e-4, 10.0, False), (2e-3, 10.0, True)):
        assert (lr_warning(lr, "adamw", True, factor) is not None) == is_high
    assert lr_warning(4e-4, "adamw", False, 10.0) is not None


def test_recipes_are_adapted_to_the_optimizer() -> None:
    adamw, lion = options(), options(optimizer="lion")
    assert lion.lr == pytest.approx(adamw.lr / 5)
    assert lion.weight_decay == pytest.approx(5 * adamw.weight_decay)
    assert lion.beta2 == 0.99
    assert options(optimizer="lion", lr=1e-3, beta2=0.9).lr == 1e-3
    assert options(optimizer="schedule_free_adamw").scheduler == "constant_with_warmup"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"optimizer": "adam"},
            r"--optimizer 'adam' is not known; did you mean adamw\? Known: adamw, adafactor, ",
        ),
        (
            {"optimizer": "sgd"},
            "--optimizer sgd needs a much higher learning rate .* Give --lr: start from 0.1, and",
        ),
        ({"lr": -1}, "--lr must be greater than 0"),
        ({"eps": 0}, "--eps must be greater than 0"),
        (
            {"momentum": 0.9},
            "--momentum is for adafactor, muon, sgd; adamw has --beta1",
        ),
        ({"momentum": 1, "optimizer": "muon"}, "--momentum must be at least 0 and below 1"),
        (
            {"lr_multipliers": "embedings=2"},
            r"no group 'embedings'; did you mean embedding\?.*the groups are embedding, head, ",
        ),
        ({"lr_multipliers": "embedding"}, "--lr_multipliers embedding must be a number, not ''"),
        (
            {"lr_multipliers": "embedding=nan"},
            "--lr_multipliers embedding must be a number, not 'nan'",
        ),
        ({"lr_multipliers": "head=-1"}, "--lr_multipliers head must not be negative"),
        ({"lr_multipliers": "head=1,head=2"}, "--lr_multipliers names head twice"),
        ({"lr_multipliers": ""}, "--lr_multipliers has no group ''"),
        (
            {"optimizer": "schedule_free_adamw", "scheduler": "cosine"},
            "averages its weights instead of lowering the learning rate",
        ),
        (
            {"optimizer": "schedule_free_adamw", "beta1": 0},
            "--beta1 0 turns off the averaging of schedule_free_adamw",
        ),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_read(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        options(**given)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "adamw" else pytest.mark.exhaustive)
        for name in OPTIMIZERS
    ],
)
def test_bfloat16_moments_lead_nearly_the_same_way(
    name: str, stories: tuple[Params, list[Params], Any]
) -> None:
    momentum = {"momentum": 0.9} if name == "adafactor" else {}
    whole, small = (
        ours(name, stories, moment_dtype=dtype, **momentum)[0] for dtype in ("float32", "bfloat16")
    )
    way = float(optax.tree.norm(optax.tree.sub(whole, stories[0])))
    apart = float(optax.tree.norm(optax.tree.sub(whole, small)))
    assert 1e-5 * way < apart < 0.05 * way
