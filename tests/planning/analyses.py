"""Analyses of a compiled program that only tests need."""

import collections
import math
import re

from consyn_jax.distributed.compiled import BYTES, Instruction

Shape = tuple[int, ...]
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def array_shapes(program: list[Instruction]) -> dict[str, set[Shape]]:
    """Dimensions on one device of every array that the program names, fused or not, by dtype."""
    found: dict[str, set[Shape]] = {dtype: set() for dtype in BYTES}
    for instruction in program:
        for dtype, dimensions in instruction.arrays:
            found[dtype].add(dimensions)
    return found


def matmul_flops(program: list[Instruction]) -> dict[tuple[str, str], int]:
    """FLOPs of all of XLA's own matmuls by the types of both operands; not those of libraries."""
    arrays = {instruction.name: instruction.arrays for instruction in program}
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for instruction in program:
        contracted = _CONTRACTED.search(instruction.rest)
        if instruction.operation == "dot" and contracted is not None:
            (left, dimensions), (right, _) = (arrays[name][0] for name in instruction.operands[:2])
            summed = math.prod(dimensions[int(i)] for i in contracted[1].split(",") if i)
            flops = 2 * summed * math.prod(instruction.arrays[0][1])
            found[left, right] += instruction.times * flops
    return dict(found)


def with_length_twice(program: list[Instruction], prime: int) -> list[tuple[str, Shape]]:
    """Arrays with the sequence's length in two dimensions, whatever they were reshaped to.

    Args:
        prime: divides the length once, and no other size.
    """
    return [
        (dtype, shape)
        for dtype, shapes in array_shapes(program).items()
        for shape in shapes
        if math.prod(shape) and math.prod(shape) % prime**2 == 0
    ]


def unordered(program: list[Instruction]) -> list[str]:
    """Operations whose results can depend on the order in which the threads of a GPU come."""
    return [
        instruction.name
        for instruction in program
        if instruction.operation == "select-and-scatter"
        or (instruction.operation == "scatter" and "unique_indices=true" not in instruction.rest)
    ]
