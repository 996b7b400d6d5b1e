"""Reads a compiled program's text: which kernels run, what the devices send each other, which arrays there are.

What stands inside a loop counts as often as the loop runs; XLA writes the trip count of every loop that comes from `scan`.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|f8e\w+|[suf]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_PAIR = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
_NAME = re.compile(r"%([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

Array = tuple[str, tuple[int, ...]]  # dtype, dimensions on one device


@dataclass(frozen=True)
class Instruction:
    """One line of the program.

    Attributes:
        arrays: what it results in; of an asynchronous start, its operands before its results.
        times: how often one run of the program executes it.
        in_entry: it stands in the program itself, and in no loop, branch or fusion.
    """

    name: str
    operation: str
    arrays: tuple[Array, ...]
    rest: str
    times: int
    in_entry: bool

    @property
    def operands(self) -> list[str]:
        """Names of what it is applied to."""
        return _NAME.findall(self.rest.partition(")")[0])


@dataclass(frozen=True)
class Collective:
    """One kind of exchange of one dtype along the same axes.

    Attributes:
        kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
        axes: of the mesh, along which the devices of a group lie; empty where the mesh was not given, or the text is not understood.
        count: instructions executed in one run of the program.
        payload_bytes: bytes of the whole arrays: gathered, or before they are reduced and scattered. A ring of n devices sends
            (n - 1) / n of it from each, twice for an all-reduce.
    """

    kind: str
    dtype: str
    axes: tuple[str, ...]
    count: int
    payload_bytes: int


def instructions(program: str) -> list[Instruction]:
    """All instructions of a compiled program's text (`jax.stages.Compiled.as_text`), with how often each runs."""
    return [instruction for body in computations(program)[0].values() for instruction in body]


def computations(program: str) -> tuple[dict[str, list[Instruction]], str]:
    """The same by computation, as they are scheduled, and the name of the computation that the program begins with."""
    bodies, entry = _computations(program)
    times = _executions(bodies, entry)
    found = {
        computation: [
            Instruction(name, operation, tuple(_arrays(type_text)), rest, times[computation], computation == entry)
            for name, type_text, operation, rest in lines
        ]
        for computation, lines in bodies.items()
    }
    return found, entry


def kernels(program: list[Instruction]) -> dict[str, int]:
    """Library kernels by custom-call target and those written in Triton by their own name, with how often each runs."""
    found: collections.Counter[str] = collections.Counter()
    for instruction in program:
        target = re.search(r'custom_call_target="([^"]+)"', instruction.rest)
        if target is not None:
            own = re.search(r', name = "([^"]+)"', instruction.rest) if "triton" in target[1] else None
            found[(own or target)[1]] += instruction.times
    return dict(found)


def product_flops(program: list[Instruction]) -> dict[tuple[str, str], int]:
    """FLOPs of all matrix products by the types of both operands, whichever kernel of XLA's own they are in; not those of libraries."""
    arrays = {instruction.name: instruction.arrays for instruction in program}
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for instruction in program:
        contracted = _CONTRACTED.search(instruction.rest)
        if instruction.operation == "dot" and contracted is not None:
            (left, dimensions), (right, _) = (arrays[name][0] for name in instruction.operands[:2])
            summed = math.prod(dimensions[int(i)] for i in contracted[1].split(",") if i)
            found[left, right] += 2 * instruction.times * summed * math.prod(instruction.arrays[0][1])
    return dict(found)


_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")


def update_bytes(program: list[Instruction], sizes: Container[int]) -> int:
    """Bytes that the optimizer's part of a train step reads and writes: of what stands in the program itself, and in no function that is differentiated.

    What XLA leaves without the name of a function counts if it comes behind the last loop. Exchanges do not count, nor does an update that
    is a loop itself.

    Args:
        sizes: elements of the parameters' arrays, as one device has them. What reads none of that size is not of the update.
    """
    arrays = {instruction.name: instruction.arrays for instruction in program}
    entry = [instruction for instruction in program if instruction.in_entry]
    last_loop = max((i for i, instruction in enumerate(entry) if instruction.operation == "while"), default=-1)
    total = 0
    for i, instruction in enumerate(entry):
        kind, name = instruction.operation, _OP_NAME.search(instruction.rest)
        read = [array for operand in instruction.operands for array in arrays.get(operand, ())]
        of_update = i > last_loop if name is None else "jvp(" not in name[1]
        exchange = kind.removesuffix("-start").removesuffix("-done") in _COLLECTIVES
        if of_update and not exchange and kind not in _FREE and any(math.prod(dimensions) in sizes for _, dimensions in read):
            total += sum(BYTES[dtype] * math.prod(dimensions) for dtype, dimensions in (*read, *instruction.arrays))
    return total


def collectives(program: list[Instruction], mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """What the devices exchange, by kind, dtype and axes.

    Args:
        mesh: the sizes of the mesh's axes, in the order in which the program's devices are numbered.
    """
    count: collections.Counter[tuple[str, str, tuple[str, ...]]] = collections.Counter()
    payload: collections.Counter[tuple[str, str, tuple[str, ...]]] = collections.Counter()
    for instruction in program:
        for number, one in enumerate(exchange(instruction, mesh)):
            count[one.kind, one.dtype, one.axes] += instruction.times * (number == 0)
            payload[one.kind, one.dtype, one.axes] += instruction.times * one.payload_bytes
    return [Collective(*key, count[key], size) for key, size in sorted(payload.items())]


def exchange(instruction: Instruction, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """One execution of an instruction that exchanges something or starts to, an entry for each array; empty for others."""
    kind = instruction.operation.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return []
    group = first_group(instruction.rest)
    axes = () if mesh is None else _axes(group, mesh)
    scattered = len(group) if instruction.operation == "reduce-scatter" else 1  # one that is not asynchronous results in parts
    whole = _whole_arrays(instruction, kind)
    return [Collective(kind, dtype, axes, 1, BYTES[dtype] * math.prod(dimensions) * scattered) for dtype, dimensions in whole]


def called(instruction: Instruction, attribute: str) -> list[str]:
    """Names of the computations that an instruction runs as its `calls`, `to_apply`, `body`, `condition` or `branch_computations`."""
    return [name.removeprefix("%") for found, names in _CALLED.findall(instruction.rest) if found == attribute for name in names.split(", ") if name]


def trips(instruction: Instruction) -> int:
    """How often a loop runs, as far as XLA wrote it."""
    found = _TRIPS.search(instruction.rest)
    return int(found[1]) if found else 1


def first_group(rest: str) -> list[int]:
    """The first of the groups of devices that exchange something, or the first pair of a permutation; empty if XLA wrote it in another way.

    XLA writes groups as a list, as iota(...) cut into rows ("V2"), or as axes of a mesh of its own ("V3").

    >>> first_group("replica_groups={{0,2},{1,3}}"), first_group("replica_groups=[2,2]<=[2,2]T(1,0)")
    ([0, 2], [0, 2])
    >>> first_group("replica_groups=mesh['a'=2,'b'=4] {'b'}"), first_group("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}")
    ([0, 1, 2, 3], [0, 1])
    """
    if listed := _LISTED_GROUP.search(rest) or _PAIR.search(rest):
        return [int(number) for text in listed.groups() for number in text.split(",")]
    if counted := _COUNTED_GROUPS.search(rest):
        return [int(i) for i in _iota(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2]))[0]]
    if on_mesh := _MESH_GROUPS.search(rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", on_mesh[1])}
        named = re.findall(r"'([^']+)'(:?)", on_mesh[4])
        if any(part for _, part in named):  # a part of an axis
            return []
        ids = _iota(on_mesh[2] or str(math.prod(sizes.values())), on_mesh[3]).reshape(tuple(sizes.values()))
        axes = {name for name, _ in named}
        return [int(i) for i in ids[tuple(slice(None) if name in axes else 0 for name in sizes)].ravel()]
    return []


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    dimensions = [int(d) for d in shape.split(",")]
    ids = np.arange(math.prod(dimensions)).reshape(dimensions)
    return ids.transpose([int(d) for d in permutation.split(",")]) if permutation else ids


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Along which axes the devices of a group differ."""
    places = np.unravel_index(np.array(group, int), tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if len(np.unique(place)) > 1)


def array_shapes(program: list[Instruction], dtype: str) -> set[tuple[int, ...]]:
    """Dimensions of every array of `dtype` that the program names anywhere, fused or not, on one device."""
    return {dimensions for instruction in program for kind, dimensions in instruction.arrays if kind == dtype}


def _whole_arrays(instruction: Instruction, kind: str) -> tuple[Array, ...]:
    """The arrays of a collective at their full size."""
    arrays, half = instruction.arrays, len(instruction.arrays) // 2
    asynchronous = instruction.operation.endswith("-start")
    if asynchronous and kind in ("all-gather", "collective-permute"):
        return arrays[half : 2 * half]  # a permute's start has contexts behind its results on some backends
    if asynchronous and kind == "reduce-scatter":
        return arrays[:half]
    return arrays


def _computations(program: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    bodies: dict[str, list[tuple[str, str, str, str]]] = {}
    entry = current = ""
    for line in program.splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            current = header[2]
            bodies[current] = []
            entry = current if header[1] else entry
            continue
        parsed = _INSTRUCTION.match(line)
        if parsed is not None and current:
            bodies[current].append((parsed[1], parsed[2], parsed[3], parsed[4]))
    if not entry:
        raise ValueError("This is not the text of a compiled program: it has no ENTRY.")
    return bodies, entry


def _executions(bodies: dict[str, list[tuple[str, str, str, str]]], entry: str) -> dict[str, int]:
    """How often each computation runs, from the callers down."""
    edges = {name: list(_calls(lines)) for name, lines in bodies.items()}
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:  # callees first; computations do not recurse, and nest a few deep
        if name in seen:
            return
        seen.add(name)
        for callee, _ in edges[name]:
            visit(callee)
        order.append(name)

    visit(entry)
    times = dict.fromkeys(bodies, 0)
    times[entry] = 1
    for name in reversed(order):
        for callee, factor in edges[name]:
            times[callee] += times[name] * factor
    return times


def _calls(lines: list[tuple[str, str, str, str]]) -> Iterator[tuple[str, int]]:
    for _, _, operation, rest in lines:
        trips = _TRIPS.search(rest)
        for attribute, names in _CALLED.findall(rest):
            factor = int(trips[1]) if trips and operation == "while" and attribute == "body" else 1
            for name in names.split(", "):
                if name:
                    yield name.removeprefix("%"), factor


def _arrays(type_text: str) -> Iterator[Array]:
    for dtype, dimensions in _ARRAY.findall(type_text):
        yield dtype, tuple(int(d) for d in dimensions.split(",") if d)
