"""Analyses of a compiled program that only tests need."""

import collections
import math
import re

from consyn_jax.distributed.compiled import (
    BYTES,
    Array,
    Instruction,
    array_bytes,
    kernel_name,
    unread_bytes,
)

Shape = tuple[int, ...]
# In the assembler's report on a kernel: bytes of the stack frame, spilled bytes, registers.
RESOURCES = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", re.S
)
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


def dot_operands(program: list[Instruction]) -> list[Array]:
    """Dtype and dimensions of both operands of each of XLA's own matmuls, once per execution."""
    arrays = {instruction.name: instruction.arrays for instruction in program}
    return [
        arrays[name][0]
        for instruction in program
        if instruction.operation == "dot"
        for name in instruction.operands[:2] * instruction.times
    ]


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


def written_by_fusions(
    program: list[Instruction], dtypes: tuple[str, ...], tokens: Shape
) -> list[tuple[str, int]]:
    """Dtype and elements for each token of the activations that XLA's own kernels write.

    Args:
        tokens: [B, T], with which activations begin or end, as one dimension or as two.
    """
    number, found = math.prod(tokens), []
    for instruction in program:
        if instruction.operation == "fusion":
            for dtype, shape in instruction.arrays:
                ends = {shape[:1], shape[-1:], shape[:2], shape[-2:]}
                if dtype in dtypes and ends & {(number,), tokens}:
                    found += [(dtype, math.prod(shape) // number)] * instruction.times
    return found


_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while")


def launched(program: list[Instruction]) -> list[Instruction]:
    """The instructions that a GPU executes as kernels, which are not inside fusions or reductions."""
    inside = {
        callee
        for each in program
        for attribute, callee in each.calls
        if each.operation == "fusion" or attribute == "to_apply"
    }
    return [
        each
        for each in program
        if each.times
        and each.computation not in inside
        and each.operation not in _FREE
        and not each.operation.endswith(("-start", "-done"))  # what they run counts
    ]


def moved_bytes(program: list[Instruction]) -> int:
    """Bytes that all kernels read and write; adding in place reads and writes the whole array."""
    arrays, bodies = {each.name: each.arrays for each in program}, bodies_of(program)
    total = 0
    for each in launched(program):
        read = [array for name in each.operands for array in arrays.get(name, ())]
        size = sum(map(array_bytes, (*read, *each.arrays)))
        total += each.times * (size - unread_bytes(each, arrays, bodies))
    return total


def bodies_of(program: list[Instruction]) -> dict[str, list[Instruction]]:
    """The instructions of each computation."""
    bodies: dict[str, list[Instruction]] = {}
    for each in program:
        bodies.setdefault(each.computation, []).append(each)
    return bodies


def bytes_of_kernels(program: list[Instruction], part: str) -> dict[str, int]:
    """Bytes that our kernels whose name contains `part` read and write, by name."""

    def size(instruction: Instruction) -> int:
        return sum(BYTES[dtype] * math.prod(shape) for dtype, shape in instruction.arrays)

    sizes = {instruction.name: size(instruction) for instruction in program}
    found: collections.Counter[str] = collections.Counter()
    for instruction in program:
        name = kernel_name(instruction) or ""
        if part in name:
            moved = sizes[instruction.name] + sum(sizes[read] for read in instruction.operands)
            found[name] += instruction.times * moved
    return dict(found)
