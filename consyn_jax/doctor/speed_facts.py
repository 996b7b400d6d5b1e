"""Measure the speed of a device: a large matmul, and a copy in its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

MEASURE_S = 0.3  # seconds of timed work, after compiling and one untimed call


@dataclass(frozen=True)
class Work:
    """Sizes of the timed operations.

    Attributes:
        matmul: number of rows and of columns of both matrices.
        copy_bytes: size of the array that is copied.
    """

    matmul: int
    dtype: str
    copy_bytes: int


# On a GPU, a matmul of size 8192 takes about a millisecond, and 1 GB does not fit into the caches.
# The CPU is measured in float32, because training uses float32 there.
GPU_WORK = Work(8192, "bfloat16", 1 << 30)
CPU_WORK = Work(1024, "float32", 1 << 26)


@dataclass(frozen=True)
class Speed:
    """The rates that one device reached.

    Attributes:
        kind: the device's name.
        matmul_flops: FLOP/s, where the product of two n x n matrices counts as 2 n^3 FLOPs.
        copy_bandwidth: bytes per second, the sum of reads and writes.
        problem: why the device could not be measured; empty if it could be.
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
        work: the sizes; None selects them by the device's platform.
        while_busy: called once while the device computes matmuls.
    """
    import jax
    import jax.numpy as jnp

    work = work or (CPU_WORK if device.platform == "cpu" else GPU_WORK)
    try:
        with jax.default_device(device):
            n, dtype = work.matmul, jnp.dtype(work.dtype)
            # Random inputs, because zeros take less power and so make a GPU faster.
            a, b = (jax.random.normal(jax.random.key(seed), (n, n), dtype) for seed in range(2))
            product_s = _seconds(jax.jit(jnp.matmul), (a, b), while_busy)
            del a, b
            array = jnp.zeros(work.copy_bytes // 4, jnp.float32)
            copy_s = _seconds(jax.jit(lambda x: x + 1), (array,))
    except jax.errors.JaxRuntimeError as error:  # for example, the device has too little memory
        return Speed(device.device_kind, problem=str(error).strip().partition("\n")[0])
    return Speed(device.device_kind, dtype.name, 2 * n**3 / product_s, 2 * work.copy_bytes / copy_s)


def _seconds(
    call: Callable[..., Any], inputs: Any, while_busy: Callable[[], None] = lambda: None
) -> float:
    """Return the mean time of a call in seconds, when many calls are dispatched together."""
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
