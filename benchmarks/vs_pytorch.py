"""How fast is our train step compared with plain PyTorch's?

Model, weights, batches, precision and schedule are the same, and blocks of steps take turns. Ours
is the step of `consyn-train`. PyTorch's is written as its users would: SDPA, fused projections,
autocast, clipping, fused AdamW, eager and with `torch.compile`. With several documents a row,
compiled PyTorch runs FlexAttention, with a mask that is made for each batch, and eager PyTorch SDPA
with a whole mask. Each framework has a process of its own, which waits while the other is timed. First their losses over some steps, from the same
weights on the same batches, must agree. Under other load torch's threads lose whole time slices
spinning for each other; OMP_WAIT_POLICY=passive avoids that and is set here unless it is given.
"processor ms" is the processor time of a step, which other load hardly changes.

    # CPU, float32, 2 threads
    python benchmarks/vs_pytorch.py --models haiku 27m --out benchmarks/results/NAME.json
    # quick, eager only
    python benchmarks/vs_pytorch.py --models haiku --rounds 5 --no_compile
    # one GPU, bfloat16
    python benchmarks/vs_pytorch.py --models verse stanza
    # rows of eight documents, and the slower search for kernels of torch.compile
    python benchmarks/vs_pytorch.py --models verse --documents 8 --max_autotune
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from harness import alternate, facts, parser, spread, table, write

THREADS, LOSS_STEPS, BATCHES, BLOCK_S = 2, 8, 4, 2.0
OURS, EAGER, COMPILED = "consyn_jax", "torch eager", "torch.compile"
AUTOTUNED = "torch.compile, max-autotune"
# Relative, over the first steps: rounding differs, and accumulates from step to step.
LOSS_TOLERANCE = {"no": 1e-3, "bf16": 1e-2}


# -------------------------------------------------------------------------------------- contestants


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
        names = ("beta1", "beta2", "eps", "weight_decay", "max_grad_norm")
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


class Torch:
    """The same step in PyTorch, eager and compiled, which share weights and optimizer.

    Args:
        given: `Ours.facts`.
        compiled: the contestants beside the eager one.
    """

    def __init__(self, given: dict[str, Any], exported: Path, compiled: Sequence[str]) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch
        from safetensors.torch import load_file
        from torch_model import Decoder, adamw, document_blocks, document_mask

        self.torch, self.given, self.adamw = torch, given, adamw
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(THREADS)
        torch.set_float32_matmul_precision("highest" if given["precision"] == "no" else "high")
        weights: dict[str, Any] = {}
        for file in sorted(exported.glob("*.safetensors")):
            weights |= load_file(file)
        self.model = Decoder(given["config"], self.device)
        self.weights, self.options = weights, given["optimizer"]
        self.models = {EAGER: self.model}
        modes = {COMPILED: "default", AUTOTUNED: "max-autotune"}
        for name in compiled:
            self.models[name] = torch.compile(self.model, mode=modes[name])
        self.masks = {name: torch.compile(document_blocks) for name in compiled}
        self.masks[EAGER] = document_mask
        names = ("input_ids", "labels", "segment_ids")
        self.batches = [
            tuple(torch.from_numpy(batch[name][0]).long().to(self.device) for name in names)
            for batch in given["batches"]
        ]
        self.facts: dict[str, Any] = {}

    def reset(self) -> None:
        """Return to the initial weights, without moments."""
        self.model.load(self.weights)
        names = ("beta1", "beta2", "eps", "weight_decay")
        self.optimizer = self.adamw(self.model, *(self.options[name] for name in names))
        self.step_number = 0

    def step(self, name: str) -> Any:
        """Take a step and return its loss without waiting for it."""
        torch, number = self.torch, self.step_number
        for group in self.optimizer.param_groups:
            group["lr"] = self.given["rates"][min(number, len(self.given["rates"]) - 1)]
        ids, labels, documents = self.batches[number % BATCHES]
        mask = self.masks[name](documents) if self.given["documents"] > 1 else None
        with torch.autocast(self.device, torch.bfloat16, enabled=self.given["precision"] == "bf16"):
            loss = self.models[name](ids, labels, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options["max_grad_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        return loss.detach()

    def losses(self, name: str, steps: int) -> list[float]:
        """The losses of the first steps from the initial weights."""
        self.reset()
        return [self.step(name).item() for _ in range(steps)]

    def turn(self, name: str, steps: int) -> None:
        """Steps, to the end of the last."""
        for _ in range(steps - 1):
            self.step(name)
        self.step(name).item()


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
        """Call a method of the contestant."""
        self.pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
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
    try:
        contestant = make(*arguments)
        pipe.send({"found": (contestant.facts, facts())})
        while True:
            try:
                method, given = pipe.recv()
            except EOFError:
                return
            before = _cpu_seconds()
            found = getattr(contestant, method)(*given)
            pipe.send({"found": found if found is not None else _cpu_seconds() - before})
    except Exception:  # noqa: BLE001 -- any error is reported to the other process
        pipe.send({"failed": traceback.format_exc()})


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --------------------------------------------------------------------------------------------- race


def race(
    name: str,
    rounds: int,
    compiled: Sequence[str] = (COMPILED,),
    batch_size: int | None = None,
    documents: int = 1,
) -> dict[str, Any]:
    """Compare the losses of one model, then time blocks of steps in turn."""
    from programs import CASES

    case, given = CASES[name], {} if batch_size is None else {"batch_size": batch_size}
    with tempfile.TemporaryDirectory() as directory:
        flags = case.flags | given
        ours = Worker(Ours, flags, case.vocab_size, Path(directory), documents)
        torch = Worker(Torch, ours.facts, Path(directory), compiled)
    workers = {OURS: ours} | dict.fromkeys((EAGER, *compiled), torch)
    precision, shape = ours.facts["precision"], ours.facts["batches"][0]["labels"].shape
    try:
        losses, apart = compare_losses(workers, LOSS_TOLERANCE[precision])
        steps, seconds, cpu = timed(workers, rounds)
    finally:
        ours.close()
        torch.close()
    step_ms = {who: [1e3 * s / steps for s in seconds[who]] for who in workers}
    cpu_ms = {who: [1e3 * s / steps for s in cpu[who][-rounds:]] for who in workers}
    print(f"{name}: losses differ by {max(apart.values()):.1e} over {LOSS_STEPS} steps", flush=True)
    rows = [_row(name, who, step_ms, cpu_ms[who], math.prod(shape)) for who in workers]
    print(table(rows), flush=True)
    return {
        "parameters": ours.facts["parameters"],
        "batch": shape,
        "documents": documents,
        "precision": precision,
        "steps_a_block": steps,
        "note": case.note,
        "losses": losses,
        "losses_apart": apart,
        "step_ms": step_ms,
        "processes": {"consyn_jax": ours.record, "torch": torch.record},
        "rows": rows,
    }


def compare_losses(
    workers: dict[str, Worker], tolerance: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The losses of the first steps, and their largest relative distance to ours."""
    losses = {who: worker.ask("losses", who, LOSS_STEPS) for who, worker in workers.items()}
    apart = {
        who: max(abs(a / b - 1) for a, b in zip(losses[OURS], theirs, strict=True))
        for who, theirs in losses.items()
        if who != OURS
    }
    assert max(apart.values()) < tolerance, f"losses differ: {losses}"
    assert all(math.isfinite(loss) for loss in losses[OURS])
    return losses, apart


def timed(
    workers: dict[str, Worker], rounds: int
) -> tuple[int, dict[str, list[float]], dict[str, list[float]]]:
    """Steps of a block, and seconds of each block on the wall and of the processor."""
    cpu: dict[str, list[float]] = {who: [] for who in workers}

    def turns(steps: int) -> dict[str, Callable[[], None]]:
        return {
            who: lambda who=who: cpu[who].append(workers[who].ask("turn", who, steps))
            for who in workers
        }

    first = alternate(turns(2), rounds=1, warm_up=0)
    steps = max(1, min(200, round(BLOCK_S / (max(first.values())[0] / 2))))
    return steps, alternate(turns(steps), rounds), cpu


def _row(
    model: str, who: str, step_ms: dict[str, list[float]], cpu_ms: list[float], tokens: int
) -> dict[str, Any]:
    """A row of the table; its ratio is the median over the rounds, and above 1 ours is faster."""
    time_ms = spread(step_ms[who])
    ratios = [theirs / ours for theirs, ours in zip(step_ms[who], step_ms[OURS], strict=True)]
    return {
        "model": model,
        "who": who,
        "step ms": time_ms["median"],
        "least": time_ms["min"],
        "most": time_ms["max"],
        "processor ms": statistics.median(cpu_ms),
        "tokens/s": 1e3 * tokens / time_ms["median"],
        "ours is faster by": statistics.median(ratios),
    }


def measure(
    models: Iterable[str] = ("haiku", "27m"),
    rounds: int = 7,
    compiled: Sequence[str] = (COMPILED,),
    batch_size: int | None = None,
    documents: int = 1,
    tiny: bool = False,
) -> dict[str, Any]:
    """Race each model."""
    if tiny:
        models, rounds = ("tiny",), 2
    found = {name: race(name, rounds, compiled, batch_size, documents) for name in models}
    return {"rows": [row for one in found.values() for row in one.pop("rows")], "models": found}


def main() -> None:
    """Run, print a table per model, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--models", nargs="+", default=["haiku", "27m"], help="haiku, 27m; on a GPU verse, stanza"
    )
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--batch_size", type=int, help="in place of the model's own")
    arguments.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    arguments.add_argument(
        "--max_autotune", action="store_true", help="also torch.compile(mode='max-autotune')"
    )
    arguments.add_argument("--documents", type=int, default=1, help="documents in each row")
    given = arguments.parse_args()
    compiled = () if given.no_compile else (COMPILED, AUTOTUNED)[: 1 + given.max_autotune]
    result = measure(
        given.models, given.rounds, compiled, given.batch_size, given.documents, given.tiny
    )
    if given.out is not None:
        write(given.out, {**facts(), **result})


if __name__ == "__main__":
    if len(os.sched_getaffinity(0)) > THREADS and not Path("/proc/driver/nvidia").exists():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    sys.exit(main())
