"""Which tiles are fastest for the kernels of the norms, and how close are they to the bandwidth?

    python benchmarks/norms.py --out benchmarks/results/NAME.json

Each kernel alone, forward and backward, at the sizes of the preset verse: rows (or tokens) per
program and warps of a program, in us, GB/s and as a share of the specified bandwidth. The tiles of
training are marked. Without a GPU the kernels are interpreted, and small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, parser, report
from jax.experimental import pallas

from consyn_jax.distributed.hardware import described_gpu
from consyn_jax.model.kernels import branched_norm, norm_rope

EPS, READERS = 1e-6, 3  # the norm before queries, keys and values has three readers
ROWS, WARPS = (8, 16, 32, 64), (2, 4, 8)


class Size(NamedTuple):
    """Rows of a batch in tokens, heads, and the width of a head; the stream has all heads' width."""

    tokens: int
    heads: int
    width: int


VERSE, SMALL = Size(65_536, 12, 64), Size(32, 2, 32)


class Case(NamedTuple):
    """A kernel with tiles.

    Attributes:
        module: has the tiles, which are set to `values` while the kernel is lowered.
        call: gives an array like the first of `inputs`.
        moved: bytes that one call reads and writes.
    """

    kernel: str
    rows: int
    warps: int
    module: Any
    values: dict[str, Any]
    call: Callable[..., jax.Array]
    inputs: tuple[jax.Array, ...]
    moved: int

    @property
    def is_used(self) -> bool:
        """Whether training has these tiles."""
        if self.module is norm_rope:
            return all(getattr(norm_rope, name) == n for name, n in self.values.items())
        width = pallas.next_power_of_2(self.inputs[0].shape[-1])
        most = width // (32 * branched_norm.ELEMENTS)
        warps = max(1, min(branched_norm.MAX_WARPS, most))
        return (self.rows, self.warps) == (branched_norm.ROWS, warps)


def cases(size: Size, tiles: list[tuple[int, int]], dtype: Any) -> Iterator[Case]:
    """All kernels with all tiles."""
    keys = jax.random.split(jax.random.key(0), 2 + READERS)
    stream = 1, size.tokens, size.heads * size.width
    arrays = tuple(jax.random.normal(key, stream, dtype) for key in keys)
    heads = tuple(array.reshape(1, size.tokens, size.heads, size.width) for array in arrays[:2])
    angles = (jnp.full((1, size.tokens, size.width // 2), 0.5**0.5),) * 2
    for rows, warps in tiles:
        programs, read = -(-size.tokens // rows), 2 * angles[0].nbytes
        # As many warps as asked for, however wide a row is.
        values = {"ROWS": rows, "ELEMENTS": 1, "MAX_WARPS": warps}
        tile: Any = rows, warps, branched_norm, values
        moved = 2 * arrays[0].nbytes
        yield Case("branched_norm_forward", *tile, _norm, arrays[:1], moved)
        moved = (3 + READERS) * arrays[0].nbytes + 4 * programs * stream[-1]
        yield Case("branched_norm_backward", *tile, _norm_back, arrays, moved)
        values = {"ELEMENTS": rows * size.width // 2, "NUM_WARPS": warps}
        tile = rows, warps, norm_rope, values
        moved = 2 * arrays[0].nbytes + read
        yield Case("norm_rope_forward", *tile, _rotate, (heads[0], *angles), moved)
        moved = 3 * arrays[0].nbytes + read + 4 * programs * size.width
        yield Case("norm_rope_backward", *tile, _rotate_back, (*heads, *angles), moved)


# The first argument of each is the result of the call before.


def _norm(x: jax.Array) -> Any:
    kernel = branched_norm._branched_norm_forward
    return branched_norm._call(kernel, jnp.ones(x.shape[-1]), (x,), EPS, 0, 1)[0]


def _norm_back(dx: jax.Array, x: jax.Array, *gradients: jax.Array) -> Any:
    kernel, arrays = branched_norm._branched_norm_backward, (x, dx, *gradients)
    return branched_norm._call(kernel, jnp.ones(x.shape[-1]), arrays, EPS, 1, 1)[0]


def _rotate(q: jax.Array, *angles: jax.Array) -> Any:
    kernel = norm_rope._norm_rope_forward
    return norm_rope._call(kernel, (q,), jnp.ones(q.shape[-1]), *angles, EPS, sums=0)[0]


def _rotate_back(dq: jax.Array, q: jax.Array, *angles: jax.Array) -> Any:
    kernel = norm_rope._norm_rope_backward
    return norm_rope._call(kernel, (q, dq), jnp.ones(q.shape[-1]), *angles, EPS, sums=1)[0]


def lowered(case: Case, calls: int, interpret: bool) -> Any:
    """A program of `calls` calls, of which each reads what the one before wrote."""

    def turn(given: jax.Array, *rest: jax.Array) -> jax.Array:
        for _ in range(calls):
            given = case.call(given, *rest)
        return given

    run = partial(pallas.pallas_call, interpret=interpret)
    with (
        mock.patch.object(pallas, "pallas_call", run),
        mock.patch.multiple(case.module, **case.values),
    ):
        return jax.jit(turn).lower(*case.inputs)


def measure(tiny: bool = False) -> dict[str, Any]:
    """The time of each kernel by its tiles, the fastest first."""
    on_gpu = jax.default_backend() == "gpu" and not tiny
    size, calls = (VERSE, 10) if on_gpu else (SMALL, 1)
    tiles = list(product(ROWS, WARPS)) if on_gpu else [(8, 2), (16, 4)]
    found = list(cases(size, tiles, jnp.bfloat16))
    programs = [lowered(case, calls, not on_gpu) for case in found]
    with ThreadPoolExecutor(8) as pool:  # nothing in these programs is chosen by timing
        compiled = list(pool.map(lambda program: program.compile(), programs))
    contestants = {
        str(number): partial(_wait, step, case.inputs)
        for number, (step, case) in enumerate(zip(compiled, found, strict=True))
    }
    times = alternate(contestants, 2 if tiny else 7)
    gpu = described_gpu(jax.devices()[0].device_kind) if on_gpu else None
    rows = []
    for number, case in enumerate(found):
        seconds = float(np.median(times[str(number)])) / calls
        rate = case.moved / seconds
        rows.append(
            {
                "kernel": case.kernel,
                "rows": case.rows,
                "warps": case.warps,
                "in training": case.is_used,
                "us": 1e6 * seconds,
                "GB/s": rate / 1e9,
                "share of bandwidth": None if gpu is None else rate / gpu.memory_bandwidth,
            }
        )
    return {"rows": sorted(rows, key=lambda row: (row["kernel"], row["us"]))}


def _wait(step: Callable[..., jax.Array], inputs: tuple[jax.Array, ...]) -> None:
    jax.block_until_ready(step(*inputs))


def main() -> None:
    """Run, print the table, write JSON."""
    given = parser(__doc__).parse_args()
    report(measure(given.tiny), given.out)


if __name__ == "__main__":
    main()
