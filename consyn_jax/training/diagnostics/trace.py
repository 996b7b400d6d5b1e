"""Read a profiler's trace: device time by part of the model, and idle time by cause."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from consyn_jax.distributed.hardware import DescribedGpu
from consyn_jax.training.diagnostics.operation_costs import Cost
from consyn_jax.training.runtime.watchdog import EVALUATING, SAVING, WAITING

STEP = "train step"
# Names of the `jax.named_scope`s in the model and the step, which the compiler attaches to each
# operation.
SCOPES = ("attention", "mlp", "head", "norm", "embedding", "optimizer")
COLLECTIVES, MATMULS, OTHER = "collectives", "matmuls", "other"
# Pattern of a kernel's name -> part, for kernels whose operation is not in the trace. This happens
# in command buffers (CUDA graphs).
KERNELS = {
    "(document|hopper)_attention": "attention",
    "softmax_gradient": "head",
    "norm_rope|branched_norm|added_norm|eight_bit_norm": "norm",
    "eight_bit_swiglu": "mlp",
    "^nvjet|gemm|cutlass|cublas": MATMULS,
}
COMMAND_BUFFER = "command_buffer"
# Name of a host activity in the trace -> cause of the device's idle time.
CAUSES = {
    WAITING: WAITING,
    EVALUATING: EVALUATING,
    SAVING: SAVING,
    "backend_compile_and_load": "compiling",
}
BETWEEN, HOST = "between operations", "host"
BETWEEN_NS = 20_000.0  # shorter idle times count as the launch latency of operations
LARGEST = 10

_SCOPE = re.compile(rf"\b({'|'.join(SCOPES)})\b")
_KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
_COLLECTIVE = re.compile(rf"{_KINDS}|nccl", re.IGNORECASE)
_COLLECTIVE_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?([\w.\-]+) = .*? (?:{_KINDS})(?:-start|-done)?\(", re.MULTILINE
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?\bop_name=\"([^\"]*)\"", re.MULTILINE)
_GPU, _STREAM = re.compile(r"/device:GPU:(\d+)"), re.compile(r"Stream #")
Spans = list[tuple[float, float]]  # [begin, end) in ns, ascending and disjoint
Event = tuple[Any, Mapping[str, Any]]  # an event of the profiler, and its statistics by name


class Operation(NamedTuple):
    """One execution of an operation on the device, with times in ns.

    Attributes:
        name: Name of the operation in the compiled program; if the trace lacks it, name of the
            kernel.
        kernel: Name of the kernel; on CPUs, the same as `name`.
        path: Named scopes of the operation, outermost first; empty if unknown.
        own: Duration without nested operations, such as those in the body of a loop.
    """

    name: str
    kernel: str
    path: str
    begin: float
    end: float
    own: float

    @property
    def title(self) -> str:
        """Name of the operation and of its kernel, for reports."""
        return self.name if self.name == self.kernel else f"{self.name}: {self.kernel[:80]}"

    @property
    def part(self) -> str:
        """The part of the model or step: one of `SCOPES`, `COLLECTIVES`, `MATMULS`, `OTHER`."""
        if self.path == COLLECTIVES or _COLLECTIVE.search(f"{self.name} {self.kernel}"):
            return COLLECTIVES
        if found := _SCOPE.findall(self.path):
            return found[-1]
        named = (part for kernel, part in KERNELS.items() if re.search(kernel, self.kernel))
        return next(named, OTHER)


@dataclass(frozen=True)
class Summary:
    """The time of a device in a trace, in seconds.

    Attributes:
        steps: Number of traced steps.
        idle: Idle time by cause.
        parts: Busy time by part of the model, largest first. Operations that run concurrently each
            count in full.
        largest: Operations with the longest total time.
        least: Lower bound of the time of each part, from its FLOPs and the bytes that it moves.
        hidden_share: Share of the time of collectives in which other operations ran; None without
            collectives.
    """

    device: str
    steps: int
    total_s: float
    busy_s: float
    idle: dict[str, float]
    parts: dict[str, float]
    largest: tuple[LargeOperation, ...]
    least: dict[str, Least]
    hidden_share: float | None = None


class LargeOperation(NamedTuple):
    """An operation that takes a large share of the time.

    Attributes:
        name: Name of the operation and of its kernel.
        part: The part of the model.
        total_s: Time of all its executions.
        times: Number of executions.
        least: Lower bound of the time of all executions; None for collectives, and if the device's
            rates or the operation's work are unknown.
    """

    name: str
    part: str
    total_s: float
    times: int
    least: Least | None


class Least(NamedTuple):
    """Lower bound of the time of operations, in seconds.

    Attributes:
        total_s: Sum over operations of the larger of compute time and memory time.
        compute_s: Sum of compute times: FLOPs at the device's peak rate.
        memory_s: Sum of memory times: bytes at the bandwidth of the device's memory.
    """

    total_s: float
    compute_s: float
    memory_s: float

    def plus(self, other: Least) -> Least:
        """Add the bound of other operations."""
        return Least(*(mine + its for mine, its in zip(self, other, strict=True)))


NOTHING = Least(0.0, 0.0, 0.0)


def scopes_of(program: str) -> dict[str, str]:
    """Map the name of each instruction to its scopes, from the text of a compiled program.

    Collective operations get the scope `COLLECTIVES`.

    >>> scopes_of('  ROOT %dot.1 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(step)/mlp/dot"}')
    {'dot.1': 'jit(step)/mlp/dot'}
    """
    collectives = _COLLECTIVE_INSTRUCTION.findall(program)
    return dict(_INSTRUCTION.findall(program)) | dict.fromkeys(collectives, COLLECTIVES)


def summarise(
    trace: Any,
    scopes: Mapping[str, str],
    costs: Mapping[str, Cost] | None = None,
    gpu: DescribedGpu | None = None,
) -> Summary:
    """Summarise the time of the first device in a trace.

    Args:
        trace: A `jax.profiler.ProfileData` in which the host annotates each step as `STEP`.
        scopes: Scopes of each instruction, from `scopes_of`.
        costs: Work of each instruction, from `operation_costs`.
        gpu: The rates of the device; None if they are unknown.

    Raises:
        ValueError: The trace has no step, or no operation of a device.
    """
    planes = list(trace.planes)
    host = [
        event
        for plane in planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in line.events
    ]
    begins = [event.start_ns for event in host if event.name == STEP]
    if not begins:
        raise ValueError("the trace has no step")
    device, operations = operations_of(planes, scopes, min(begins))
    if not operations:
        raise ValueError("the trace has no operation of a device")
    window = [(min(begins), max(operation.end for operation in operations))]
    busy = _union((operation.begin, operation.end) for operation in operations)
    parts = defaultdict[str, float](float)
    for operation in operations:
        parts[operation.part] += operation.own
    bounds = {} if gpu is None else _bounds(operations, costs or {}, gpu)
    return Summary(
        device,
        len(begins),
        _length(window) / 1e9,
        _length(busy) / 1e9,
        _seconds(_idle_by_cause(_without(window, busy), host)),
        _seconds(parts),
        _largest(operations, bounds),
        _by_part(bounds),
        _hidden_share(operations),
    )


def _hidden_share(operations: Sequence[Operation]) -> float | None:
    spans: dict[bool, Spans] = {True: [], False: []}
    for each in operations:
        spans[each.part == COLLECTIVES].append((each.begin, each.end))
    collectives = _union(spans[True])
    if not collectives:
        return None
    exposed = _without(collectives, _union(spans[False]))
    return 1 - _length(exposed) / _length(collectives)


def _largest(
    operations: Iterable[Operation], bounds: Mapping[tuple[str, str], Least]
) -> tuple[LargeOperation, ...]:
    found = defaultdict[tuple[str, str, str], list[float]](list)
    for operation in operations:
        found[operation.name, operation.part, operation.title].append(operation.own)
    large, bounded = [], set[tuple[str, str]]()
    for (name, part, title), spent in sorted(found.items(), key=lambda each: -sum(each[1])):
        # If an operation runs several kernels, the longest one gets the bound of all of them.
        least = None if (name, part) in bounded else bounds.get((name, part))
        bounded.add((name, part))
        large.append(LargeOperation(title, part, sum(spent) / 1e9, len(spent), least))
    return tuple(large[:LARGEST])


def _bounds(
    operations: Sequence[Operation], costs: Mapping[str, Cost], gpu: DescribedGpu
) -> dict[tuple[str, str], Least]:
    """The lower bound of the time of each operation and part.

    Collectives have none, because the network limits them.
    """
    least, before = dict[tuple[str, str], Least](), ""
    for operation in operations:
        # One operation may run several kernels, such as a matmul and the sum of its pieces.
        is_new, before = operation.name != before, operation.name
        if is_new and operation.name in costs and operation.part != COLLECTIVES:
            key = operation.name, operation.part
            least[key] = least.get(key, NOTHING).plus(_once(costs[operation.name], gpu))
    return least


def _once(cost: Cost, gpu: DescribedGpu) -> Least:
    compute, memory = cost.flops / gpu.bf16_flops, cost.bytes / gpu.memory_bandwidth
    return Least(max(compute, memory), compute, memory)


def _by_part(bounds: Mapping[tuple[str, str], Least]) -> dict[str, Least]:
    least = dict[str, Least]()
    for (_, part), bound in bounds.items():
        least[part] = least.get(part, NOTHING).plus(bound)
    return least


def _seconds(nanoseconds: Mapping[str, float]) -> dict[str, float]:
    """Convert times from ns to seconds, largest first."""
    ordered = sorted(nanoseconds.items(), key=lambda each: -each[1])
    return {name: spent / 1e9 for name, spent in ordered}


def _idle_by_cause(idle: Spans, host: Iterable[Any]) -> dict[str, float]:
    """Compute idle time in ns by cause; where causes overlap, the first in `CAUSES` counts."""
    found = defaultdict[str, float](float)
    found[BETWEEN] = sum(end - begin for begin, end in idle if end - begin < BETWEEN_NS)
    idle = [(begin, end) for begin, end in idle if end - begin >= BETWEEN_NS]
    for name, cause in CAUSES.items():
        activity = _union(
            (event.start_ns, event.start_ns + event.duration_ns)
            for event in host
            if event.name == name
        )
        rest = _without(idle, activity)
        found[cause] += _length(idle) - _length(rest)
        idle = rest
    found[HOST] = _length(idle)
    return {cause: spent for cause, spent in found.items() if spent}


def operations_of(
    planes: Sequence[Any], scopes: Mapping[str, str], since: float
) -> tuple[str, list[Operation]]:
    """Return the name of the first device, and its operations from time `since` on."""
    name, lines = _gpu_lines(planes) or _cpu_lines(planes)
    return name, [
        operation
        for line in lines
        for operation in _in_line([each for each in line if each[0].start_ns >= since], scopes)
    ]


def _gpu_lines(planes: Sequence[Any]) -> tuple[str, list[list[Event]]] | None:
    gpus = {int(match[1]): plane for plane in planes if (match := _GPU.fullmatch(plane.name))}
    if not gpus:
        return None
    number = min(gpus)
    lines = list(gpus[number].lines)
    # Each stream of the GPU is a line. Other lines show the same time by operation, module or step.
    streams = [line for line in lines if _STREAM.match(line.name)] or [
        line for line in lines if line.name == "XLA Ops"
    ]
    return f"gpu:{number}", [
        [(event, dict(event.stats)) for event in line.events] for line in streams
    ]


def _cpu_lines(planes: Sequence[Any]) -> tuple[str, list[list[Event]]]:
    """Return the name of the first CPU device, and the operations of each of its threads."""
    lines = [line for plane in planes if plane.name.startswith("/host:CPU") for line in plane.lines]
    events = [
        [
            (event, stats, int(stats.get("device_ordinal", 0)))
            for event in line.events
            if "hlo_op" in (stats := dict(event.stats))
        ]
        for line in lines
    ]
    number = min((device for line in events for *_, device in line), default=0)
    return f"cpu:{number}", [
        [(event, stats) for event, stats, device in line if device == number] for line in events
    ]


def _in_line(events: Iterable[Event], scopes: Mapping[str, str]) -> list[Operation]:
    """Return the operations of one thread or stream; `own` excludes nested operations."""
    found: list[Operation] = []
    around: list[int] = []  # indices in `found` of operations that may enclose the next one
    for event, stats in sorted(events, key=lambda each: (each[0].start_ns, -each[0].duration_ns)):
        name = str(stats.get("hlo_op", event.name))
        if name.startswith(COMMAND_BUFFER):  # XLA names a kernel by its operation, without dots
            name = ".".join(event.name.rsplit("_", 1))
            name = name if name in scopes else event.name
        path = scopes.get(name, str(stats.get("tf_op", "")))
        begin, end = event.start_ns, event.start_ns + event.duration_ns
        while around and found[around[-1]].end <= begin:
            around.pop()
        if around:
            outer = found[around[-1]]  # encloses this operation, or overlaps with its start
            shared = min(end, outer.end) - begin
            found[around[-1]] = outer._replace(own=max(0.0, outer.own - shared))
        around.append(len(found))
        found.append(Operation(name, event.name, path, begin, end, end - begin))
    return found


def _union(spans: Iterable[tuple[float, float]]) -> Spans:
    """Merge spans that overlap or touch.

    >>> _union([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5)])
    [(0.0, 2.5), (3.0, 4.0)]
    """
    result: Spans = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((begin, end))
    return result


def _without(spans: Spans, others: Spans) -> Spans:
    """Remove the parts of `spans` that overlap with `others`.

    >>> _without([(0.0, 10.0)], [(1.0, 2.0), (8.0, 12.0)])
    [(0.0, 1.0), (2.0, 8.0)]
    """
    result: Spans = []
    position = 0
    for begin, end in spans:
        while position < len(others) and others[position][1] <= begin:
            position += 1
        for other in others[position:]:
            if other[0] >= end:
                break
            if other[0] > begin:
                result.append((begin, other[0]))
            begin = max(begin, other[1])
        if begin < end:
            result.append((begin, end))
    return result


def _length(spans: Spans) -> float:
    return sum((end - begin for begin, end in spans), 0.0)
