"""How fast is the train step, how close to the device's matmul rate, and where does its time go?

The step is the one of `consyn-train`. A large square matmul takes turns with it, to measure the
rate that the device really reaches. FLOPs are counted in two ways: causal, with half of attention's
square, as kernels compute it; and full, as many papers count. The parts are timed alone, as
programs of one block's attention (kernel, forward and backward), its projections, its MLP, the head
with the loss, and the optimizer's update with clipping. "rest" is the step's time beyond their sum:
norms, rotations, residual sums and the embedding, less what overlaps. Idle time is read from a
trace of the GPU: the share of the time, from the first kernel of some steps to the end of the last,
in which no kernel ran.

    # one GPU, bfloat16
    python benchmarks/train_step.py --models verse stanza epic --out benchmarks/results/NAME.json
    # CPU, float32
    python benchmarks/train_step.py --models haiku 27m
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from harness import alternate, parser, repeated, report, spread
from programs import CASES, TrainStep

from consyn_jax.distributed.compiled import instructions, kernels
from consyn_jax.distributed.hardware import bf16_peak
from consyn_jax.model import embedding
from consyn_jax.model.arithmetic import train_flops_per_token
from consyn_jax.model.attention import causal_attention
from consyn_jax.model.block_matmuls import swiglu
from consyn_jax.model.kernels.reference_attention import documents
from consyn_jax.model.linear import linear
from consyn_jax.training.loss import LossSums, head_objective
from consyn_jax.training.program_arguments import Extras
from consyn_jax.training.step import TrainState, make_train_step

STEP, MASKED, MATMUL = "step", "step, documents", "matmul"
DOCUMENTS = 8  # per row of the batches with documents
TRACED_STEPS = 5


def matmul(size: int, dtype: Any) -> Callable[[], jax.Array]:
    """A square matmul of random numbers."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b)


class Parts:
    """Calls of a step's parts as programs of their own, forward and backward.

    Those of a block are of one block.
    """

    def __init__(self, step: TrainStep) -> None:
        self.step, self.program, self.config = step, step.program, step.config
        self.dtype, self.rows = step.program.compute.dtype, step.run.budget.batch_size
        self._keys = iter(jax.random.split(jax.random.key(0), 64))

    def drawn(self, *shape: int, dtype: Any = None) -> jax.Array:
        return jax.random.normal(next(self._keys), shape, dtype or self.dtype) * 0.02

    def weight(self, *shape: int) -> jax.Array:
        return self.drawn(*shape, dtype=jnp.float32)

    def both_ways(self, function: Callable[..., Any], *inputs: jax.Array) -> Callable[[], Any]:
        """Forward and backward pass; returns all results, or the compiler would drop them."""

        def run(outs: Any, *inputs: jax.Array) -> Any:
            found, pull = jax.vjp(function, *inputs)
            return found, pull(outs)

        outs = jax.tree.map(lambda out: self.drawn(*out.shape), jax.eval_shape(function, *inputs))
        compiled = jax.jit(run)
        return lambda: compiled(outs, *inputs)

    def attention(self, segments_BT: jax.Array | None) -> Callable[[], Any]:
        c = self.config
        q, k, v = (
            self.drawn(self.rows, self.step.length, heads, c.head_dim)
            for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        )
        attend = partial(
            causal_attention,
            inside=None if segments_BT is None else documents(segments_BT),
            backend=self.program.compute.attention,
            sliding_window=c.sliding_window,
        )
        return self.both_ways(attend, q, k, v)

    def all(self) -> dict[str, Callable[[], Any]]:
        c, B, T, D, F = (
            self.config,
            self.rows,
            self.step.length,
            self.config.hidden_dim,
            self.config.mlp_dim,
        )
        N, K = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        matmul = partial(linear, recast=self.program.compute.remat == "none")
        segments = self.step.batch(0, DOCUMENTS)["segment_ids"][0]
        x, weight = self.drawn(B, T, D), self.weight

        def mlp(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
            return matmul(swiglu(matmul(x, gate), matmul(x, up)), down)

        def projections(
            x: jax.Array, heads: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array
        ) -> tuple[jax.Array, ...]:
            return matmul(x, q), matmul(x, k), matmul(x, v), matmul(heads, o)

        projected = weight(D, N), weight(D, K), weight(D, K), weight(N, D)
        return {
            "attention": self.attention(None),
            "attention, documents": self.attention(segments),
            "projections": self.both_ways(projections, x, self.drawn(B, T, N), *projected),
            "MLP": self.both_ways(mlp, x, weight(D, F), weight(D, F), weight(F, D)),
            "head": self.head(x),
            "optimizer": Update(self.program.rule, self.step.state, self.program.max_grad_norm),
        }

    def head(self, x: jax.Array) -> Callable[[], Any]:
        c, batch = self.config, self.step.batch(0)
        weights = self.weight(c.padded_vocab_size, c.hidden_dim)

        def loss(x: jax.Array, w: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
            chunks = self.program.chunks
            return head_objective(x, w, labels, mask, c.vocab_size, Extras(), chunks)[0]

        head = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return lambda: head(x, weights, batch["labels"][0], batch["loss_mask"][0])


class Update:
    """The optimizer's update with norm and clipping: a train step whose gradients are given."""

    def __init__(
        self, rule: optax.GradientTransformation, state: TrainState, max_grad_norm: float
    ) -> None:
        def objective(params: Any, batch: Any) -> tuple[jax.Array, LossSums]:
            products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, batch["gradients"])
            sums = LossSums(jnp.float32(0), jnp.float32(1), jnp.float32(0))
            return jax.tree.reduce(jnp.add, products), sums

        gradients = jax.tree.map(lambda p: jnp.full((1, *p.shape), 1e-3), state.params)
        self.state = jax.tree.map(jnp.copy, state)
        self.batch = {"labels": jnp.zeros((1, 1, 1), jnp.int32), "gradients": gradients}
        self.update = jax.jit(make_train_step(objective, rule, max_grad_norm), donate_argnums=0)

    def __call__(self) -> Any:
        """Start an update."""
        self.state, metrics = self.update(self.state, self.batch)
        return metrics


def seconds_of(
    contestants: dict[str, Callable[[], Any]], rounds: int, turn_s: float
) -> dict[str, list[float]]:
    """Seconds of one call of each, round by round; a turn is as many calls as fit in `turn_s`."""
    first = alternate({name: repeated(call, 1) for name, call in contestants.items()}, 1)
    calls = {name: max(1, min(200, round(turn_s / took[0]))) for name, took in first.items()}
    turns = alternate(
        {name: repeated(call, calls[name]) for name, call in contestants.items()}, rounds, warm_up=0
    )
    return {name: [s / calls[name] for s in seconds] for name, seconds in turns.items()}


def one(
    name: str, rounds: int, turn_s: float, size: int, batch_size: int | None = None
) -> dict[str, Any]:
    """Everything about one model; "row" is its row of the table.

    Args:
        size: of the square matmul.
    """
    case = CASES[name]
    other = {} if batch_size is None else {"batch_size": batch_size}
    step = TrainStep(case.flags | other, case.vocab_size)
    c, dtype = step.config, step.program.compute.dtype
    plain, masked = partial(step, step.batch(0)), partial(step, step.batch(1, DOCUMENTS))
    contestants = {STEP: plain, MASKED: masked, MATMUL: matmul(size, dtype)}
    whole = seconds_of(contestants, rounds, turn_s)
    alone = seconds_of(Parts(step).all(), rounds, turn_s)
    trace = traced(masked) if jax.default_backend() != "cpu" else {}
    medians = {part: statistics.median(seconds) for part, seconds in (whole | alone).items()}
    rate = 2 * size**3 / medians[MATMUL]
    memory, text = step.compiled.memory_analysis(), step.compiled.as_text()
    row, flops = _row(step, medians, rate)
    timings = {
        part: {k: 1e3 * v for k, v in spread(seconds).items()}
        for part, seconds in (whole | alone).items()
    }
    mask_s = c.num_layers * (medians["attention, documents"] - medians["attention"])
    return {
        "row": {"model": name, **row, "idle": trace.get("idle")},
        "parameters": step.program.layout.num_parameters,
        "layers": c.num_layers,
        "batch": step.run.budget.batch_size,
        "length": step.length,
        "precision": str(jnp.dtype(dtype)),
        "note": case.note,
        "attention": f"{step.built.attention.backend}: {step.built.attention.reason}",
        **flops,
        "mask_share_of_step": mask_s / medians[MASKED],
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": kernels(instructions(text)),
        "ms": timings,
        "trace": trace,
    }


def _row(
    step: TrainStep, medians: dict[str, float], rate: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """The row of a model, and its FLOPs.

    Args:
        medians: seconds by part.
        rate: of the matmul, in FLOP/s.
    """
    c = step.config
    causal = train_flops_per_token(c, step.length)
    full = causal + 6.0 * c.num_layers * step.length * c.num_heads * c.head_dim
    step_s, masked_s = medians[STEP], medians[MASKED]
    flops_per_s, peak = causal * step.tokens / step_s, bf16_peak(jax.devices()[0].device_kind)
    shares = {  # the step with documents has that attention
        part.removesuffix(", documents"): times * medians[part] / masked_s
        for part, times in (
            ("attention, documents", c.num_layers),
            ("projections", c.num_layers),
            ("MLP", c.num_layers),
            ("head", 1),
            ("optimizer", 1),
        )
    }
    return {
        "tokens/s": step.tokens / step_s,
        "step ms": 1e3 * step_s,
        "with documents ms": 1e3 * masked_s,
        "of the matmul rate": flops_per_s / rate,
        "matmul TFLOP/s": rate / 1e12,
        "planned ms": None if step.planned_s is None else 1e3 * step.planned_s,
        "plan is off by": None if step.planned_s is None else step.planned_s / step_s - 1,
        "MFU causal": None if peak is None else flops_per_s / peak,
        "MFU full": None if peak is None else flops_per_s / peak * full / causal,
        **shares,
        "rest": 1 - sum(shares.values()),
    }, {
        "flops_per_token_causal": causal,
        "flops_per_token_full": full,
        "fraction_of_matmul_full": flops_per_s * full / causal / rate,
    }


# -------------------------------------------------------------------------------------------- trace


def traced(step: Callable[[], Any], steps: int = TRACED_STEPS) -> dict[str, Any]:
    """Idle share of the device over some steps, and the longest kernels, in ms per step."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            with jax.profiler.trace(directory):
                for _ in range(steps):
                    found = step()
                jax.block_until_ready(found)
        except RuntimeError as error:  # a machine that does not allow tracing its GPU
            return {"failed": str(error)[:500]}
        files = list(Path(directory).rglob("*.trace.json.gz"))
        events = [
            event
            for file in files
            for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        ]
    return kernel_times(events, steps)


def kernel_times(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The idle share of a Chrome trace, and its ten longest kernels in ms per step.

    Empty without events of a GPU.
    """
    meta = [e for e in events if e.get("ph") == "M"]
    names = {e["pid"]: e["args"]["name"] for e in meta if e.get("name") == "process_name"}
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in meta if e.get("name") == "thread_name"
    }
    kernels = [
        e
        for e in events
        if e.get("ph") == "X"
        and "GPU" in names.get(e["pid"], "")
        and threads.get((e["pid"], e["tid"]), "").startswith("Stream")
    ]
    if not kernels:
        return {}
    busy = end = 0.0
    by_kernel: Counter[str] = Counter()
    for event in sorted(kernels, key=lambda e: e["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        by_kernel[event["name"]] += event["dur"]
    span = end - min(event["ts"] for event in kernels)
    most = {kernel[:80]: us / 1e3 / steps for kernel, us in by_kernel.most_common(10)}
    return {"idle": 1 - busy / span, "kernels_ms": most}


def measure(
    models: Iterable[str] | None = None,
    rounds: int = 5,
    batch_size: int | None = None,
    tiny: bool = False,
) -> dict[str, Any]:
    """Measure `models`: by default verse, stanza and epic on a GPU, haiku and 27m on a CPU."""
    on_cpu = jax.default_backend() == "cpu"
    if models is None:
        models = ("tiny",) if tiny else ("haiku", "27m") if on_cpu else ("verse", "stanza", "epic")
    turn_s, size = (0.01, 256) if tiny else (1.0, 2048) if on_cpu else (0.3, 8192)
    rounds = 2 if tiny else rounds
    found = {name: one(name, rounds, turn_s, size, batch_size) for name in models}
    assert all(math.isfinite(result["row"]["tokens/s"]) for result in found.values())
    return {"rows": [result.pop("row") for result in found.values()], "models": found}


def fp8(rounds: int = 5, tiny: bool = False) -> dict[str, Any]:
    """Stanza's step in fp8 and in bfloat16, taking turns."""
    return _in_turns(_steps({"bf16": "stanza", "fp8": "stanza, fp8"}, tiny), rounds, tiny)


def logits(rounds: int = 5, tiny: bool = False) -> dict[str, Any]:
    """Verse's step with logits in bfloat16 and in float32, taking turns."""
    names = {"float32 logits": "verse", "bf16 logits": "verse, bf16 logits"}
    return _in_turns(_steps(names, tiny), rounds, tiny)


def exact_sums(rounds: int = 5, tiny: bool = False) -> dict[str, Any]:
    """Verse's step with the embedding's gradient summed in a fixed order, and by atomics."""
    steps = _steps({"exact": "verse"}, tiny)
    with mock.patch.object(embedding, "sum_rows_in_order", wraps=embedding.scatter_rows) as summed:
        steps |= _steps({"by atomics": "verse"}, tiny)
    assert summed.called
    found = _in_turns(steps, rounds, tiny)
    return {
        "rows": [
            row | {"exactness costs": row["by atomics is faster by"] - 1}
            for row in found.pop("rows")
        ],
        **found,
    }


def _steps(names: dict[str, str], tiny: bool) -> dict[str, TrainStep]:
    """The train steps of some cases, by a label of each."""
    cases = {label: CASES["tiny" if tiny else name] for label, name in names.items()}
    return {label: TrainStep(case.flags, case.vocab_size) for label, case in cases.items()}


def _in_turns(steps: dict[str, TrainStep], rounds: int, tiny: bool) -> dict[str, Any]:
    """Two steps by their labels, of which the second should be the faster one."""
    calls = {label: partial(step, step.batch(0)) for label, step in steps.items()}
    seconds = seconds_of(calls, rounds, 0.01 if tiny else 1.0)
    ms = {f"{label} ms": 1e3 * statistics.median(turns) for label, turns in seconds.items()}
    slower, faster = steps
    turns = zip(seconds[slower], seconds[faster], strict=True)
    ratio = statistics.median(slow / fast for slow, fast in turns)
    return {
        "rows": [{"model": steps[slower].run.model.model, **ms, f"{faster} is faster by": ratio}],
        "ms": {label: spread(1e3 * s for s in turns) for label, turns in seconds.items()},
    }


def main() -> None:
    """Run, print the table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--models", nargs="+", choices=CASES, help="verse, stanza, epic; on a CPU haiku, 27m"
    )
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batch_size", type=int, help="in place of the model's own")
    given = arguments.parse_args()
    report(measure(given.models, given.rounds, given.batch_size, given.tiny), given.out)


if __name__ == "__main__":
    main()
