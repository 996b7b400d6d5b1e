"""Where does a training step spend its time on one core, ours against `torch.compile`'s?

Both take the same steps of `vs_pytorch.py`'s model, in processes of their own, on one core, where
the times of their operations add up. Matmuls are grouped by the part of the model that they belong
to, so that their rates can be compared; what is left is grouped by kind.

    python benchmarks/cpu_kernels.py --model 27m --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import facts, parser, table, write
from torch_step import COMPILED, Torch
from vs_pytorch import Ours, Worker

HEAD, MLP, PROJECTIONS = "matmuls of the head", "matmuls of the MLP", "matmuls of projections"
ATTENTION, OPTIMIZER, REST = "attention", "optimizer and clipping", "rest: loss, norms, copies"
MATMULS, GROUPS = (HEAD, MLP, PROJECTIONS), (HEAD, MLP, PROJECTIONS, ATTENTION, OPTIMIZER, REST)
SHAPE = r"\w+\[([\d,]*)\]\S*"
DOT = re.compile(
    rf"^\s*(?:ROOT )?%?([\w.\-]+) = {SHAPE} dot\(%?([\w.\-]+), .*?"
    r"lhs_contracting_dims=\{(\d+)\}",
    re.MULTILINE,
)
RESULT = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = {SHAPE} ", re.MULTILINE)
Found = dict[str, tuple[float, float]]  # milliseconds and matmul FLOPs a step, by group


def one_core() -> None:
    """Keep this process on one core."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])


def group_of(dims: set[int], vocab_size: int, mlp_dim: int) -> str:
    """The group of a matmul with these dimensions."""
    if vocab_size in dims:
        return HEAD
    return MLP if {mlp_dim, 2 * mlp_dim} & dims else PROJECTIONS


def together(rows: list[tuple[str, float, float]], steps: int) -> Found:
    """Sum times in ms and FLOPs by group, for one step."""
    return {
        name: (
            sum(row[1] for row in rows if row[0] == name) / steps,
            sum(row[2] for row in rows if row[0] == name) / steps,
        )
        for name in GROUPS
    }


class OursProfiled(Ours):
    """Our step, with the time of each operation of the compiled program."""

    def __init__(self, *arguments: Any) -> None:
        one_core()
        super().__init__(*arguments)

    def profile(self, steps: int) -> Found:
        """Milliseconds and FLOPs of each group."""
        import jax
        from jax.profiler import ProfileData, StepTraceAnnotation

        from consyn_jax.training.diagnostics.trace import STEP, operations_of, scopes_of

        options: Any = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        self.turn("", 2)
        with tempfile.TemporaryDirectory() as directory:
            jax.profiler.start_trace(directory, profiler_options=options)
            for number in range(steps):
                with StepTraceAnnotation(STEP, step_num=number):
                    self.turn("", 1)
            jax.profiler.stop_trace()
            (file,) = Path(directory).rglob("*.xplane.pb")
            planes = list(ProfileData.from_file(str(file)).planes)
        text = self.train_step.compiled.as_text()
        dots, config = _dots(text), self.train_step.config
        rows = []
        for each in operations_of(planes, scopes_of(text), 0.0)[1]:
            dims = dots.get(each.name)
            name = {"attention": ATTENTION, "optimizer": OPTIMIZER}.get(each.part, REST)
            if dims is not None and len(dims) == 3:  # those of attention have more
                name = group_of(set(dims), self.train_step.vocab_size, config.mlp_dim)
            rows.append((name, each.own / 1e6, 2.0 * math.prod(dims or [0])))
        return together(rows, steps)


def _dots(program: str) -> dict[str, list[int]]:
    """The dimensions of each matmul of a program: those of the result, and the contracted one."""
    shapes = {name: _dims(dims) for name, dims in RESULT.findall(program)}
    return {
        name: [*_dims(dims), shapes[left][int(contracted)]]
        for name, dims, left, contracted in DOT.findall(program)
        if left in shapes
    }


def _dims(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each]


class TorchProfiled(Torch):
    """The step of `torch.compile`, with the time of each operator."""

    def __init__(self, given: dict[str, Any], exported: Path) -> None:
        one_core()
        super().__init__(given, exported)
        self.torch.set_num_threads(1)

    def profile(self, steps: int) -> Found:
        """Milliseconds and FLOPs of each group."""
        from torch.profiler import ProfilerActivity, profile

        self.reset(COMPILED)
        self.turn(COMPILED, 2)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            self.turn(COMPILED, steps)
        rows = [
            (self._group(each), each.self_cpu_time_total / 1e3, each.count * self._flops(each))
            for each in found.key_averages(group_by_input_shape=True)
        ]
        return together(rows, steps)

    def _group(self, event: Any) -> str:
        if self._matrices(event):
            config = self.given["config"]
            dims = {size for shape in event.input_shapes for size in shape}
            return group_of(dims, config.vocab_size, config.mlp_dim)
        if "attention" in event.key:
            return ATTENTION
        is_update = any(name in event.key for name in ("adamw", "AdamW", "norm", "mul_"))
        return OPTIMIZER if is_update else REST

    @staticmethod
    def _matrices(event: Any) -> list[list[int]]:
        """The shapes of the two operands of a matmul; empty for other operators."""
        first = {"aten::mm": 0, "aten::addmm": 1}.get(event.key)
        return [] if first is None else event.input_shapes[first : first + 2]

    def _flops(self, event: Any) -> float:
        matrices = self._matrices(event)
        return 2.0 * matrices[0][0] * matrices[0][1] * matrices[1][1] if matrices else 0.0


def measure(model: str = "27m", steps: int = 5, tiny: bool = False) -> dict[str, Any]:
    """Profile both, ours first."""
    from programs import CASES

    case = CASES["tiny" if tiny else model]
    with tempfile.TemporaryDirectory() as directory:
        ours = Worker(OursProfiled, case.flags, case.vocab_size, Path(directory))
        torch = Worker(TorchProfiled, ours.facts, Path(directory))
    try:
        found: Mapping[str, Found] = {
            "ours": ours.ask("profile", steps),
            "torch.compile": torch.ask("profile", steps),
        }
    finally:
        ours.close()
        torch.close()
    rows = []
    for name in GROUPS:
        row: dict[str, Any] = {"part": name}
        for who, groups in found.items():
            ms, flops = groups[name]
            row[f"{who} ms"] = ms
            row[f"{who} GFLOP/s"] = flops / ms / 1e6 if name in MATMULS else None
        rows.append(row)
    rows.append(
        {"part": "together"}
        | {f"{who} ms": sum(ms for ms, _ in groups.values()) for who, groups in found.items()}
    )
    return {"model": "tiny" if tiny else model, "steps": steps, "rows": rows}


def main() -> None:
    """Run, print the table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="27m", help="27m or haiku")
    arguments.add_argument("--steps", type=int, default=5)
    given = arguments.parse_args()
    result = measure(given.model, given.steps, given.tiny)
    print(table(result["rows"]))
    if given.out is not None:
        write(given.out, {**facts(), **result})


if __name__ == "__main__":
    sys.exit(main())
