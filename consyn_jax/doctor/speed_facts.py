"""The speed of each device: one large matmul, and one copy in its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

MEASURE_S = 0.3  # of work that is timed, after compiling and one untimed call


@dataclass(frozen=True)
class Work:
    """The sizes that are timed.

    Attributes:
        matmul: both matrices have this many rows and columns.
        copy_bytes: size of the array that is copied.
    """

    matmul: int
    dtype: str
    copy_bytes: int


# On a GPU a product of 8192 takes about a millisecond, and a copy of 1 GB passes its caches. Train
# steps on the CPU compute in float32.
GPU_WORK = Work(8192, "bfloat16", 1 << 30)
CPU_WORK = Work(1024, "float32", 1 << 26)


@dataclass(frozen=True)
class Speed:
    """The rates that one device reached.

    Attributes:
        kind: the device's name.
        matmul_flops: FLOP/s, counting a product of n x n as 2 n^3.
        copy_bandwidth: bytes per second, read and written together.
        problem: why it could not be measured; empty if it was.
    """

    kind: str
    dtype: str = ""
    matmul_flops: float = 0.0
    copy_bandwidth: float = 0.0
    problem: str = ""


def measure_speed(
    device: jax.Device, work: Work | None = None, while_busy: Callable[[], None] = lambda: None
) -> Speed:
    """Time a matmul and a copy on one device, for about a second in all.

    Args:
        work: the sizes; None for those that suit the device.
        while_busy: called while the device computes products.
    """
    import jax
    import jax.numpy as jnp

    work = work or (CPU_WORK if device.platform == "cpu" else GPU_WORK)
    try:
        with jax.default_device(device):
            n, dtype = work.matmul, jnp.dtype(work.dtype)
            # Random numbers: a GPU is faster with zeros, as these take less power.
            a, b = (jax.random.normal(jax.random.key(seed), (n, n), dtype) for seed in range(2))
            product_s = _seconds(jax.jit(jnp.matmul), (a, b), while_busy)
            del a, b
            array = jnp.zeros(work.copy_bytes // 4, jnp.float32)
            copy_s = _seconds(jax.jit(lambda x: x + 1), (array,))
    except jax.errors.JaxRuntimeError as error:  # such as no memory
        return Speed(device.device_kind, problem=str(error).strip().partition("\n")[0])
    return Speed(device.device_kind, dtype.name, 2 * n**3 / product_s, 2 * work.copy_bytes / copy_s)


def _seconds(
    call: Callable[..., Any], inputs: Any, while_busy: Callable[[], None] = lambda: None
) -> float:
    """Seconds of one call among many that are dispatched together."""
    call(*inputs).block_until_ready()
    began = time.perf_counter()
    call(*inputs).block_until_ready()
    once = time.perf_counter() - began
    if once > MEASURE_S:
        return once
    count = max(2, min(1_000, int(MEASURE_S / once)))
    began = time.perf_counter()
    for i in range(count):
        result = call(*inputs)
        if i == count // 2:
            while_busy()
    result.block_until_ready()
    return (time.perf_counter() - began) / count
