"""Read a profiler's trace: device time by part of the model, and idle time by cause."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from consyn_jax.training.runtime.watchdog import EVALUATING, SAVING, WAITING

STEP = "train step"
# Names of the `jax.named_scope`s in the model and the step, which the compiler attaches to each
# operation.
SCOPES = ("attention", "mlp", "head", "norm", "embedding", "optimizer")
COLLECTIVES, OTHER = "collectives", "other"
# Name of a host activity in the trace -> cause of the device's idle time.
CAUSES = {
    WAITING: WAITING,
    EVALUATING: EVALUATING,
    SAVING: SAVING,
    "backend_compile_and_load": "compiling",
}
BETWEEN, HOST = "between operations", "host"
BETWEEN_NS = 20_000.0  # shorter idle times count as the launch latency of operations
LARGEST = 3

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
        """The part of the model or step: one of `SCOPES`, collectives, or other."""
        if self.path == COLLECTIVES or _COLLECTIVE.search(f"{self.name} {self.kernel}"):
            return COLLECTIVES
        found = _SCOPE.findall(self.path)
        return found[-1] if found else OTHER


@dataclass(frozen=True)
class Summary:
    """The time of a device in a trace, in seconds.

    Attributes:
        steps: Number of traced steps.
        idle: Idle time by cause.
        parts: Busy time by part of the model, largest first. Operations that run concurrently each
            count in full.
        largest: Operations with the longest total time: name, part, seconds and number of
            executions.
    """

    device: str
    steps: int
    total_s: float
    busy_s: float
    idle: dict[str, float]
    parts: dict[str, float]
    largest: tuple[tuple[str, str, float, int], ...]


def scopes_of(program: str) -> dict[str, str]:
    """Map the name of each instruction to its scopes, from the text of a compiled program.

    Collective operations get the scope `COLLECTIVES`.

    >>> scopes_of('  ROOT %dot.1 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(step)/mlp/dot"}')
    {'dot.1': 'jit(step)/mlp/dot'}
    """
    collectives = _COLLECTIVE_INSTRUCTION.findall(program)
    return dict(_INSTRUCTION.findall(program)) | dict.fromkeys(collectives, COLLECTIVES)


def summarise(trace: Any, scopes: Mapping[str, str]) -> Summary:
    """Summarise the time of the first device in a trace.

    Args:
        trace: A `jax.profiler.ProfileData` in which the host annotates each step as `STEP`.
        scopes: Scopes of each instruction, from `scopes_of`.

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
    device, operations = _operations(planes, scopes, min(begins))
    if not operations:
        raise ValueError("the trace has no operation of a device")
    window = [(min(begins), max(operation.end for operation in operations))]
    busy = _union((operation.begin, operation.end) for operation in operations)
    parts, kernels = defaultdict[str, float](float), defaultdict[tuple[str, str], list[float]](list)
    for operation in operations:
        parts[operation.part] += operation.own
        kernels[operation.title, operation.part].append(operation.own)
    largest = sorted(
        ((name, part, sum(times) / 1e9, len(times)) for (name, part), times in kernels.items()),
        key=lambda each: -each[2],
    )
    return Summary(
        device,
        len(begins),
        _length(window) / 1e9,
        _length(busy) / 1e9,
        _seconds(_idle_by_cause(_without(window, busy), host)),
        _seconds(parts),
        tuple(largest[:LARGEST]),
    )


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


def _operations(
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
    """Return the operations of one thread or stream; `own` excludes the time of nested ones."""
    found: list[Operation] = []
    around: list[int] = []  # indices in `found` of operations that may enclose the next one
    for event, stats in sorted(events, key=lambda each: (each[0].start_ns, -each[0].duration_ns)):
        name = str(stats.get("hlo_op", event.name))
        path = scopes.get(name, str(stats.get("tf_op", "")))
        begin, end = event.start_ns, event.start_ns + event.duration_ns
        while around and found[around[-1]].end <= begin:
            around.pop()
        if around:
            outer = found[around[-1]]
            found[around[-1]] = outer._replace(own=max(0.0, outer.own - (end - begin)))
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
    return sum(end - begin for begin, end in spans)
