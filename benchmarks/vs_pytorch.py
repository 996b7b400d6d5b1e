"""How fast is our train step compared with plain PyTorch's?

Model, weights, batches, precision, optimizer and schedule are the same, and blocks of steps take
turns. Ours is the step of `consyn-train`. PyTorch's is written as its users would: SDPA, fused
projections, autocast, clipping, fused AdamW, eager and with `torch.compile`; for a model that we
train with Muon, a Muon whose matrices of one shape are one batch. Harder ones are a fused loss that
keeps no logits, as Liger's kernels have it, `max-autotune`, and fp8 by torchao. With several
documents a row, compiled PyTorch runs FlexAttention, with a mask that is made for each batch, and
eager PyTorch SDPA with a whole mask. "best of torch" is the fastest of them, the one to beat.

Each framework has a process of its own, which waits while the other is timed. First their losses
over some steps, from the same weights on the same batches, must agree. A contestant that fails, or
whose losses differ, leaves the race and is named; the others go on. Under other load torch's
threads lose whole time slices spinning for each other; OMP_WAIT_POLICY=passive avoids that and is
set here unless it is given. "processor ms" is the processor time of a step, which other load hardly
changes.

    # CPU, float32, 2 threads
    python benchmarks/vs_pytorch.py --models haiku 27m --out benchmarks/results/NAME.json
    # quick
    python benchmarks/vs_pytorch.py --models haiku --rounds 5 --against eager
    # one GPU, bfloat16
    python benchmarks/vs_pytorch.py --models verse stanza --against compiled fused_loss
    # rows of eight documents; the slower search for kernels; Muon; 8 bits
    python benchmarks/vs_pytorch.py --models verse --documents 8 --against compiled fused_loss
    python benchmarks/vs_pytorch.py --models verse --against max_autotune
    python benchmarks/vs_pytorch.py --models enwik8 --against compiled
    python benchmarks/vs_pytorch.py --models "stanza, fp8" --against compiled fp8
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from harness import alternate, facts, parser, spread, table, write
from torch_step import BATCHES, COMPILED, EAGER, THREADS, WAYS, Torch

LOSS_STEPS = 8
BLOCK_S = {"cpu": 2.0, "cuda": 1.0}  # of the slowest contestant
OURS, BEST, NO_TIME = "consyn_jax", "best of torch", "no time was left"
# Relative, over the first steps: rounding differs, and accumulates from step to step.
LOSS_TOLERANCE = {"no": 1e-3, "bf16": 1e-2, "fp8": 2e-2}
WARM_UP_SHARE = 0.6  # of a budget, after which no other contestant begins


class Ours:
    """The train step of `consyn-train`.

    Args:
        flags: of `consyn-train`.
        exported: directory for the initial weights, in the layout of Hugging Face.
        documents: in each row.
    """

    def __init__(
        self, flags: dict[str, Any], vocab_size: int, exported: Path, documents: int = 1
    ) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")  # the rest is torch's
        import numpy as np
        from programs import TOTAL_STEPS, TrainStep, make_batch

        from consyn_jax.model import ConsynLMHeadModel

        def export(config: Any, params: Any) -> None:
            ConsynLMHeadModel.from_parameters(config, params).save_pretrained(exported)

        step = self.train_step = TrainStep(flags, vocab_size, export)
        optimizer, shape = step.run.optimizer, (1, step.run.budget.batch_size, step.length)
        self.batches = [step.batch(seed, documents) for seed in range(BATCHES)]
        names = ("optimizer", "beta1", "beta2", "eps", "weight_decay", "momentum_decay")
        names += ("max_grad_norm",)
        self.facts = {
            "config": step.config,
            "parameters": step.program.layout.num_parameters,
            "precision": step.run.hardware.mixed_precision,
            "optimizer": {name: getattr(optimizer, name) for name in names},
            "rates": np.asarray(step.schedule(np.arange(TOTAL_STEPS))).tolist(),
            "documents": documents,
            "batches": [make_batch(shape, vocab_size, seed, documents) for seed in range(BATCHES)],
        }

    def losses(self, name: str, steps: int) -> list[float]:
        """The losses of the first steps."""
        return [
            float(self.train_step(self.batches[number % BATCHES])["loss"])
            for number in range(steps)
        ]

    def turn(self, name: str, steps: int) -> None:
        """Steps, to the end of the last."""
        metrics = [self.train_step(self.batches[number % BATCHES]) for number in range(steps)]
        float(metrics[-1]["loss"])


# ------------------------------------------------------------------------------------------ workers


class Worker:
    """A contestant in a process of its own, and the pipe to it."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.facts, self.record = self._answer()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the contestant.

        Raises:
            RuntimeError: it failed, or its process has ended.
        """
        return self._answer((method, arguments))

    def _answer(self, question: Any = None) -> Any:
        try:
            if question is not None:
                self.pipe.send(question)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(f"The process ended with {self.process.exitcode}.") from None
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer["found"]

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(30)


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answer until the pipe is closed; any error is reported to the other process."""
    contestant: Any = None

    def answer(question: Any) -> Any:
        nonlocal contestant
        if contestant is None:
            contestant = make(*arguments)
            return contestant.facts, facts()
        before, (method, given) = _cpu_seconds(), question
        found = getattr(contestant, method)(*given)
        return found if found is not None else _cpu_seconds() - before

    question = None
    while True:
        try:
            pipe.send({"found": answer(question)})
        except Exception:  # noqa: BLE001
            pipe.send({"failed": traceback.format_exc()})
            if contestant is None:
                return
        try:
            question = pipe.recv()
        except EOFError:
            return


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --------------------------------------------------------------------------------------------- race


def race(
    name: str,
    rounds: int,
    against: Sequence[str],
    batch_size: int | None = None,
    documents: int = 1,
    budget_s: float = math.inf,
) -> dict[str, Any]:
    """Compare the losses of one model, then time blocks of steps in turn."""
    from programs import CASES

    case, given = CASES[name], {} if batch_size is None else {"batch_size": batch_size}
    ends = time.monotonic() + budget_s
    with tempfile.TemporaryDirectory() as directory:
        flags = case.flags | given
        ours = Worker(Ours, flags, case.vocab_size, Path(directory), documents)
        torch = Worker(Torch, ours.facts, Path(directory))
    workers = {OURS: ours} | dict.fromkeys(against, torch)
    precision, shape = ours.facts["precision"], ours.facts["batches"][0]["labels"].shape
    try:
        until = ends - (1 - WARM_UP_SHARE) * budget_s if budget_s < math.inf else ends
        losses, absent = compare_losses(workers, LOSS_TOLERANCE[precision], until)
        present = {who: workers[who] for who in losses}
        steps, seconds, cpu = timed(present, rounds, BLOCK_S[torch.facts["device"]], ends)
    finally:
        ours.close()
        torch.close()
    step_ms = {who: [1e3 * s / steps for s in turns] for who, turns in seconds.items()}
    cpu_ms = {who: [1e3 * s / steps for s in cpu[who][-len(step_ms[OURS]) :]] for who in present}
    rows = [_row(name, who, step_ms, cpu_ms[who], math.prod(shape)) for who in present]
    rows = [*rows, *_best(rows), *(_absent(name, who, note) for who, note in absent.items())]
    print(table(rows), flush=True)
    return {
        "parameters": ours.facts["parameters"],
        "batch": shape,
        "documents": documents,
        "precision": precision,
        "steps_a_block": steps,
        "note": case.note,
        "losses": losses,
        "losses_apart": {who: apart(losses[who], losses[OURS]) for who in losses},
        "step_ms": step_ms,
        "processes": {"consyn_jax": ours.record, "torch": torch.record},
        "rows": rows,
    }


def compare_losses(
    workers: dict[str, Worker], tolerance: float, until: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The losses of the first steps of who can race, and the reason why others cannot.

    Args:
        until: time of `time.monotonic`, after which only the first of torch begins.
    """
    losses = {OURS: workers[OURS].ask("losses", OURS, LOSS_STEPS)}
    assert all(math.isfinite(loss) for loss in losses[OURS])
    absent: dict[str, str] = {}
    for who, worker in workers.items():
        if who == OURS:
            continue
        if len(losses) > 1 and time.monotonic() > until:
            absent[who] = NO_TIME
            continue
        began = time.monotonic()
        try:
            found = worker.ask("losses", who, LOSS_STEPS)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            absent[who] = str(error).strip().splitlines()[-1][:200]
            continue
        distance = apart(found, losses[OURS])
        print(f"{who}: {distance:.1e} apart, {time.monotonic() - began:.0f} s", flush=True)
        if distance < tolerance:
            losses[who] = found
        else:
            absent[who] = f"its losses are {distance:.1e} apart from ours"
    return losses, absent


def apart(losses: list[float], ours: list[float]) -> float:
    """The largest relative distance of losses; infinite if one is not finite."""
    distances = [abs(a / b - 1) for a, b in zip(losses, ours, strict=True)]
    return max(distances) if all(map(math.isfinite, distances)) else math.inf


def timed(
    workers: dict[str, Worker], rounds: int, block_s: float, ends: float
) -> tuple[int, dict[str, list[float]], dict[str, list[float]]]:
    """Steps of a block, and seconds of each block on the wall and of the processor.

    There are fewer rounds where more would not end before `ends`.
    """
    cpu: dict[str, list[float]] = {who: [] for who in workers}

    def turns(steps: int) -> dict[str, Callable[[], None]]:
        return {
            who: lambda who=who: cpu[who].append(workers[who].ask("turn", who, steps))
            for who in workers
        }

    first = [seconds for (seconds,) in alternate(turns(2), rounds=1, warm_up=0).values()]
    steps = max(1, min(200, round(block_s / (max(first) / 2))))
    fit = (ends - time.monotonic()) / (sum(first) / 2 * steps) - 1  # one round warms up
    return steps, alternate(turns(steps), max(1, int(min(rounds, fit)))), cpu


def _row(
    model: str, who: str, step_ms: dict[str, list[float]], cpu_ms: list[float], tokens: int
) -> dict[str, Any]:
    """A row of the table; its ratio is the median over the rounds, and above 1 ours is faster."""
    time_ms = spread(step_ms[who])
    ratios = [theirs / ours for theirs, ours in zip(step_ms[who], step_ms[OURS], strict=True)]
    return {
        "model": model,
        "who": who if who == OURS else WAYS[who].who,
        "step ms": time_ms["median"],
        "least": time_ms["min"],
        "most": time_ms["max"],
        "processor ms": statistics.median(cpu_ms),
        "tokens/s": 1e3 * tokens / time_ms["median"],
        "ours is faster by": statistics.median(ratios),
    }


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of the fastest of torch, again, under the name that goals look for."""
    fastest = min(rows[1:], key=lambda row: row["ours is faster by"], default=None)
    return [] if fastest is None else [{**fastest, "who": BEST, "note": fastest["who"]}]


def _absent(model: str, who: str, note: str) -> dict[str, Any]:
    """The row of one that did not race; it is wrong unless it is only not possible here."""
    row = {"model": model, "who": WAYS[who].who, "note": note}
    excused = note == NO_TIME or note.startswith("ModuleNotFoundError")
    return row if excused else {**row, "ok": False}


def measure(
    models: Iterable[str] = ("haiku", "27m"),
    rounds: int = 7,
    against: Sequence[str] = (EAGER, COMPILED),
    batch_size: int | None = None,
    documents: int = 1,
    budget_s: float = math.inf,
    tiny: bool = False,
) -> dict[str, Any]:
    """Race each model; each has the same share of the budget."""
    models = list(models)
    if tiny:
        models, rounds = [name for name in models if name.startswith("tiny")] or ["tiny"], 2
    share_s = budget_s / len(models)
    found = {name: race(name, rounds, against, batch_size, documents, share_s) for name in models}
    return {"rows": [row for one in found.values() for row in one.pop("rows")], "models": found}


def main() -> int:
    """Run, print a table per model, write JSON; 1 if a contestant failed."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--models",
        nargs="+",
        default=["haiku", "27m"],
        help="haiku, 27m; on a GPU verse, stanza, enwik8",
    )
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--batch_size", type=int, help="in place of the model's own")
    arguments.add_argument(
        "--against", nargs="+", choices=WAYS, default=[EAGER, COMPILED], help="%(choices)s"
    )
    arguments.add_argument("--documents", type=int, default=1, help="documents in each row")
    given = arguments.parse_args()
    result = measure(
        *(given.models, given.rounds, given.against, given.batch_size, given.documents),
        tiny=given.tiny,
    )
    if given.out is not None:
        write(given.out, {**facts(), **result})
    return int(any(row.get("ok") is False for row in result["rows"]))


if __name__ == "__main__":
    if len(os.sched_getaffinity(0)) > THREADS and not Path("/proc/driver/nvidia").exists():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    sys.exit(main())
