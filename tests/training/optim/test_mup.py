"""`--parametrization mup` against the published tables, taken literally."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Params, initial_parameters, layout, mup_factors
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import BaseShape, OptimizerOptions
from consyn_jax.resolve import resolve
from consyn_jax.training.optim.groups import mup_rates
from consyn_jax.training.optim.optimizers import build_optimizer

BASE = BaseShape(hidden_dim=32, num_layers=2, head_dim=8)
# eps: with 0 the size of an update does not depend on the gradient's at all
OPTIONS = OptimizerOptions(lr=0.02, weight_decay=0.3, beta2=0.95, eps=1e-30)
MUP = replace(
    OPTIONS, parametrization="mup", base_hidden_dim=32, base_num_layers=2, base_head_dim=8
)
IN_BLOCKS = ("q", "k", "v", "o", "gate", "up", "down")
STEPS = 5


def model(width: int = 64, layers: int = 4, head: int = 16, **more: Any) -> ModelConfig:
    heads = width // head
    sizes = {"num_heads": heads, "num_kv_heads": heads, "head_dim": head, "mlp_dim": 3 * width}
    return ModelConfig(64, width, layers, **sizes, context=16, **more)


def loss(config: ModelConfig, params: Params, ids: jax.Array) -> jax.Array:
    decoder = nnx.merge(layout(config).graphdef, params)
    logits = decoder.hidden(ids[:, :-1], None, Compute()) @ decoder.head_VD.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def trained(rule: Any, params: Params, config: ModelConfig, used: Any = lambda p: p) -> Params:
    """Parameters after some steps; `used` turns them into what the model computes with."""
    ids = jax.random.randint(jax.random.key(1), (STEPS, 4, 16), 0, 64)

    @jax.jit
    def step(params: Params, state: Any, ids: jax.Array) -> tuple[Params, Any]:
        gradient = jax.grad(lambda p: loss(config, used(p), ids))(params)
        updates, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = rule.init(params)
    for batch in ids:
        params, state = step(params, state, batch)
    return used(params)


def name_of(path: Any) -> str:
    return path[-1].key


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("normed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_training_is_that_of_the_published_tables(tied: bool, normed: bool) -> None:
    """Table 1 of CompleteP (Dey et al., 2025): multipliers in the forward pass, a rate and a decay
    for each kind of weights."""
    config = model(tie_embeddings=tied, qk_norm=normed, qkv_bias=True, output_bias=True)
    m_N, m_L = 64 / 32, 4 / 2

    def multiplier(path: Any, x: jax.Array) -> jax.Array:
        name = name_of(path)
        if name in ("o", "o_bias", "down", "down_bias"):
            return x / m_L  # what a block adds to the residual stream
        if name == ("norm" if tied else "output"):
            return x / m_N  # the logits
        if name in (("q_norm",) if normed else ("q", "q_bias")):
            return x * (8 / 16) ** 0.5  # q k / d: 1 / sqrt(d) is in the model
        return x

    def used(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(multiplier, params)

    def rates(path: Any, _: Any) -> str:
        return "hidden" if name_of(path) in IN_BLOCKS else "outside"

    def adamw(rate: float, decay: float) -> Any:
        mask = lambda params: jax.tree.map(lambda x: x.ndim > 1 and x.size > 300, params)  # noqa: E731
        return optax.adamw(rate, 0.9, 0.95, eps=1e-30, weight_decay=decay, mask=mask)

    ours = initial_parameters(config, 3, base=BASE)
    ours = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(0), x.shape), ours)
    inverse = used(jax.tree.map(jnp.ones_like, ours))
    theirs = jax.tree.map(jnp.divide, ours, inverse)
    labels = jax.tree_util.tree_map_with_path(rates, ours)
    published = optax.partition(
        {"hidden": adamw(0.02 / m_N, 0.3 * m_N), "outside": adamw(0.02, 0.3)}, labels
    )
    axes = layout(config).logical_axes
    rule = build_optimizer(MUP, 0.02, axes, mup_rates(config, MUP, axes))
    found = trained(rule, ours, config)
    expected = trained(published, theirs, config, used)
    # Adam makes a rounding error of a small gradient as large as an update, of which five sum to 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)


def test_initial_values_are_those_of_the_tables() -> None:
    wide, narrow = (model(*sizes, tie_embeddings=False) for sizes in ((256, 8, 8), (32, 2, 8)))
    found, base = (initial_parameters(config, 0, base=BASE) for config in (wide, narrow))
    std = lambda params, name: float(jnp.std(params["layers"][name]))  # noqa: E731
    for name in ("q", "k", "v", "gate", "up"):  # variance 1 / width
        assert std(found, name) / std(base, name) == pytest.approx(8**-0.5, rel=0.05)
    for name in ("o", "down"):  # and the multiplier of what a block adds, 1 / depth
        assert std(found, name) / std(base, name) == pytest.approx(8**-0.5 / 4, rel=0.05)
    assert float(jnp.std(found["embedding"])) == pytest.approx(1.0, rel=0.05)


def test_the_base_itself_trains_as_without() -> None:
    config = model(32, 2, 8)
    tree = mup_factors(config, BASE, layout(config).logical_axes)
    assert set(jax.tree.leaves(tree)) == {1.0}
    params = initial_parameters(config, 0)
    jax.tree.map(np.testing.assert_array_equal, params, initial_parameters(config, 0, base=BASE))
    axes = layout(config).logical_axes
    results = [
        trained(
            build_optimizer(options, 0.02, axes, mup_rates(config, options, axes)), params, config
        )
        for options in (OPTIONS, MUP)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.02), ("muon", 0.1), ("lion", 0.004)])
def test_activations_stay_as_large_with_width_and_depth(optimizer: str, lr: float) -> None:
    """The coordinate check at four times the base (`benchmarks/mup.py` goes to 1,024 wide)."""
    standard, mup = (replace(options, optimizer=optimizer) for options in (OPTIONS, MUP))

    def size(width: int, layers: int, options: OptimizerOptions) -> float:
        config = model(width, layers, 8)
        axes = layout(config).logical_axes
        rule = build_optimizer(options, lr, axes, mup_rates(config, options, axes))
        params = trained(rule, initial_parameters(config, 0, base=options.base), config)
        decoder = nnx.merge(layout(config).graphdef, params)
        ids = jax.random.randint(jax.random.key(2), (8, 16), 0, 64)
        looks = decoder.traced(ids, None, Compute(), None, lambda x: jnp.mean(jnp.square(x)))[1]
        return float(looks["residual stream"][-1]) ** 0.5

    for width, layers in ((128, 2), (32, 8)):
        assert size(width, layers, mup) / size(32, 2, mup) == pytest.approx(1, abs=0.3)
    assert size(128, 2, standard) / size(32, 2, standard) > 2


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer": "sgd", "lr": 0.1},
        {"optimizer": "adafactor"},
        {"lora_rank": 4, "checkpoint": "model"},
    ],
)
def test_where_it_has_no_rates_it_is_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match="--parametrization mup needs --optimizer adamw, lion, muon"
    ):
        resolve({"parametrization": "mup", **flags})
    with pytest.raises(UserError, match="--base_hidden_dim must be"):
        resolve({"parametrization": "mup", "base_hidden_dim": 0})
