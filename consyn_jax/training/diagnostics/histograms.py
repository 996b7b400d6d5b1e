"""Histograms of weights, and of the optimizer's mean gradients, for trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from consyn_jax.training.program import Program
from consyn_jax.training.step import TrainState

BINS = 64
MEAN_GRADIENT = "mu"  # optax's name of a first moment


class Histogram(NamedTuple):
    """A histogram of the finite values of an array.

    Attributes:
        counts: Number of values in each bin, [bins].
        edges: Edges of the bins, [bins + 1], at equal distances from the lowest to the highest
            value.
        total, squares: Sums of the values and of their squares.
    """

    counts: np.ndarray
    edges: np.ndarray
    total: float
    squares: float


def histogram_maker(program: Program) -> Callable[[TrainState], dict[str, Histogram]]:
    """Make the function that computes the histograms of a state, by name.

    All processes must call it together. Examples of names are `weights/q/3` and `gradients/q/3`,
    where 3 is the index of a layer. Gradients are averages over recent steps: the first moments of
    the optimizer. First moments in host memory have no histograms.
    """
    shapes = jax.tree_util.tree_leaves_with_path(program.layout.shapes)
    names = {path: (_name(path), leaf.shape) for path, leaf in shapes}
    everywhere = NamedSharding(program.mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=everywhere)
    def count(arrays: dict[str, jax.Array]) -> dict[str, Any]:
        return {name: _counted(x, _is_stacked(name)) for name, x in arrays.items()}

    def take(state: TrainState) -> dict[str, Histogram]:
        arrays = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            arrays[f"weights/{names[path][0]}"] = leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
            own = next((path[i:] for i in range(len(path)) if path[i:] in names), None)
            is_mean = any(getattr(key, "name", "") == MEAN_GRADIENT for key in path)
            if own is None or not is_mean or leaf.shape != names[own][1]:
                continue
            if leaf.sharding.memory_kind != "pinned_host":
                arrays[f"gradients/{names[own][0]}"] = leaf
        return dict(_histograms(jax.device_get(count(arrays))))

    return take


def _name(path: Any) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in path)


def _is_stacked(name: str) -> bool:
    return name.partition("/")[2].startswith("layers.")


def _counted(x: Float[Array, "..."], stacked: bool) -> tuple[jax.Array, ...]:
    """Compute statistics of the finite values, by layer.

    They are the lowest and the highest value, the number of values below each edge between two
    bins, the number of all values, their sum and their sum of squares.
    """
    rows = x.astype(jnp.float32).reshape(x.shape[0] if stacked else 1, -1)
    finite = jnp.isfinite(rows)
    low = jnp.min(jnp.where(finite, rows, jnp.inf), axis=1)
    high = jnp.max(jnp.where(finite, rows, -jnp.inf), axis=1)
    kept = jnp.where(finite, rows, 0.0)

    def below(share: Float[Array, ""]) -> jax.Array:  # reads the array, but does not copy it
        edge = (low + (high - low) * share)[:, None]
        return jnp.sum(finite & (rows < edge), axis=1, dtype=jnp.int32)

    cumulated = jax.lax.map(below, jnp.arange(1, BINS) / BINS)
    count = jnp.sum(finite, axis=1, dtype=jnp.int32)
    return low, high, cumulated, count, jnp.sum(kept, axis=1), jnp.sum(kept * kept, axis=1)


def _histograms(counted: dict[str, Any]) -> Iterator[tuple[str, Histogram]]:
    for name, (low, high, cumulated, count, total, squares) in counted.items():
        for layer in range(len(low)):
            if not count[layer]:  # no value is finite
                continue
            ends = np.array([0, *cumulated[:, layer], count[layer]])
            edges = np.linspace(low[layer], high[layer], BINS + 1)
            shown = name.replace("layers.", "") + f"/{layer}" if _is_stacked(name) else name
            sums = float(total[layer]), float(squares[layer])
            yield shown, Histogram(np.diff(ends), edges, *sums)
