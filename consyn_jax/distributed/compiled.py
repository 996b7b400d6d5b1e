"""Find kernels, collectives and the optimizer's memory traffic in a compiled program's text.

An instruction inside a loop is counted once per iteration. The text contains the trip count of each
loop that was a `scan` in JAX.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

BYTES = (
    dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1)
    | dict.fromkeys(("s16", "u16", "bf16", "f16"), 2)
    | dict.fromkeys(("s32", "u32", "f32"), 4)
    | dict.fromkeys(("s64", "u64", "f64"), 8)
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|f8e\w+|[suf]\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_PAIR = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

Array = tuple[str, tuple[int, ...]]  # dtype, dimensions on one device


@dataclass(frozen=True)
class Instruction:
    """One instruction, which is one line of the program's text.

    Attributes:
        arrays: its results; an asynchronous start lists its operands before its results.
        rest: the rest of the line, from the operands on.
        in_entry: whether it is in the entry computation, not in a loop, branch or fusion.
        times: how often one run of the program executes it.
        computation: name of the computation that contains it.
    """

    name: str
    operation: str
    arrays: tuple[Array, ...]
    rest: str
    in_entry: bool
    times: int = 1
    computation: str = ""

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results are the operands."""
        return _NAME.findall(self.rest.partition(")")[0])

    @property
    def first_operand(self) -> str:
        """Name of the first operand; empty if there is none."""
        found = _NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def trips(self) -> int:
        """Trip count of a loop; 1 if the text does not contain the count."""
        found = _TRIPS.search(self.rest)
        return int(found[1]) if found else 1

    @property
    def calls(self) -> Iterator[tuple[str, str]]:
        """The called computations, as (attribute, name of the computation).

        The attributes are `calls`, `to_apply`, `body`, `condition` and `branch_computations`.
        """
        for attribute, names in _CALLED.findall(self.rest):
            for name in names.split(", "):
                if name:
                    yield attribute, name.removeprefix("%")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind, of one dtype and along the same axes.

    Attributes:
        kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
        axes: the mesh axes along which the devices communicate; empty if the mesh was not given
            or the text has an unknown form.
        count: number of executions in one run of the program.
        payload_bytes: bytes of the whole arrays, after a gather or before a reduction. In a ring
            of n devices, each device sends (n - 1) / n of these bytes, or twice as many for an
            all-reduce.
    """

    kind: str
    dtype: str
    axes: tuple[str, ...]
    count: int
    payload_bytes: int


def instructions(program: str) -> list[Instruction]:
    """Parse all instructions of a compiled program's text (`jax.stages.Compiled.as_text`)."""
    return [instruction for body in computations(program)[0].values() for instruction in body]


def computations(program: str) -> tuple[dict[str, list[Instruction]], str]:
    """Parse the scheduled instructions of each computation, and the name of the entry computation.

    Raises:
        ValueError: the text is not that of a compiled program.
    """
    bodies, entry = _parse(program)
    times = _executions(bodies, entry)
    return {
        name: [replace(instruction, times=times[name]) for instruction in body]
        for name, body in bodies.items()
    }, entry


def _parse(program: str) -> tuple[dict[str, list[Instruction]], str]:
    bodies: dict[str, list[Instruction]] = {}
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
            name, type_text, operation, rest = parsed.groups()
            bodies[current].append(
                Instruction(
                    name,
                    operation,
                    tuple(_arrays(type_text)),
                    rest,
                    current == entry,
                    computation=current,
                )
            )
    if not entry:
        raise ValueError("This is not the text of a compiled program: it has no ENTRY.")
    return bodies, entry


def _arrays(type_text: str) -> Iterator[Array]:
    for dtype, dimensions in _ARRAY.findall(type_text):
        yield dtype, tuple(int(d) for d in dimensions.split(",") if d)


def _executions(bodies: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
    """Count how often one run of the program executes each computation."""
    edges = {
        name: [
            (callee, each.trips if (each.operation, attribute) == ("while", "body") else 1)
            for each in body
            for attribute, callee in each.calls
        ]
        for name, body in bodies.items()
    }
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:  # callees first; calls nest only a few deep
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


def kernel_name(instruction: Instruction) -> str:
    """Name of the kernel that a custom call runs; empty for other instructions."""
    target = re.search(r'custom_call_target="([^"]+)"', instruction.rest)
    if target is None:
        return ""
    own = None
    if "triton" in target[1]:
        own = re.search(r', name = "([^"]+)"', instruction.rest)
    elif "mosaic_gpu" in target[1]:
        own = re.search(r'op_name="[^"]*/(\w+)/\w+"', instruction.rest)
    elif target[1] == "tpu_custom_call":
        own = re.match(r"(.*?)(?:\.[\d.]+|\.clone)*$", instruction.name)
    return (own or target)[1]


def kernels(program: list[Instruction]) -> dict[str, int]:
    """Count the executions of each kernel that XLA did not generate itself.

    A library kernel is named by its custom-call target, and a kernel in Pallas by its own name. A
    TPU kernel is named by its instruction, whose name comes from the kernel.
    """
    found: collections.Counter[str] = collections.Counter()
    for instruction in program:
        if name := kernel_name(instruction):
            found[name] += instruction.times
    return dict(found)


_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")


def update_bytes(program: list[Instruction], sizes: Container[int]) -> int:
    """Count the bytes that the optimizer's part of a train step reads and writes.

    An instruction counts if it is in the entry computation, reads an array of a parameter's size,
    and is outside the differentiated function. Where XLA recorded no function name, instructions
    after the last loop count as outside. Collectives and updates inside a loop do not count.

    Args:
        sizes: number of elements of each parameter's array on one device.
    """
    arrays = {instruction.name: instruction.arrays for instruction in program}
    bodies: dict[str, list[Instruction]] = {}
    for instruction in program:
        bodies.setdefault(instruction.computation, []).append(instruction)
    entry = [instruction for instruction in program if instruction.in_entry]
    last_loop = max(
        (i for i, instruction in enumerate(entry) if instruction.operation == "while"), default=-1
    )
    total = 0
    for i, instruction in enumerate(entry):
        kind, name = instruction.operation, _OP_NAME.search(instruction.rest)
        read = [array for operand in instruction.operands for array in arrays.get(operand, ())]
        in_update = i > last_loop if name is None else "jvp(" not in name[1]
        communicates = kind.removesuffix("-start").removesuffix("-done") in _COLLECTIVES
        if not in_update or communicates or kind in _FREE:
            continue
        if any(math.prod(dimensions) in sizes for _, dimensions in read):
            whole = sum(map(array_bytes, (*read, *instruction.arrays)))
            total += whole - unread_bytes(instruction, arrays, bodies)
    return total


def unread_bytes(
    fusion: Instruction,
    arrays: Mapping[str, tuple[Array, ...]],
    bodies: Mapping[str, list[Instruction]],
) -> int:
    """Count the bytes of a fusion's operands that the fusion does not read.

    Args:
        arrays: arrays by name of the instruction.
        bodies: instructions by computation.
    """
    unread = 0
    for _, callee in fusion.calls if fusion.operation == "fusion" else ():
        for parameter in bodies[callee]:
            if parameter.operation != "parameter":
                continue
            of = fusion.operands[int(parameter.rest.partition(")")[0])]
            whole = sum(map(array_bytes, arrays.get(of, ())))
            unread += whole - min(whole, _sliced_bytes(parameter, bodies[callee], whole))
    return unread


def _sliced_bytes(array: Instruction, body: list[Instruction], whole: int) -> int:
    """Count the bytes of `array` that a computation reads; `whole` is the size of `array`."""
    readers = [each for each in body if array.name in each.operands]
    total = 0
    for reader in readers:
        is_first = reader.operands.index(array.name) == 0
        if reader.operation in ("slice", "dynamic-slice") and is_first:
            total += array_bytes(reader.arrays[0])
        elif reader.operation == "bitcast":
            total += _sliced_bytes(reader, body, whole)
        elif reader.operation == "dynamic-update-slice" and is_first:
            continue  # the rest of the array stays where it is
        else:
            return whole
    return total if readers else whole


def array_bytes(array: Array) -> int:
    """Return the size of an array in bytes."""
    dtype, dimensions = array
    return BYTES[dtype] * math.prod(dimensions)


def collectives(
    program: list[Instruction], mesh: Mapping[str, int] | None = None
) -> list[Collective]:
    """Sum the collectives by kind, dtype and axes, over one run of the program.

    Args:
        mesh: sizes of the mesh's axes, in the order in which the program numbers the devices.
    """
    count: collections.Counter[tuple[str, str, tuple[str, ...]]] = collections.Counter()
    payload: collections.Counter[tuple[str, str, tuple[str, ...]]] = collections.Counter()
    for instruction in program:
        for number, one in enumerate(collectives_of(instruction, mesh)):
            count[one.kind, one.dtype, one.axes] += instruction.times * (number == 0)
            payload[one.kind, one.dtype, one.axes] += instruction.times * one.payload_bytes
    return [Collective(*key, count[key], size) for key, size in sorted(payload.items())]


def collectives_of(
    instruction: Instruction, mesh: Mapping[str, int] | None = None
) -> list[Collective]:
    """List the collectives that one execution of an instruction starts, one per array.

    The list is empty if the instruction is not a collective.
    """
    kind = instruction.operation.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return []
    group = first_group(instruction.rest)
    axes = () if mesh is None else _axes(group, mesh)
    # A synchronous reduce-scatter lists its result, which is one device's share of the array.
    parts = len(group) if instruction.operation == "reduce-scatter" else 1
    return [
        Collective(kind, array[0], axes, 1, array_bytes(array) * parts)
        for array in _whole_arrays(instruction, kind)
    ]


def _whole_arrays(instruction: Instruction, kind: str) -> tuple[Array, ...]:
    """Select the arrays that make up the payload of a collective."""
    arrays, half = instruction.arrays, len(instruction.arrays) // 2
    asynchronous = instruction.operation.endswith("-start")
    if asynchronous and kind in ("all-gather", "collective-permute"):
        return arrays[half : 2 * half]  # some backends add contexts after a permute's results
    if asynchronous and kind in ("all-reduce", "reduce-scatter"):
        return arrays[: len(instruction.operands)]  # the operands; the results follow
    return arrays


def first_group(rest: str) -> list[int]:
    """Parse the first group of communicating devices, or the first pair of a permutation.

    XLA writes groups as a list, as the rows of a reshaped iota ("V2"), or as axes of a mesh ("V3").
    The result is empty if the text has another form.

    >>> first_group("replica_groups={{0,2},{1,3}}")
    [0, 2]
    >>> first_group("replica_groups=[2,2]<=[2,2]T(1,0)")
    [0, 2]
    >>> first_group("replica_groups=mesh['a'=2,'b'=4] {'b'}")
    [0, 1, 2, 3]
    >>> first_group("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}")
    [0, 1]
    """
    if listed := _LISTED_GROUP.search(rest) or _PAIR.search(rest):
        return [int(number) for text in listed.groups() for number in text.split(",")]
    if counted := _COUNTED_GROUPS.search(rest):
        rows = _iota(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2]))
        return [int(i) for i in rows[0]]
    if on_mesh := _MESH_GROUPS.search(rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", on_mesh[1])}
        named = re.findall(r"'([^']+)'(:?)", on_mesh[4])
        if any(part for _, part in named):  # a part of an axis
            return []
        ids = _iota(on_mesh[2] or str(math.prod(sizes.values())), on_mesh[3])
        axes = {name for name, _ in named}
        index = tuple(slice(None) if name in axes else 0 for name in sizes)
        return [int(i) for i in ids.reshape(tuple(sizes.values()))[index].ravel()]
    return []


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    dimensions = [int(d) for d in shape.split(",")]
    ids = np.arange(math.prod(dimensions)).reshape(dimensions)
    return ids.transpose([int(d) for d in permutation.split(",")]) if permutation else ids


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of a group differ."""
    places = np.unravel_index(np.array(group, int), tuple(mesh.values()))
    return tuple(
        axis for axis, place in zip(mesh, places, strict=True) if len(np.unique(place)) > 1
    )
