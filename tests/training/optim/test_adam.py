import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.optim.adam import round_stochastically
from consyn_jax.training.optim.optimizers import build_optimizer


def test_stochastic_rounding_keeps_the_mean() -> None:
    x = jnp.full(200_000, 1.0 + 2**-7 / 5)
    rounded = round_stochastically(x, jax.random.key(1))
    assert rounded.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(rounded, np.float32))) == {1.0, 1.0078125}
    assert float(jnp.mean(rounded.astype(jnp.float32))) == pytest.approx(1 + 2**-7 / 5, abs=3e-5)
    exact = jnp.array([0.0, 1.0, 0.375, 1e30], jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        round_stochastically(exact.astype(jnp.float32), jax.random.key(2)), exact
    )


def test_bfloat16_second_moments_follow_small_changes() -> None:
    """Rounded to nearest they would stand still: they fall by 0.1 % a step, less than bfloat16
    resolves."""
    chosen = OptimizerOptions(beta2=0.999, weight_decay=0.0, moment_dtype="bfloat16")
    rule = build_optimizer(chosen, 1e-3, {"x": ("embed", "mlp")})
    params = {"x": jnp.zeros(4096)}
    state = rule.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((state[0].mu, state[0].nu))} == {
        jnp.dtype(jnp.bfloat16)
    }
    step = jax.jit(lambda state, size: rule.update({"x": jnp.full(4096, size)}, state, params)[1])
    nu = 0.0
    for size in [1.0] * 50 + [0.1] * 1000:
        state = step(state, size)
        nu = 0.999 * nu + 0.001 * size**2
    assert float(jnp.mean(state[0].nu["x"].astype(jnp.float32))) == pytest.approx(nu, rel=0.01)


@pytest.mark.parametrize("name", ["adamw", "cautious_adamw"])
def test_each_step_and_each_layer_draws_its_own_numbers_to_round_its_moments(name: str) -> None:
    chosen = OptimizerOptions(
        optimizer=name, beta2=0.999, weight_decay=0.0, moment_dtype="bfloat16"
    )
    rule = build_optimizer(chosen, 1e-3, {"x": ("embed", "mlp")})
    params, gradients = {"x": jnp.zeros((64, 64))}, {"x": jnp.full((64, 64), 0.3)}
    adam, *others = rule.init(params)

    @jax.jit
    def moments(step: int, **place: int) -> jax.Array:
        state = (adam._replace(count=jnp.int32(step)), *others)
        return rule.update(gradients, state, params, **place)[1][0].nu["x"].astype(jnp.float32)

    places = [(0, {}), (0, {"layer": 0}), (0, {"layer": 1}), (1, {"layer": 1})]
    rounded = [tuple(np.ravel(moments(step, **place)).tolist()) for step, place in places]
    assert len(set(rounded)) == len(places)
    assert rounded[-1] == tuple(np.ravel(moments(1, layer=1)).tolist())
