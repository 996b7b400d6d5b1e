"""The parameters of a `Decoder` as a plain pytree: their shapes and logical axes, made without allocating, and their first values."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from consyn_jax.config import ModelConfig
from consyn_jax.distributed.mesh import sharding
from consyn_jax.model.transformer import Decoder

Params = dict[str, Any]
# What runs once need not run well: on CPUs this compiles in a quarter of the time, to the same bits.
QUICKLY = {"cpu": {"xla_backend_optimization_level": 1}}


class Layout(NamedTuple):
    """What is known of a model before it exists: `nnx.merge(graphdef, params)` gives the `Decoder` back."""

    graphdef: Any
    shapes: Params
    logical_axes: Params

    def shardings(self, mesh: Mesh) -> Params:
        """Where each parameter lies on `mesh`."""
        return jax.tree.map(partial(sharding, mesh), self.logical_axes, is_leaf=lambda a: isinstance(a, tuple))

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, vocabulary padding included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))


@cache
def layout(config: ModelConfig) -> Layout:
    """The layout of the model that `config` describes; nothing is allocated.

    >>> from consyn_jax.resolve import preset_architecture
    >>> layout(preset_architecture("verse")).num_parameters
    122704128
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))

    def axes(path: Any, variable: Any) -> tuple[str | None, ...]:
        own = variable.get_metadata("axes")
        return ("layers", *own) if path[0].key == "layers" else own

    logical_axes = jax.tree_util.tree_map_with_path(axes, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), nnx.to_pure_dict(state))
    return Layout(graphdef, shapes, _as_dict(logical_axes))


def initial_parameters(config: ModelConfig, seed: int, mesh: Mesh | None = None) -> Params:
    """First values, float32, made where they will lie. The same seed gives the same bits on every mesh (threefry counts by element)."""

    def make() -> Params:
        return nnx.to_pure_dict(nnx.split(Decoder(config, nnx.Rngs(seed)))[1])

    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    with jax.threefry_partitionable(True):
        return jax.jit(make, out_shardings=layout(config).shardings(mesh) if mesh is not None else None, compiler_options=QUICKLY.get(platform))()


def _as_dict(state: Any) -> Params:
    return {key: value if isinstance(value, tuple) else _as_dict(value) for key, value in state.items()}
