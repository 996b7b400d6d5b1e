"""FLOPs and bytes of the operations of a compiled program, from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from consyn_jax.distributed.compiled import (
    Array,
    Instruction,
    array_bytes,
    computations,
    kernel_name,
    unread_bytes,
)

_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)')
# Number of matmuls with a [T, T] matrix in each attention kernel. The forward pass has two, for
# scores and values. Both backward kernels recompute the scores.
ATTENTION_MATMULS = {
    f"{backend}_attention_{kernel}": matmuls
    for backend in ("document", "hopper")
    for kernel, matmuls in (("forward", 2), ("queries", 3), ("keys", 4))
}


class Cost(NamedTuple):
    """The work of one execution of an operation.

    Attributes:
        flops: FLOPs of its matmuls. A matmul in 8 bits counts as half, since GPUs run it at twice
            the rate. Attention counts as causal over the whole sequence, even if the sequence
            contains several documents.
        bytes: Bytes of the operands and results. If only a slice of an operand is read, only the
            slice counts.
    """

    flops: float
    bytes: int


def operation_costs(program: str) -> dict[str, Cost]:
    """Compute the cost of each instruction, by name, from the text of a compiled program.

    Raises:
        ValueError: `program` is not the text of a compiled program.
    """
    bodies, _ = computations(program)
    flops = MatmulFlops(bodies)
    costs: dict[str, Cost] = {}
    for body in bodies.values():
        arrays = {each.name: each.arrays for each in body}
        for each in body:
            work = float(flops.of(each, arrays) + _attention_flops(each, arrays))
            if any(dtype.startswith("f8") for name in each.operands for dtype, _ in arrays[name]):
                work /= 2
            costs[each.name] = Cost(work, _bytes(each, arrays, bodies))
    return costs


class MatmulFlops:
    """FLOPs of the matmuls of a program, including matmuls inside fusions.

    Args:
        bodies: Instructions by computation, from `computations`.
    """

    def __init__(self, bodies: Mapping[str, list[Instruction]]) -> None:
        self._bodies, self._known = bodies, dict[str, int]()

    def of(self, each: Instruction, arrays: Mapping[str, tuple[Array, ...]]) -> int:
        """FLOPs of one execution of an instruction; a loop counts as 0.

        Args:
            arrays: Results of the instructions in the same computation, by instruction name.
        """
        if each.operation in ("fusion", "call"):
            called = (name for attribute, name in each.calls if attribute in ("calls", "to_apply"))
            return sum(map(self._inside, called))
        if each.operation != "dot" and "__cublas$" not in each.rest:
            return 0
        contracted = _CONTRACTED.search(each.rest)
        if contracted is None or not each.first_operand:
            return 0
        dimensions = arrays[each.first_operand][0][1]
        summed = math.prod(dimensions[int(d)] for d in re.findall(r"\d+", contracted[1]))
        return 2 * math.prod(each.arrays[0][1]) * summed

    def _inside(self, computation: str) -> int:
        if computation not in self._known:
            body = self._bodies[computation]
            arrays = {each.name: each.arrays for each in body}
            self._known[computation] = sum(self.of(each, arrays) for each in body)
        return self._known[computation]


def _attention_flops(each: Instruction, arrays: Mapping[str, tuple[Array, ...]]) -> int:
    """FLOPs of an attention kernel, whose first operand is the queries [B, T, N, H]."""
    matmuls = ATTENTION_MATMULS.get(kernel_name(each))
    if matmuls is None:
        return 0
    sequences, length, heads, width = arrays[each.first_operand][0][1]
    return matmuls * sequences * heads * length**2 * width


def _bytes(
    each: Instruction,
    arrays: Mapping[str, tuple[Array, ...]],
    bodies: Mapping[str, list[Instruction]],
) -> int:
    operands = [array for name in set(each.operands) for array in arrays.get(name, ())]
    read = sum(map(array_bytes, operands)) - unread_bytes(each, arrays, bodies)
    return read + _written_bytes(each, bodies)


def _written_bytes(each: Instruction, bodies: Mapping[str, list[Instruction]]) -> int:
    """Count the bytes of the results; a fusion that updates a slice writes only the slice."""
    for _, callee in each.calls if each.operation == "fusion" else ():
        *before, root = bodies[callee]
        if root.operation == "dynamic-update-slice":
            update = root.operands[1]
            parts = [array for other in before if other.name == update for array in other.arrays]
            return sum(map(array_bytes, parts))
    return sum(map(array_bytes, each.arrays))
