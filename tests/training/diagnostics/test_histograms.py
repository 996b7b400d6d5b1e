"""Histograms of a state, against NumPy's."""

import jax
import numpy as np
import optax
import pytest
from tiny_program import program

from consyn_jax.training.diagnostics.histograms import BINS, histogram_maker
from consyn_jax.training.step import TrainState


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 4}], ids=["one", "eight"])
def test_they_are_those_of_numpy(axes: dict[str, int]) -> None:
    own = program(**axes)
    draw = np.random.default_rng(0)

    def tree() -> dict[str, object]:
        return jax.tree.map(
            lambda leaf, place: jax.device_put(
                draw.normal(size=leaf.shape).astype(np.float32), place
            ),
            own.layout.shapes,
            own.layout.shardings(own.mesh),
        )

    params, mean, squares = tree(), tree(), tree()
    damaged = np.array(params["layers"]["q"])
    damaged[1, 0, 0, 0] = np.nan
    params["layers"]["q"] = damaged
    moments = optax.ScaleByAdamState(np.zeros((), np.int32), mean, squares)
    state = TrainState(np.int32(3), params, (moments,), np.int32(0))
    found = histogram_maker(own)(jax.tree.map(jax.numpy.asarray, state))
    assert "weights/embedding" in found
    assert {name for name in found if "/q/" in name} == {
        f"{kind}/q/{layer}" for kind in ("weights", "gradients") for layer in (0, 1)
    }
    for name, x in {
        "weights/embedding": params["embedding"],
        "weights/q/1": damaged[1],
        "gradients/norm": mean["norm"],
        "gradients/down/0": mean["layers"]["down"][0],
    }.items():
        kept = np.asarray(x)[np.isfinite(x)]
        counts, edges = np.histogram(kept, BINS)
        assert found[name].counts.sum() == kept.size
        assert np.abs(found[name].counts - counts).sum() <= 4, "values at an edge"
        np.testing.assert_allclose(found[name].edges, edges, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[name].total, kept.sum(), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found[name].squares, (kept**2).sum(), rtol=1e-3)
