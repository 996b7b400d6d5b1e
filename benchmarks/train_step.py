"""How fast is the train step, how near to what the device can do, and where does its time go?

The step is the one that `consyn-train` runs. In the same run, in turn with it, a large square matrix product tells what the device really
does. FLOPs are counted twice over: causal, with half of attention's square, as kernels compute it, and full, as many papers count. The
parts are timed alone, as programs of one block's attention (kernel, forward and backward), its projections, its MLP, the head with the
loss, and the update of the optimizer with clipping; "rest" is what the step takes beyond their sum: norms, rotations, residual sums,
embedding, and what overlaps is taken off. Idle time is read from a trace of the GPU: of the time from the first kernel of some steps to
the end of the last, the share in which no kernel ran.

    python benchmarks/train_step.py --models verse stanza epic --out benchmarks/results/NAME.json     # one GPU, bfloat16
    python benchmarks/train_step.py --models haiku 27m                                                # CPU, float32
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

import jax
import jax.numpy as jnp
import optax
from harness import alternate, parser, repeated, report, spread
from programs import CASES, TrainStep

from consyn_jax.distributed.hardware import bf16_peak
from consyn_jax.model.arithmetic import train_flops_per_token
from consyn_jax.model.attention import causal_attention, documents
from consyn_jax.model.linear import linear
from consyn_jax.model.transformer import swiglu
from consyn_jax.planning.compiled import instructions, kernels
from consyn_jax.training.loss import Extras, LossSums, head_objective
from consyn_jax.training.step import TrainState, make_train_step

STEP, MASKED, MATMUL = "step", "step, documents", "matmul"
DOCUMENTS = 8  # in a row of the batches that have masks
TRACED_STEPS = 5


def matmul(size: int, dtype: Any) -> Callable[[], jax.Array]:
    """A square product of random numbers."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b)


def parts(step: TrainStep) -> dict[str, Callable[[], Any]]:
    """The parts of a step as programs of their own, forward and backward, each once: of the block's parts, those of one block."""
    c, compute, program = step.config, step.program.compute, step.program
    B, T, D, F, dtype = step.run.budget.batch_size, step.length, c.hidden_dim, c.mlp_dim, step.program.compute.dtype
    keys = iter(jax.random.split(jax.random.key(0), 64))
    segments = step.batch(0, DOCUMENTS)["segment_ids"][0]

    def drawn(*shape: int, dtype: Any = dtype) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype) * 0.02

    def both_ways(function: Callable[..., Any], *inputs: jax.Array) -> Callable[[], Any]:
        """Forward and backward; all is given back, or the compiler would leave out what nobody looks at."""

        def run(outs: Any, *inputs: jax.Array) -> Any:
            found, pull = jax.vjp(function, *inputs)
            return found, pull(outs)

        outs = jax.tree.map(lambda out: drawn(*out.shape), jax.eval_shape(function, *inputs))
        compiled = jax.jit(run)
        return lambda: compiled(outs, *inputs)

    def attention(segments_BT: jax.Array | None) -> Callable[[], Any]:
        q, k, v = drawn(B, T, c.num_heads, c.head_dim), drawn(B, T, c.num_kv_heads, c.head_dim), drawn(B, T, c.num_kv_heads, c.head_dim)
        inside = None if segments_BT is None else documents(segments_BT)
        attend = partial(causal_attention, inside=inside, backend=compute.attention, sliding_window=c.sliding_window)
        return both_ways(attend, q, k, v)

    x, weight = drawn(B, T, D), partial(drawn, dtype=jnp.float32)
    product = partial(linear, recast=compute.remat == "none")

    def mlp(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return product(swiglu(product(x, gate), product(x, up)), down)

    def projections(x: jax.Array, heads: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array) -> tuple[jax.Array, ...]:
        return product(x, q), product(x, k), product(x, v), product(heads, o)

    N, K = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    batch = step.batch(0)
    head = jax.jit(jax.value_and_grad(lambda x, w, labels, mask: head_objective(x, w, labels, mask, c.vocab_size, Extras(), program.chunks)[0], (0, 1)))
    weights = weight(c.padded_vocab_size, D)
    return {
        "attention": attention(None),
        "attention, documents": attention(segments),
        "projections": both_ways(projections, x, drawn(B, T, N), weight(D, N), weight(D, K), weight(D, K), weight(N, D)),
        "MLP": both_ways(mlp, x, weight(D, F), weight(D, F), weight(F, D)),
        "head": lambda: head(x, weights, batch["labels"][0], batch["loss_mask"][0]),
        "optimizer": Update(program.rule, step.state, program.max_grad_norm),
    }


class Update:
    """The optimizer's update of a state like that of a step, norm and clipping included: a train step whose gradients are given."""

    def __init__(self, rule: optax.GradientTransformation, state: TrainState, max_grad_norm: float) -> None:
        def objective(params: Any, batch: Any) -> tuple[jax.Array, LossSums]:
            products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, batch["gradients"])
            return jax.tree.reduce(jnp.add, products), LossSums(jnp.float32(0), jnp.float32(1), jnp.float32(0))

        gradients = jax.tree.map(lambda p: jnp.full((1, *p.shape), 1e-3), state.params)
        self.state, self.batch = jax.tree.map(jnp.copy, state), {"labels": jnp.zeros((1, 1, 1), jnp.int32), "gradients": gradients}
        self.update = jax.jit(make_train_step(objective, rule, max_grad_norm), donate_argnums=0)

    def __call__(self) -> Any:
        """Start one."""
        self.state, metrics = self.update(self.state, self.batch)
        return metrics


def seconds_of(contestants: dict[str, Callable[[], Any]], rounds: int, turn_s: float) -> dict[str, list[float]]:
    """Seconds of one call of each, round by round, where a turn is as many calls as `turn_s` has room for."""
    first = alternate({name: repeated(call, 1) for name, call in contestants.items()}, 1)
    calls = {name: max(1, min(200, round(turn_s / took[0]))) for name, took in first.items()}
    turns = alternate({name: repeated(call, calls[name]) for name, call in contestants.items()}, rounds, warm_up=0)
    return {name: [s / calls[name] for s in seconds] for name, seconds in turns.items()}


def one(name: str, rounds: int, turn_s: float, size: int, batch_size: int | None = None) -> dict[str, Any]:
    """Everything about one model.

    Args:
        size: of the square product.
    """
    case = CASES[name]
    step = TrainStep(case.flags | ({} if batch_size is None else {"batch_size": batch_size}), case.vocab_size)
    plain, masked = step.batch(0), step.batch(1, DOCUMENTS)
    c, dtype = step.config, step.program.compute.dtype
    contestants = {STEP: partial(step, plain), MASKED: partial(step, masked), MATMUL: matmul(size, dtype)}
    whole = seconds_of(contestants, rounds, turn_s)
    alone = seconds_of(parts(step), rounds, turn_s)
    trace = traced(partial(step, masked)) if jax.default_backend() != "cpu" else {}
    step_s, rate = statistics.median(whole[STEP]), 2 * size**3 / statistics.median(whole[MATMUL])
    causal = train_flops_per_token(c, step.length)
    full = causal + 6.0 * c.num_layers * step.length * c.num_heads * c.head_dim
    flops_per_s, peak = causal * step.tokens / step_s, bf16_peak(jax.devices()[0].device_kind)
    times = {part: (1 if part in ("head", "optimizer") else c.num_layers) * statistics.median(s) for part, s in alone.items()}
    of_step = {part: s for part, s in times.items() if part != "attention"}  # the step has the documents' mask
    masked_s = statistics.median(whole[MASKED])
    shares = {part.removesuffix(", documents"): s / masked_s for part, s in of_step.items()}
    row = {
        "model": name,
        "tokens/s": step.tokens / step_s,
        "step ms": 1e3 * step_s,
        "with documents ms": 1e3 * masked_s,
        "of the matmul rate": flops_per_s / rate,
        "matmul TFLOP/s": rate / 1e12,
        "MFU causal": None if peak is None else flops_per_s / peak,
        "MFU full": None if peak is None else flops_per_s / peak * full / causal,
        **shares,
        "rest": 1 - sum(shares.values()),
        "idle": trace.get("idle"),
    }
    flops = {"flops_per_token_causal": causal, "flops_per_token_full": full, "fraction_of_matmul_full": flops_per_s * full / causal / rate}
    mask = {"mask_share_of_step": (times["attention, documents"] - times["attention"]) / masked_s}
    shape = {"layers": c.num_layers, "batch": step.run.budget.batch_size, "length": step.length, "precision": str(jnp.dtype(dtype)), "note": case.note}
    timings = {part: {k: 1e3 * v for k, v in spread(seconds).items()} for part, seconds in {**whole, **alone}.items()}
    memory, text = step.compiled.memory_analysis(), step.compiled.as_text()
    compiled = {"temporary_bytes": memory.temp_size_in_bytes, "kernels": kernels(instructions(text))}
    attention = f"{step.built.attention.backend}: {step.built.attention.reason}"
    model = {"row": row, "parameters": step.program.layout.num_parameters, **shape}
    return {**model, "attention": attention, **flops, **mask, **compiled, "ms": timings, "trace": trace}


# ------------------------------------------------------------------------------------------------------------------------- trace


def traced(step: Callable[[], Any], steps: int = TRACED_STEPS) -> dict[str, Any]:
    """Idle share of the device over some steps, and the kernels that took most of it, in ms a step."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            with jax.profiler.trace(directory):
                for _ in range(steps):
                    found = step()
                jax.block_until_ready(found)
        except RuntimeError as error:  # a machine that lets nobody look at its GPU
            return {"failed": str(error)[:500]}
        files = list(Path(directory).rglob("*.trace.json.gz"))
        events = [event for file in files for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    return kernel_times(events, steps)


def kernel_times(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Of a Chrome trace: the share of time without a kernel, and the ten kernels that took most, in ms a step. Empty without a GPU's lines."""
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("ph") == "M" and e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("ph") == "M" and e.get("name") == "thread_name"}
    kernels = [
        e
        for e in events
        if e.get("ph") == "X" and "GPU" in names.get(e["pid"], "") and threads.get((e["pid"], e["tid"]), "").startswith("Stream")
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


def measure(models: Iterable[str] | None = None, rounds: int = 5, batch_size: int | None = None, tiny: bool = False) -> dict[str, Any]:
    """All of `models`: on a GPU verse, stanza and epic, on a CPU haiku and one of 27 M parameters."""
    on_cpu = jax.default_backend() == "cpu"
    if models is None:
        models = ("tiny",) if tiny else ("haiku", "27m") if on_cpu else ("verse", "stanza", "epic")
    rounds, turn_s, size = (2, 0.01, 256) if tiny else (rounds, 1.0, 2048) if on_cpu else (rounds, 0.3, 8192)
    found = {name: one(name, rounds, turn_s, size, batch_size) for name in models}
    assert all(math.isfinite(result["row"]["tokens/s"]) for result in found.values())
    return {"rows": [result.pop("row") for result in found.values()], "models": found}


def fp8(rounds: int = 5, tiny: bool = False) -> dict[str, Any]:
    """Stanza's step with products of 8-bit numbers beside that in bfloat16, in turn."""
    names = ("tiny", "tiny") if tiny else ("stanza", "stanza, fp8")
    steps = [TrainStep(CASES[name].flags, CASES[name].vocab_size) for name in names]
    seconds = seconds_of({kind: partial(step, step.batch(0)) for kind, step in zip(("bf16", "fp8"), steps, strict=True)}, rounds, 0.01 if tiny else 1.0)
    ms = {f"{kind} ms": 1e3 * statistics.median(turns) for kind, turns in seconds.items()}
    ratio = statistics.median(wide / narrow for wide, narrow in zip(seconds["bf16"], seconds["fp8"], strict=True))
    return {"rows": [{"model": names[0], **ms, "fp8 is faster by": ratio}], "ms": {kind: spread(1e3 * s for s in turns) for kind, turns in seconds.items()}}


def main() -> None:
    """Run, print the table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=CASES, help="verse, stanza, epic; on a CPU haiku, 27m")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batch_size", type=int, help="another than the model's")
    given = arguments.parse_args()
    report(measure(given.models, given.rounds, given.batch_size, given.tiny), given.out)


if __name__ == "__main__":
    main()
