"""The parameters of a `Decoder` as a plain pytree: shapes, logical axes and initial values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from consyn_jax.distributed.mesh import sharding
from consyn_jax.model.transformer import Block, Decoder
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import BaseShape

Params = dict[str, Any]
# Type of functions that convert a parameter: they take its path and values, and return new values.
Convert = Callable[[tuple[str, ...], jax.Array], Any]
# Initialisation runs once, so compile time matters more than run time. On CPUs, this option
# compiles in a quarter of the time, and gives the same bits.
COMPILE_QUICKLY = {"cpu": {"xla_backend_optimization_level": 1}}


def unchanged(path: tuple[str, ...], values: jax.Array) -> jax.Array:
    """Return `values` unchanged; the default conversion of `load_parameters`."""
    return values


def map_axes(function: Callable[..., Any], logical_axes: Params, *trees: Any) -> Any:
    """Map `function` over a tree of logical axes (tuples) and trees of the same structure."""
    return jax.tree.map(function, logical_axes, *trees, is_leaf=lambda a: isinstance(a, tuple))


class Layout(NamedTuple):
    """Structure, shapes and logical axes of a model's parameters, without their values.

    Attributes:
        graphdef: Structure of the module; `nnx.merge(graphdef, params)` builds a `Decoder`.
        shapes: Shape and dtype of each parameter.
        logical_axes: Names of each parameter's axes, which `distributed/mesh.py` maps to the mesh.
    """

    graphdef: Any
    shapes: Params
    logical_axes: Params

    def shardings(self, mesh: Mesh) -> Params:
        """The sharding of each parameter on `mesh`."""
        return map_axes(partial(sharding, mesh), self.logical_axes)

    @property
    def num_parameters(self) -> int:
        """Number of elements in all parameters, including the rows that pad the vocabulary."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))


@cache
def layout(config: ModelConfig) -> Layout:
    """The layout of the model that `config` describes, found without allocating parameters.

    >>> from consyn_jax.resolve import preset_architecture
    >>> layout(preset_architecture("verse")).num_parameters
    122704128
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))

    def axes(path: Any, variable: Any) -> tuple[str | None, ...]:
        own = variable.get_metadata("axes")
        return ("layers", *own) if path[0].key == "layers" else own

    logical_axes = jax.tree_util.tree_map_with_path(
        axes, state, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), nnx.to_pure_dict(state)
    )
    return Layout(graphdef, shapes, _as_dict(logical_axes))


@cache
def forward_order(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Names of all parameters, in the order in which the forward pass uses them.

    Returns:
        A dict with the names of the parameters outside the blocks as keys, and empty tuples as
        values. The value of the key "layers" has the names of the parameters of one block.
    """
    order: dict[str, tuple[str, ...]] = {}

    def trace() -> None:
        for name, value in vars(Decoder(config, nnx.Rngs(0))).items():
            if isinstance(value, nnx.Param):
                order[name] = ()
            elif isinstance(value, Block):  # not from the stacked block, whose names are sorted
                order[name] = tuple(
                    inner
                    for inner, parameter in vars(Block(config, nnx.Rngs(0))).items()
                    if isinstance(parameter, nnx.Param)
                )

    jax.eval_shape(trace)
    return order


def initial_parameters(
    config: ModelConfig, seed: int, mesh: Mesh | None = None, base: BaseShape | None = None
) -> Params:
    """Initial float32 parameters, created in their final sharding.

    A seed gives the same bits on every mesh, because the random generator (threefry) derives each
    element's bits from the element's index.

    Args:
        base: Shape of muP's base model; None in the standard parametrization.
    """
    with jax.threefry_partitionable(True):
        made: Params = _initialiser(config, mesh, base)(np.uint32(seed))
    return made


@cache
def _initialiser(
    config: ModelConfig, mesh: Mesh | None, base: BaseShape | None
) -> Callable[[np.uint32], Params]:
    """Return the compiled function that makes initial parameters from a seed.

    The function is cached, because the trials of a tuning study share it.
    """

    def make(seed: jax.Array) -> Params:
        params = nnx.to_pure_dict(nnx.split(Decoder(config, nnx.Rngs(jax.random.key(seed))))[1])
        if base is None:
            return params
        return jax.tree.map(lambda x, f: x * f.initial, params, mup_factors(config, base, params))

    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jax.jit(
        make,
        out_shardings=layout(config).shardings(mesh) if mesh is not None else None,
        compiler_options=COMPILE_QUICKLY.get(platform),
    )


IN_BLOCKS = ("q", "k", "v", "o", "gate", "up", "down")
TO_RESIDUAL = ("o", "o_bias", "down", "down_bias")


class MupFactors(NamedTuple):
    """muP's factors for the initial values and the learning rate of a parameter.

    With these factors, a learning rate tuned on a small base model also suits a wider or deeper
    model. The factors for width follow Yang et al. (2022, table 3, for Adam). The factors for depth
    follow CompleteP (Dey et al., 2025, with alpha = 1).

    The published tables multiply some activations by a factor m. Here, the weights are scaled
    instead, so that the saved model is an ordinary one and needs no multipliers. This is
    equivalent for optimizers whose update does not depend on the size of the gradient: the initial
    values and the learning rate are multiplied by m, and weight decay is divided by m.

    Attributes:
        initial: Factor of the initial values.
        rate: Factor of the learning rate.
    """

    initial: float
    rate: float


def mup_factors(config: ModelConfig, base: BaseShape, tree: Any) -> Any:
    """Return the `MupFactors` of each parameter, in the structure of `tree`.

    Args:
        tree: Tree of parameters, or of their logical axes.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _mup_factors(path[-1].key, config, base),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def _mup_factors(name: str, config: ModelConfig, base: BaseShape) -> MupFactors:
    width = config.hidden_dim / base.hidden_dim
    depth = config.num_layers / base.num_layers
    initial, m = 1.0, 1.0
    if name in TO_RESIDUAL:
        m = 1 / depth  # keeps the sum of all branches as large as in the base, even if they agree
        initial = depth**0.5  # replaces the model's own factor (2 L)^-0.5 by the base's
    elif name == "norm" and config.tie_embeddings:
        m = 1 / width  # scales the logits; a tied output embedding has the input's factors
    elif name in (("q_norm",) if config.qk_norm else ("q", "q_bias")):
        m = (base.head_dim / config.head_dim) ** 0.5  # divides scores by head_dim, not its root
    rate = 1 / width if name in IN_BLOCKS or name == "output" else 1.0
    return MupFactors(initial * m, rate * m)


def _as_dict(state: Any) -> Params:
    return {
        key: value if isinstance(value, tuple) else _as_dict(value) for key, value in state.items()
    }
