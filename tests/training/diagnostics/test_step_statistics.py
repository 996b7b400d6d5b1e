import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny_program import CONFIG, A, place, program, state_of

from consyn_jax.model.dropout import Dropout
from consyn_jax.model.parameters import Params, layout
from consyn_jax.training.diagnostics.first_nonfinite import diagnose
from consyn_jax.training.diagnostics.step_statistics import statistics
from consyn_jax.training.step import dropout_keys

SIX = jax.jit(statistics)


@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=6, max_size=6))
def test_statistics_agree_with_numpy_over_finite_values(values: list[float]) -> None:
    x = np.array(values, np.float32)
    finite = x[np.isfinite(x)].astype(np.float64)
    found = SIX(x)
    assert int(found.nonfinite) == len(x) - len(finite)
    assert float(found.largest) == (np.abs(finite).max() if len(finite) else 0)
    assert float(found.rms) == pytest.approx(
        np.sqrt(np.mean(finite**2)) if len(finite) else 0, rel=1e-5, abs=1e-37
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_statistics_are_those_of_the_train_step(batch: dict[str, np.ndarray]) -> None:
    """With everything composed around a step: dropout, loss scale, micro-batches."""
    p = program(jnp.float16, 0.3, data=2)
    state, parts = state_of(p), place(batch, p.mesh)
    found = diagnose(p, state, parts)
    assert [row.place for row in found.activations[:5]] == [
        "embedding",
        "layer 0 attention",
        "layer 0 MLP",
        "layer 0 residual stream",
        "layer 1 attention",
    ]
    assert not any(row.nonfinite for row in found.activations + found.gradients + found.weights)

    def hidden(params: Params, batch: Any, a: jax.Array) -> jax.Array:
        model = nnx.merge(p.layout.graphdef, params)
        return model.hidden(
            batch["input_ids"][a],
            batch["segment_ids"][a],
            p.compute,
            Dropout(dropout_keys(5, 0, A)[a], 0.3),
        )

    with jax.set_mesh(p.mesh), jax.threefry_partitionable(True):
        step = jax.jit(hidden)
        whole = np.stack(
            [np.asarray(step(state.params, parts, jnp.int32(a)), np.float64) for a in range(A)]
        )
    logits = whole @ np.asarray(state.params["output"], np.float64)[: CONFIG.vocab_size].T
    for row, expected in zip(found.activations[-2:], (whole, logits), strict=True):
        assert (row.rms, row.largest) == pytest.approx(
            (np.sqrt(np.mean(expected**2)), np.abs(expected).max()), rel=2e-3
        )
    shapes: Any = layout(CONFIG).shapes
    sizes = [
        math.prod(
            shapes["layers"][row.place.split()[-1]].shape[1:]
            if "layer" in row.place
            else shapes[row.place].shape
        )
        for row in found.gradients
    ]
    assert math.sqrt(
        sum(n * row.rms**2 for n, row in zip(sizes, found.gradients, strict=True))
    ) == pytest.approx(found.grad_norm, rel=1e-4)
