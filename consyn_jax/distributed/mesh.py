"""The device mesh, and the one table that says which mesh axis each logical axis of an array is split over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from consyn_jax.config import UserError, nearest
from consyn_jax.validation import natural

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. `data` replicates the weights, `fsdp` splits them and the batch, `context` splits sequences, `tensor`
# splits heads, feed-forward and vocabulary. A new part of the model names its axes from here; it never names a mesh axis.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("context",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "layers": (),
    "head_dim": (),
    "norm": (),
    None: (),
}


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """The `PartitionSpec` of an array whose dimensions have these logical names.

    Raises:
        ValueError: two dimensions would be split over one mesh axis, or a name is not in `RULES`.

    >>> tuple(partition_spec(("batch", "sequence", None)))
    (('data', 'fsdp'), 'context', None)
    """
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for logical in logical_axes:
        if logical not in RULES:
            raise ValueError(f"Logical axis {logical!r} is not in the sharding table; known: {', '.join(map(str, RULES))}.")
        axes = RULES[logical]
        if used & set(axes):
            raise ValueError(f"Axes {tuple(logical_axes)} collide: two of them are split over mesh axis {(used & set(axes)).pop()!r}.")
        used |= set(axes)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """How an array with these logical axes lies on `mesh`."""
    return NamedSharding(mesh, partition_spec(logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Ask the compiler to lay `x` out by the table; without a mesh in context (`jax.set_mesh`) it stays as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes))


def mesh_sizes() -> dict[str, int]:
    """Sizes of the axes of the mesh in context (`jax.set_mesh`); without one, all are 1."""
    return dict.fromkeys(AXES, 1) | dict(jax.sharding.get_abstract_mesh().shape)


def split_axes(sizes: dict[str, int], *logical_axes: str) -> tuple[str, ...]:
    """The mesh axes over which these logical ones are split on a mesh of such sizes.

    >>> split_axes({"data": 1, "fsdp": 4, "context": 2, "tensor": 1}, "batch", "sequence", "vocab")
    ('fsdp', 'context')
    """
    return tuple(axis for logical in logical_axes for axis in RULES[logical] if sizes[axis] > 1)


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Sizes of the four axes from a `--mesh` such as "data=2,fsdp=4".

    Raises:
        UserError: an unknown axis, a size that is no positive number, or a product other than `num_devices`.

    >>> parse_mesh("data=2,tensor=2", 4)
    {'data': 2, 'fsdp': 1, 'context': 1, 'tensor': 2}
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise UserError(f"--mesh has no axis {axis!r}{nearest(axis, AXES)} Write it as data=2,fsdp=4; the axes are {', '.join(AXES)}.")
        sizes[axis] = natural(size) or 0
        if sizes[axis] == 0:
            raise UserError(f"--mesh {axis} wants a whole number of devices, not {size!r}.")
    if math.prod(sizes.values()) != num_devices:
        raise UserError(f"--mesh {text} is for {math.prod(sizes.values())} devices, and there are {num_devices}. Make the product of the axes {num_devices}.")
    return sizes


def build_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all four axes, in an order of devices that suits the machine's network."""
    shape = tuple(sizes[axis] for axis in AXES)
    if devices is None:
        devices = jax.devices()
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(sizes: dict[str, int], batch_size: int, max_tokens: int) -> None:
    """The mesh must divide the micro-batch and the sequence.

    Raises:
        UserError: naming the nearest values that work.
    """
    rows = sizes["data"] * sizes["fsdp"]
    if batch_size % rows:
        raise UserError(f"--batch_size {batch_size} does not divide over {rows} devices (data x fsdp). Use {_around(batch_size, rows)}.")
    if max_tokens % sizes["context"]:
        raise UserError(f"--max_tokens {max_tokens} does not divide over context={sizes['context']} devices. Use {_around(max_tokens, sizes['context'])}.")


def check_model(sizes: dict[str, int], dimensions: dict[str, int]) -> None:
    """The mesh must divide the model's dimensions, given by flag name.

    Raises:
        UserError: naming the dimension and the axis.
    """
    for name, size in dimensions.items():
        axis = "fsdp" if name == "hidden_dim" else "tensor"
        if size % sizes[axis]:
            raise UserError(f"--mesh {axis}={sizes[axis]} does not divide --{name} {size}. Use {axis} of {', '.join(map(str, _divisors_upto(size, 64)))}.")


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Which rows of a global batch of `num_rows` this process holds, ascending."""
    spec = sharding(mesh, ("batch",))
    index_of = spec.addressable_devices_indices_map((num_rows,))
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in index_of.values() if index is not None]))


def placer(mesh: Mesh, logical_axes: Sequence[str | None]) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
    """Puts this process's rows of a batch where a program on `mesh` wants them."""
    where = sharding(mesh, logical_axes)
    return lambda batch: {name: jax.make_array_from_process_local_data(where, values) for name, values in batch.items()}


def _around(n: int, of: int) -> str:
    below = n // of * of
    return f"{below} or {below + of}" if below else str(of)


def _divisors_upto(n: int, limit: int) -> list[int]:
    return [d for d in range(1, min(n, limit) + 1) if n % d == 0]
