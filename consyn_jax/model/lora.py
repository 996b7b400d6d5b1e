"""LoRA: low-rank adapters beside the matrices of the blocks (Hu et al., 2021).

The adapter is a tree with the names of the model's parameters, and holds arrays `a` and `b` for
each adapted matrix. The frozen weights of the model (the base) are another tree, whose leaves are
arrays or quantised matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from consyn_jax.distributed.mesh import RULES, sharding
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.matrices.frozen_matrix import INPUTS, FrozenMatrix
from consyn_jax.model.matrices.quantised_matrix import (
    Int8Matrix,
    Nf4Matrix,
    normal_floats,
    quantised,
)
from consyn_jax.model.parameters import Convert, Layout, Params, layout
from consyn_jax.model_config import LoraOptions, ModelConfig

Axes = tuple[str | None, ...]
_ADAPTER = 0x10A4  # folded into keys, so that these draws differ from others of the same seed


def trained_layout(config: ModelConfig, options: LoraOptions) -> Layout:
    """The layout of the parameters that a run trains: an adapter, or the whole model."""
    return adapter_layout(config, options) if options.is_used else layout(config)


@cache
def adapter_layout(config: ModelConfig, options: LoraOptions) -> Layout:
    """Shapes and logical axes of an adapter's arrays, with the `graphdef` of the whole model."""
    whole = layout(config)
    shapes: Params = {}
    axes: Params = {}
    for name in options.targets:
        own, names = whole.shapes["layers"][name].shape, whole.logical_axes["layers"][name]
        cut, rank = 1 + INPUTS[name], (options.rank,)
        shapes[name] = {
            "a": jax.ShapeDtypeStruct(own[:cut] + rank, jnp.float32),
            "b": jax.ShapeDtypeStruct(own[:1] + rank + own[cut:], jnp.float32),
        }
        axes[name] = {"a": (*names[:cut], "rank"), "b": (names[0], "rank", *names[cut:])}
    return Layout(whole.graphdef, {"layers": shapes}, {"layers": axes})


def initial_adapter(config: ModelConfig, options: LoraOptions, seed: int, mesh: Mesh) -> Params:
    """Create an adapter that does not change the model's output yet: `a` is random, `b` is zero.

    As in PEFT, `a` is uniform between plus and minus 1 / sqrt(inputs). A seed gives the same bits
    on every mesh.
    """
    form = adapter_layout(config, options)

    def make() -> Params:
        key = jax.random.fold_in(jax.random.key(seed), _ADAPTER)

        def values(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name, part = (k.key for k in path[1:])
            if part == "b":
                return jnp.zeros(leaf.shape)
            own = jax.random.fold_in(key, list(INPUTS).index(name))
            bound = math.prod(leaf.shape[1:-1]) ** -0.5
            return jax.random.uniform(own, leaf.shape, minval=-bound, maxval=bound)

        return jax.tree_util.tree_map_with_path(values, form.shapes)

    with jax.threefry_partitionable(True):
        return jax.jit(make, out_shardings=form.shardings(mesh))()


def with_adapter(
    base: Params, adapter: Params, options: LoraOptions, dropout_key: jax.Array | None = None
) -> Params:
    """Combine frozen matrices and their adapter into the parameters of a `Decoder`.

    Args:
        dropout_key: Random key of the micro-batch; None without dropout.
    """
    layers: Params = dict(base["layers"])
    for number, name in enumerate(INPUTS):
        own = adapter["layers"].get(name)
        keys = None
        if own is not None and dropout_key is not None and options.lora_dropout:
            there = Dropout(dropout_key, options.lora_dropout).at(_ADAPTER + number)
            keys = jax.vmap(lambda layer, there=there: there.at(layer).key)(
                jnp.arange(own["a"].shape[0])
            )
        layers[name] = FrozenMatrix(
            layers[name],
            None if own is None else own["a"],
            None if own is None else own["b"],
            keys,
            options.scale,
            options.lora_dropout,
        )
    return {**base, "layers": layers}


@partial(jax.jit, static_argnums=2)
def merged(base: Params, adapter: Params, options: LoraOptions) -> Params:
    """Add an adapter to the base, and return the full parameters in the dtypes of the base."""
    layers = dict(base["layers"])
    for name, own in adapter["layers"].items():
        w, cut = layers[name], 1 + INPUTS[name]
        a, b = (own[part].astype(jnp.float32) for part in "ab")
        size, rank = math.prod(w.shape[1:cut]), options.rank
        change = a.reshape(-1, size, rank) @ b.reshape(-1, rank, math.prod(w.shape[cut:]))
        layers[name] = (w + options.scale * change.reshape(w.shape)).astype(w.dtype)
    return {**base, "layers": layers}


# --------------------------------------------------------------------------------------- the base


class BaseTypes(NamedTuple):
    """Dtypes of the frozen base; norms and biases are always float32.

    Attributes:
        matrices: Type of the matrices of the blocks: float32, bfloat16, int8 or nf4.
        tables: Type of the embeddings: float32 or bfloat16.
    """

    matrices: str
    tables: str


def base_types(options: LoraOptions, compute_dtype: Any) -> BaseTypes | None:
    """Dtypes of the frozen base in a run that computes in `compute_dtype`; None without LoRA.

    With --lora_base_dtype auto, the base has the compute dtype. In a run in bfloat16, this does not
    change the results, because the matmuls round the weights to bfloat16 anyway. With int8 or nf4,
    the matrices are quantised, and the embeddings have the compute dtype.
    """
    if not options.is_used:
        return None
    plain = "bfloat16" if compute_dtype == jnp.bfloat16 else "float32"
    wanted = plain if options.lora_base_dtype == "auto" else options.lora_base_dtype
    return BaseTypes(wanted, wanted if wanted in ("float32", "bfloat16") else plain)


def base_like(config: ModelConfig, types: BaseTypes, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the frozen weights, as a tree of `jax.ShapeDtypeStruct`."""
    form = layout(config)

    def shape_of(path: Any, leaf: jax.ShapeDtypeStruct, axes: Axes) -> Any:
        keys = tuple(k.key for k in path)
        like = jax.eval_shape(_rounding(keys, axes, types), leaf)
        return _placed(like, axes, mesh, INPUTS.get(keys[-1], 1))

    return jax.tree_util.tree_map_with_path(shape_of, form.shapes, form.logical_axes)


def base_rounding(config: ModelConfig, types: BaseTypes, mesh: Mesh) -> Convert:
    """Return a function that converts a parameter, given its path, to its dtype in the frozen base.

    Layers are rounded one at a time, so that the conversion holds at most one layer in float32.
    """
    axes_of, like = layout(config).logical_axes, base_like(config, types, mesh)

    def convert(path: tuple[str, ...], values: jax.Array) -> Any:
        axes: Any = axes_of
        wanted: Any = like
        for key in path:
            axes, wanted = axes[key], wanted[key]
        places = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        return jax.jit(_rounding(path, axes, types), out_shardings=places)(values)

    return convert


def _rounding(path: tuple[str, ...], axes: Axes, types: BaseTypes) -> Callable[[Any], Any]:
    """Return a function that rounds the parameter at `path` to its dtype in the frozen base."""
    if path[0] == "layers" and path[-1] in INPUTS:
        kinds = {"int8": quantised, "nf4": normal_floats}
        if types.matrices in kinds:
            rounded = partial(kinds[types.matrices], inputs=INPUTS[path[-1]])
            return lambda w: jax.lax.map(rounded, w)
        return lambda w: w.astype(types.matrices)
    return lambda w: w.astype(types.tables if "vocab" in axes else jnp.float32)


def _placed(like: Any, axes: Axes, mesh: Mesh, inputs: int) -> Any:
    """Add shardings to the shapes and dtypes of a rounded parameter.

    Args:
        inputs: Number of input dimensions of a matrix.
    """
    if isinstance(like, Int8Matrix):
        of_scale = (axes[0], *axes[1 + inputs :])
        return Int8Matrix(_on(mesh, like.values, axes), _on(mesh, like.scale, of_scale))
    if isinstance(like, Nf4Matrix):
        outputs = axes[1 + inputs :]
        # Only the first input axis is sharded. Codes and scales have the axis of blocks instead.
        codes = _on(mesh, like.codes, (axes[0], axes[1], None, *outputs))
        largest = _on(mesh, like.largest, (axes[0], axes[1], *outputs))
        return Nf4Matrix(codes, largest, like.inputs)
    return _on(mesh, like, axes)


def _on(mesh: Mesh, leaf: Any, axes: Axes) -> jax.ShapeDtypeStruct:
    """Shard an array over the mesh along dimensions that divide evenly, and replicate the rest."""

    def divides(axis: str | None, size: int) -> bool:
        return size % math.prod(mesh.shape[name] for name in RULES[axis]) == 0

    kept = [axis if divides(axis, n) else None for axis, n in zip(axes, leaf.shape, strict=True)]
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, kept))
