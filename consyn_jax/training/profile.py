"""`--profile_steps A:B`: a trace of those steps, for the tools that show traces, and one page of what it says."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData, StepTraceAnnotation, TraceAnnotation

from consyn_jax.training.step import Batch

SUMMARY = "summary.txt"
STEP = "train step"
# Parts of the model and the step are `jax.named_scope`s of these names, which the compiler keeps with each operation.
SCOPES = ("attention", "mlp", "head", "norm", "embedding", "optimizer")
COLLECTIVES, OTHER = "collectives", "other"
# What the host is at, as the trace calls it, and what the page says where the device stood still meanwhile.
WAITING, EVALUATING, SAVING = "waiting for data", "evaluating", "saving"
CAUSES = {WAITING: WAITING, EVALUATING: EVALUATING, SAVING: SAVING, "backend_compile_and_load": "compiling"}
BETWEEN, HOST = "between operations", "host"
BETWEEN_NS = 20_000.0  # a device that stands still for less waits for its next operation to be launched, not for anybody's work
LARGEST = 3

_SCOPE = re.compile(rf"\b({'|'.join(SCOPES)})\b")
_KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
_COLLECTIVE = re.compile(rf"{_KINDS}|nccl", re.IGNORECASE)
_EXCHANGE = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = .*? (?:{_KINDS})(?:-start|-done)?\(", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?\bop_name=\"([^\"]*)\"", re.MULTILINE)
_GPU, _STREAM = re.compile(r"/device:GPU:(\d+)"), re.compile(r"Stream #")
Spans = list[tuple[float, float]]  # [begin, end) in ns, ascending and apart


class Operation(NamedTuple):
    """One execution of an operation on the device, times in ns.

    Attributes:
        name: in the compiled program, or of the kernel where the trace does not know that.
        kernel: what ran; on CPUs the same.
        path: scopes that it came from, one inside the other; empty where nobody knows.
        own: without the operations inside it, as a loop has them.
    """

    name: str
    kernel: str
    path: str
    begin: float
    end: float
    own: float

    @property
    def title(self) -> str:
        """For people: name and kernel."""
        return self.name if self.name == self.kernel else f"{self.name}: {self.kernel[:80]}"

    @property
    def part(self) -> str:
        """The part of the model or step that it belongs to: one of `SCOPES`, collectives, or other."""
        if self.path == COLLECTIVES or _COLLECTIVE.search(f"{self.name} {self.kernel}"):
            return COLLECTIVES
        found = _SCOPE.findall(self.path)
        return found[-1] if found else OTHER


@dataclass(frozen=True)
class Summary:
    """What a trace says of one device, in seconds.

    Attributes:
        steps: how many were traced.
        idle: the device's idle time by cause.
        parts: its busy time by part, the largest first. Operations beside each other count each.
        largest: names, parts, seconds and executions of the operations that took longest, the largest first.
    """

    device: str
    steps: int
    total_s: float
    busy_s: float
    idle: dict[str, float]
    parts: dict[str, float]
    largest: tuple[tuple[str, str, float, int], ...]


def scopes_of(program: str) -> dict[str, str]:
    """Path of scopes by name of an instruction, from the text of a compiled program; of an exchange between devices, that it is one.

    >>> scopes_of('  ROOT %dot.1 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(step)/mlp/dot_general" source_line=1}')
    {'dot.1': 'jit(step)/mlp/dot_general'}
    """
    return dict(_INSTRUCTION.findall(program)) | dict.fromkeys(_EXCHANGE.findall(program), COLLECTIVES)


def summarise(trace: Any, scopes: Mapping[str, str]) -> Summary:
    """What the trace of some steps says of its first device.

    Args:
        trace: a `jax.profiler.ProfileData` whose host annotates each step as `STEP`.
        scopes: as `scopes_of` gives them.

    Raises:
        ValueError: there is no step in it, or no operation of a device.
    """
    planes = list(trace.planes)
    host = [event for plane in planes if plane.name.startswith("/host:") for line in plane.lines for event in line.events]
    begins = [event.start_ns for event in host if event.name == STEP]
    if not begins:
        raise ValueError("the trace has no step")
    device, operations = _operations(planes, scopes, min(begins))
    if not operations:
        raise ValueError("the trace has no operation of a device")
    window = [(min(begins), max(operation.end for operation in operations))]
    busy = _union((operation.begin, operation.end) for operation in operations)
    idle, left = defaultdict[str, float](float), _without(window, busy)
    idle[BETWEEN] = sum(end - begin for begin, end in left if end - begin < BETWEEN_NS)
    left = [(begin, end) for begin, end in left if end - begin >= BETWEEN_NS]
    for name, cause in CAUSES.items():
        rest = _without(left, _union((event.start_ns, event.start_ns + event.duration_ns) for event in host if event.name == name))
        idle[cause] += _length(left) - _length(rest)
        left = rest
    idle[HOST] = _length(left)
    parts, kernels = defaultdict[str, float](float), defaultdict[tuple[str, str], list[float]](list)
    for operation in operations:
        parts[operation.part] += operation.own
        kernels[operation.title, operation.part].append(operation.own)
    largest = sorted(((name, part, sum(times) / 1e9, len(times)) for (name, part), times in kernels.items()), key=lambda each: -each[2])
    seconds = {cause: spent / 1e9 for cause, spent in sorted(idle.items(), key=lambda each: -each[1]) if spent}
    ordered = {part: spent / 1e9 for part, spent in sorted(parts.items(), key=lambda each: -each[1])}
    return Summary(device, len(begins), _length(window) / 1e9, _length(busy) / 1e9, seconds, ordered, tuple(largest[:LARGEST]))


def _operations(planes: Sequence[Any], scopes: Mapping[str, str], since: float) -> tuple[str, list[Operation]]:
    """The name of the first device, and what it did from `since` on."""
    gpus = {int(match[1]): plane for plane in planes if (match := _GPU.fullmatch(plane.name))}
    if gpus:
        number = min(gpus)
        lines = list(gpus[number].lines)
        # each stream of the GPU is a line; other lines say the same once more, by operation, module or step
        streams = [line for line in lines if _STREAM.match(line.name)] or [line for line in lines if line.name == "XLA Ops"]
        events = [[(event, dict(event.stats)) for event in line.events] for line in streams]
        name = f"gpu:{number}"
    else:  # the threads of a CPU, of which each runs operations
        lines = [line for plane in planes if plane.name.startswith("/host:CPU") for line in plane.lines]
        events = [[(event, stats) for event in line.events if "hlo_op" in (stats := dict(event.stats))] for line in lines]
        number = min((int(stats.get("device_ordinal", 0)) for line in events for _, stats in line), default=0)
        events = [[(event, stats) for event, stats in line if int(stats.get("device_ordinal", 0)) == number] for line in events]
        name = f"cpu:{number}"
    return name, [operation for line in events for operation in _in_line([each for each in line if each[0].start_ns >= since], scopes)]


def _in_line(events: Iterable[tuple[Any, Mapping[str, Any]]], scopes: Mapping[str, str]) -> list[Operation]:
    """Operations of one thread or stream. One that lies inside another, as a loop's body does, is not counted for that."""
    found: list[Operation] = []
    around: list[int] = []  # of `found`, those that the next may lie in
    for event, stats in sorted(events, key=lambda each: (each[0].start_ns, -each[0].duration_ns)):
        name = str(stats.get("hlo_op", event.name))
        begin, end = event.start_ns, event.start_ns + event.duration_ns
        while around and found[around[-1]].end <= begin:
            around.pop()
        if around:
            outer = found[around[-1]]
            found[around[-1]] = outer._replace(own=max(0.0, outer.own - (end - begin)))
        around.append(len(found))
        found.append(Operation(name, event.name, scopes.get(name, str(stats.get("tf_op", ""))), begin, end, end - begin))
    return found


def _union(spans: Iterable[tuple[float, float]]) -> Spans:
    """
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
    """
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


@dataclass(frozen=True)
class Program:
    """The train step that is traced.

    Attributes:
        text: its compiled text.
        flops: of one step on one device, as the model needs them.
        peak: FLOP/s that a device can do at best; None where nobody knows.
    """

    text: Callable[[], str]
    flops: float
    peak: float | None


def page(summary: Summary, program: Program, steps: tuple[int, int]) -> str:
    """One page for people."""
    first, last = steps
    each, idle = summary.total_s / summary.steps, sum(summary.idle.values())
    achieved = program.flops / each
    possible = "the peak of this device is not known"
    if program.peak is not None:
        possible = f"{achieved / program.peak:.1%} of the {program.peak / 1e12:,.0f} TFLOP/s that are possible in bf16"
    together = sum(summary.parts.values())
    lines = [
        f"Steps {first:,} to {last:,}, {each * 1e3:,.1f} ms each, as {summary.device} spent them.",
        "",
        f"  busy       {summary.busy_s / summary.total_s:6.1%}",
        f"  idle       {idle / summary.total_s:6.1%}  {_idle(summary)}",
        f"  achieved   {achieved / 1e12:,.3g} TFLOP/s: {possible}",
        "",
        "Where the busy time went:",
        *(f"  {part:<12}{spent / together:6.1%}  {spent / summary.steps * 1e3:10,.2f} ms a step" for part, spent in summary.parts.items()),
        "",
        f"The {len(summary.largest)} largest kernels:",
        *(
            f"  {spent / together:6.1%}  {spent / summary.steps * 1e3:10,.2f} ms in {times / summary.steps:,.0f} a step  {name} ({part})"
            for name, part, spent, times in summary.largest
        ),
    ]
    return "\n".join(lines) + "\n"


def _idle(summary: Summary) -> str:
    causes = ", ".join(f"{cause} {spent / summary.total_s:.1%}" for cause, spent in summary.idle.items() if spent >= 5e-4 * summary.total_s)
    return f"({causes})" if causes else ""


class Profile:
    """Traces the steps that were asked for, and writes the page at the end. Whatever fails here is told, and does not end a run.

    Args:
        steps: the first and the last, counted from 1; None traces nothing.
        directory: where trace and page go.
        tell, warn: are told what the trace says, and what went wrong.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, tell: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._wanted, self._directory, self._tell, self._warn = steps, directory, tell, warn
        self.program: Program | None = None
        self._traced: list[int] = []
        self._traces = False
        self._last: Any = None

    def step(self, number: int, before: Any) -> AbstractContextManager[Any]:
        """Around the dispatch of step `number`, which follows on the state `before`."""
        if self._wanted is None or not self._wanted[0] <= number <= self._wanted[1]:
            return nullcontext()
        if not self._traces:
            jax.block_until_ready(before)  # the steps before it are none of this trace's
            self._guard(self._start)
        if not self._traces:
            return nullcontext()
        self._traced.append(number)
        return StepTraceAnnotation(STEP, step_num=number)

    def ended(self, number: int, after: Any) -> None:
        """Behind the dispatch of step `number`, whose results are `after`."""
        if self._traces and self._wanted is not None:
            self._last = after
            if number >= self._wanted[1]:
                self._guard(self._stop)

    def close(self) -> None:
        """End a trace that is under way, and write the page."""
        if self._traces:
            self._guard(self._stop)
        if self._wanted is not None and self._traced:
            self._guard(self._summarise)
        elif self._wanted is not None:
            self._tell(f"No step of --profile_steps {self._wanted[0]}:{self._wanted[1]} was run, so there is no profile.")
        self._wanted = None

    def _start(self) -> None:
        options: Any = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of a function would make the trace large, and the step slow
        self._directory.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(self._directory, profiler_options=options)
        self._traces = True

    def _stop(self) -> None:
        self._traces = False
        try:
            jax.block_until_ready(self._last)
        finally:
            jax.profiler.stop_trace()

    def _summarise(self) -> None:
        assert self.program is not None
        newest = max(self._directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        summary = summarise(ProfileData.from_file(str(newest)), scopes_of(self.program.text()))
        text = page(summary, self.program, (self._traced[0], self._traced[-1]))
        (self._directory / SUMMARY).write_text(text)
        shares = ", ".join(f"{part} {spent / sum(summary.parts.values()):.0%}" for part, spent in summary.parts.items())
        self._tell(text.splitlines()[0])
        self._tell(f"Busy {summary.busy_s / summary.total_s:.0%} {_idle(summary).replace('(', '(idle: ')}; of that {shares}.")
        self._tell(f"More in {self._directory / SUMMARY}; the trace is beside it.")

    def _guard(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - profilers, drivers and disks may raise anything, and none of it may end a run
            self._wanted = None
            self._warn(f"The profile of these steps failed; the run goes on. {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def doing(name: str) -> TraceAnnotation:
    """What the host is at, for the trace: `WAITING`, `EVALUATING` or `SAVING`. Costs a microsecond where nothing is traced."""
    return TraceAnnotation(name)


def waiting_for(batches: Iterator[Batch]) -> Iterator[Batch]:
    """`batches`, with the waits for them in the trace."""
    while True:
        with doing(WAITING):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
