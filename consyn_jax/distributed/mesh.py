"""The device mesh, and the table that maps logical axes of arrays to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from consyn_jax.errors import UserError, nearest
from consyn_jax.integers import divisors, natural, neighbours

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. `data` replicates the weights, `fsdp` splits them and the batch,
# `context` splits sequences, `tensor` splits heads, feed-forward and vocabulary. Model code names
# logical axes from this table and never a mesh axis.
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
    "rank": (),
    None: (),
}


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """The `PartitionSpec` of an array whose dimensions have these logical names.

    Raises:
        ValueError: Two dimensions would be sharded over the same mesh axis, or a name is not in
            `RULES`.

    >>> tuple(partition_spec(("batch", "sequence", None)))
    (('data', 'fsdp'), 'context', None)
    """
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for logical in logical_axes:
        if logical not in RULES:
            raise ValueError(
                f"Logical axis {logical!r} is not in the sharding table; "
                f"known: {', '.join(map(str, RULES))}."
            )
        axes = RULES[logical]
        if used & set(axes):
            raise ValueError(
                f"Axes {tuple(logical_axes)} collide: two of them would be sharded over mesh axis "
                f"{(used & set(axes)).pop()!r}."
            )
        used |= set(axes)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """The sharding on `mesh` of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrain the sharding of `x` by its logical axes; without a current mesh, return `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes))


def on_each_device(
    local: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
    """Wrap `local` in `shard_map` to run on each device's shards; without a mesh, return `local`.

    Args:
        in_axes: Logical axes of each argument, a tuple or a tree of tuples; None for a missing
            array.
        out_axes: Logical axes of the result, in the same form.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return local

    def is_axes(node: Any) -> bool:
        return isinstance(node, tuple) and all(a is None or isinstance(a, str) for a in node)

    in_specs, out_specs = jax.tree.map(partition_spec, (in_axes, out_axes), is_leaf=is_axes)
    # check_vma is off because custom calls of kernels do not declare over which mesh axes their
    # results vary.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mesh_sizes() -> dict[str, int]:
    """Axis sizes of the current mesh (`jax.set_mesh`); all 1 if none is set."""
    return dict.fromkeys(AXES, 1) | dict(jax.sharding.get_abstract_mesh().shape)


def split_axes(sizes: dict[str, int], *logical_axes: str) -> tuple[str, ...]:
    """Return the mesh axes, of size above 1, over which any of these logical axes is sharded.

    >>> split_axes({"data": 1, "fsdp": 4, "context": 2, "tensor": 1}, "batch", "sequence", "vocab")
    ('fsdp', 'context')
    """
    return tuple(axis for logical in logical_axes for axis in RULES[logical] if sizes[axis] > 1)


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Parse a value of `--mesh` such as "data=2,fsdp=4" into the sizes of all four axes.

    Raises:
        UserError: An axis is unknown, a size is not a positive number, or the product of the sizes
            is not `num_devices`.

    >>> parse_mesh("data=2,tensor=2", 4)
    {'data': 2, 'fsdp': 1, 'context': 1, 'tensor': 2}
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise UserError(
                f"--mesh has no axis {axis!r}{nearest(axis, AXES)} Write it as data=2,fsdp=4; "
                f"the axes are {', '.join(AXES)}."
            )
        sizes[axis] = natural(size) or 0
        if sizes[axis] == 0:
            raise UserError(f"--mesh {axis} must be a whole number of devices, not {size!r}.")
    if math.prod(sizes.values()) != num_devices:
        raise UserError(
            f"--mesh {text} is for {math.prod(sizes.values())} devices, and there are "
            f"{num_devices}. Make the product of the axes {num_devices}."
        )
    return sizes


def build_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build a mesh with all four axes; JAX chooses the order of the devices to suit the network.

    For several TPU slices, the outer axes are split over the slices, because the network between
    slices is slower than the links inside a slice. `jax.make_mesh` does not support several slices.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    devices = list(jax.devices() if devices is None else devices)[: math.prod(shape)]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and slices > 1:
        outer = across_slices(shape, slices)
        inner = [size // over for size, over in zip(shape, outer, strict=True)]
        arranged = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    else:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def across_slices(shape: Sequence[int], slices: int) -> tuple[int, ...]:
    """Return the number of slices over which each axis is split; outer axes are split first.

    >>> across_slices((4, 8, 1, 1), 2), across_slices((1, 16, 1, 1), 2)
    ((2, 1, 1, 1), (1, 2, 1, 1))
    """
    outer = []
    for size in shape:
        outer.append(math.gcd(size, slices))
        slices //= outer[-1]
    return tuple(outer)


def check_batch(
    sizes: dict[str, int], batch_size: int, max_tokens: int, sequences: int = 1
) -> None:
    """Check that the mesh divides the micro-batch and the length of a row.

    Args:
        max_tokens: Tokens per sequence.
        sequences: Sequences per row.

    Raises:
        UserError: A size is not divisible; the message gives the nearest valid sizes.
    """
    rows = sizes["data"] * sizes["fsdp"]
    if batch_size % rows:
        raise UserError(
            f"--batch_size {batch_size} does not divide over {rows} devices (data x fsdp). "
            f"Use {' or '.join(map(str, neighbours(batch_size, rows)))}."
        )
    context = sizes["context"]
    if max_tokens * sequences % context:
        fitting = neighbours(max_tokens, context // math.gcd(context, sequences))
        raise UserError(
            f"--max_tokens {max_tokens} does not divide over context={context} devices. "
            f"Use {' or '.join(map(str, fitting))}."
        )


def check_model(sizes: dict[str, int], dimensions: dict[str, int]) -> None:
    """Check that the mesh divides the sizes of the model.

    Args:
        dimensions: Sizes of the model, by the name of their flag.

    Raises:
        UserError: A size is not divisible; the message names the size and the mesh axis.
    """
    for name, size in dimensions.items():
        axis = "fsdp" if name == "hidden_dim" else "tensor"
        if size % sizes[axis]:
            working = ", ".join(str(divisor) for divisor in divisors(size) if divisor <= 64)
            raise UserError(
                f"--mesh {axis}={sizes[axis]} does not divide --{name} {size}. "
                f"Use {axis} of {working}."
            )


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Return the sorted indices of the rows of a global batch that this process's devices hold."""
    spec = sharding(mesh, ("batch",))
    index_of = spec.addressable_devices_indices_map((num_rows,))
    return np.unique(
        np.concatenate(
            [np.arange(num_rows)[index] for index in index_of.values() if index is not None]
        )
    )


def placer(
    mesh: Mesh, logical_axes: Sequence[str | None]
) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
    """Return a function that copies this process's rows of a batch to its devices in `mesh`.

    An array with fewer dimensions than `logical_axes` uses the first axes.
    """
    where = [sharding(mesh, logical_axes[:rank]) for rank in range(len(logical_axes) + 1)]
    return lambda batch: {
        name: jax.make_array_from_process_local_data(where[values.ndim], values)
        for name, values in batch.items()
    }
