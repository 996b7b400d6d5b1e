"""Mapping between the tensors of a Hugging Face checkpoint and the parameters of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from consyn_jax.errors import UserError
from consyn_jax.model.parameters import layout
from consyn_jax.model.pretrained.config_json import family_of
from consyn_jax.model.pretrained.families.llama import OUTSIDE_BLOCKS
from consyn_jax.model.rope import partial_order
from consyn_jax.model_config import ModelConfig

ROTATED = ("q", "q_bias", "q_norm", "k", "k_bias", "k_norm")  # parameters whose heads rotate


class Part(NamedTuple):
    """Rows of a tensor that hold a parameter, or one layer of a stacked parameter.

    Attributes:
        path: Keys of the parameter in the tree of parameters.
        layer: Index of the layer; None for a parameter outside the blocks.
        shape: Shape of the rows in torch's layout: [outputs, inputs] or [elements].
        own_shape: Shape of the parameter, or of one layer of a stacked parameter.
        order: For each element of a head in the parameter, its index in the file; None if the
            order is the same.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    order: np.ndarray | None = None

    def read(
        self, read: Callable[[slice, slice | None], np.ndarray], index: tuple[slice, ...]
    ) -> np.ndarray:
        """Read a slice of the parameter or layer that this part holds, in the dtype of the file.

        Args:
            read: Function that reads from the tensor. It takes a slice of this part's rows, and a
                slice of the columns (None if the tensor is a vector).
            index: The slice to read: a start and a stop for each dimension of `own_shape`.
        """
        if self.layer is None:
            return self._padded(read, index)
        num_columns = self.shape[1] if len(self.shape) == 2 else 1
        split = next(
            n for n in range(len(self.own_shape)) if math.prod(self.own_shape[:n]) == num_columns
        )  # the parameter's first dimensions are the columns
        columns, of_columns = _span(self.own_shape[:split], index[:split])
        rows, of_rows = _span(self.own_shape[split:], index[split:])
        value = read(rows, columns if len(self.shape) == 2 else None).T
        value = value.reshape(*of_columns.shape, *of_rows.shape)
        value = value if self.order is None else value[..., self.order]
        return value[of_columns.wanted + of_rows.wanted]

    def _padded(self, read: Callable[..., np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice of a parameter outside the blocks; rows that pad the vocabulary are zero."""
        first, *rest = index
        stop = min(first.stop, self.shape[0])
        value = read(slice(min(first.start, stop), stop), rest[0] if rest else None)
        missing = first.stop - first.start - value.shape[0]
        return np.pad(value, [(0, missing)] + [(0, 0)] * len(rest)) if missing else value

    def to_rows(self, value: np.ndarray) -> np.ndarray:
        """Convert the full parameter or layer that this part holds to rows of the tensor."""
        if self.layer is None:
            return value[: self.shape[0]]
        if self.order is not None:
            value = value[..., np.argsort(self.order)]
        return value.reshape(self.shape[::-1]).T


class _Span(NamedTuple):
    """A range of array elements that is read to get a slice of the array.

    Attributes:
        shape: Shape of the elements that are read.
        wanted: Index of the requested slice within these elements.
    """

    shape: tuple[int, ...]
    wanted: tuple[slice, ...]


def _span(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, _Span]:
    """Find a contiguous range of the flattened array that covers `index`.

    The range is the entire array, unless `index` slices only the first dimension.
    """
    inner = math.prod(shape[1:])
    if index and all(i == slice(0, size) for i, size in zip(index[1:], shape[1:], strict=True)):
        first = index[0]
        cut = (first.stop - first.start, *shape[1:])
        whole = tuple(slice(0, size) for size in cut)
        return slice(first.start * inner, first.stop * inner), _Span(cut, whole)
    return slice(0, math.prod(shape)), _Span(shape, index)


class Tensor(NamedTuple):
    """A tensor of a checkpoint, whose rows are the concatenated rows of its parts."""

    name: str
    parts: tuple[Part, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def rows(self, part: Part) -> slice:
        """Rows of the tensor that hold `part`."""
        start = sum(other.shape[0] for other in self.parts[: self.parts.index(part)])
        return slice(start, start + part.shape[0])


def hf_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Yield all tensors of a checkpoint of this architecture, in file order."""
    others = dict(item.rsplit("=", 1) for item in config.files.other_dtypes)
    for name, parts in _named_parts(config):
        yield Tensor(name, parts, others.get(name, config.files.dtype))


def _named_parts(config: ModelConfig) -> Iterator[tuple[str, tuple[Part, ...]]]:
    form, block = layout(config), family_of(config).block
    for key, name in OUTSIDE_BLOCKS.items():
        is_copy = key == "output" and key not in form.shapes and config.files.has_tied_head
        key = "embedding" if is_copy else key
        if key in form.shapes:
            rows, *rest = form.shapes[key].shape
            # Files do not contain the rows that pad the vocabulary.
            shape = (config.vocab_size if rest else rows, *rest)
            yield name, (Part((key,), None, shape, form.shapes[key].shape),)
    shapes, axes = form.shapes["layers"], form.logical_axes["layers"]
    order = partial_order(config) if config.rotary_dim < config.head_dim else None
    keys: dict[str, list[str]] = {}
    for key, name in block.items():
        if key in shapes:
            keys.setdefault(name, []).append(key)
    for layer in range(config.num_layers):
        for name, members in keys.items():
            parts = []
            for key in members:
                own = shapes[key].shape[1:]
                shape = _torch_shape(own, axes[key][1:])
                moved = order if key in ROTATED else None
                parts.append(Part(("layers", key), layer, shape, own, moved))
            yield f"model.layers.{layer}.{name}", tuple(parts)


def _torch_shape(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """Shape of a parameter in torch's layout: [outputs, inputs], or [elements] of a vector.

    The axis "embed" is the residual stream; it is the input or the output of every matrix.
    """
    if "embed" not in axes:
        return (math.prod(shape),)
    inputs = shape[0] if axes[0] == "embed" else math.prod(shape[:-1])
    return math.prod(shape) // inputs, inputs


def on_host(values: jax.Array | np.ndarray) -> np.ndarray:
    """Gather a sharded array in host memory; all processes of a run must call this function."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return np.asarray(values)
    return np.asarray(multihost_utils.process_allgather(values, tiled=True))


def rounded(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """Round the values of the tensor `name` to the dtype of the file.

    Raises:
        UserError: A value is too large for float16.
    """
    with np.errstate(over="ignore"):
        array = values.astype(jnp.dtype(dtype))
    if dtype == "float16" and np.isinf(array).any():
        raise UserError(
            f"{name} has values that float16 cannot hold. Set --save_dtype to bfloat16 or float32."
        )
    return np.ascontiguousarray(array)
