"""Format a plan as the text that `--dry_run --topology` prints."""

from __future__ import annotations

from collections.abc import Iterator

from consyn_jax.distributed.auto_mesh import FITS
from consyn_jax.distributed.hardware import DescribedGpu
from consyn_jax.model.arithmetic import (
    counted_parameters,
    num_adapter_parameters,
    num_parameters,
    train_flops_per_token,
)
from consyn_jax.planning import network, roofline
from consyn_jax.planning.aot import COMPILERS
from consyn_jax.planning.plan import Alternative, Plan, adapter_that_fits, alternatives, in_memory
from consyn_jax.planning.plan_recipe import in_flags, in_seconds
from consyn_jax.planning.roofline import Rates, StepTime
from consyn_jax.planning.topology import GpuTopology
from consyn_jax.training.runtime.memory import device_bytes, step_memory
from consyn_jax.training.trainer import ConsynTrainer

GIB, GB, DAY_S = 2**30, 1e9, 86_400
SMALL_BYTES = 1e6  # smaller collectives share one line
ALTERNATIVES = 4  # variants to show if a run does not fit
NO_TIME = "no time is given, because this program has never run on a TPU"
NO_COLLECTIVES = "collectives  n/a: the text of a TPU program does not say how often its loops run"


def page(plan: Plan, *, assumptions: bool = False) -> str:
    """Format a plan: a one-line verdict, then the figures.

    Args:
        assumptions: whether to list the rates that the estimated step time assumes.
    """
    sections = [iter([verdict(plan)])]
    if not plan.fits:
        sections.append(_ways_out(plan))
    if plan.compiled is None:
        sections.append(_not_compiled(plan))
    sections += [_what(plan), _memory(plan), _collectives(plan)]
    time = plan.time
    sections.append(_work(plan) if time is None else _time(plan, time, assumptions))
    sections.append(_budget(plan))
    return "\n\n".join("\n".join(section) for section in sections)


def verdict(plan: Plan) -> str:
    """Say in one line whether the run fits, how fast it is, and how long it takes."""
    share = plan.total_bytes / plan.topology.device.memory_bytes
    fits = f"{'Fits' if plan.fits else 'DOES NOT FIT'} ({share:.0%} of the memory)"
    if plan.time is None:
        return fits
    rate = plan.work.tokens / plan.time.total
    if plan.steps is None:
        long = f"{rate * DAY_S / GB:,.3g} billion tokens a day"
    else:
        tokens = plan.steps * plan.work.tokens
        long = f"{_duration(tokens / rate)} for {_tokens(tokens)}"
    return f"{fits}; {rate:,.0f} tokens/s; {long}"


def _not_compiled(plan: Plan) -> Iterator[str]:
    """Explain why the figures are estimates, and not figures from the compiler."""
    if plan.refused_bytes is not None:
        yield (
            f"The compiler refused the program: it needs {plan.refused_bytes / GIB:.2f} GiB of "
            f"{plan.topology.device.memory_bytes / GIB:.2f} on each device. The figures below are "
            "estimated by arithmetic."
        )
        return
    devices, extra, _ = COMPILERS[plan.topology.compiler]
    yield (
        f"Not compiled, because XLA's compiler for {devices} is not installed: memory and "
        "collectives below are estimated by arithmetic."
    )
    yield (
        f"Run pip install 'consyn_jax[{extra}]', which works on any machine, to get these figures "
        "and the kernels from the compiler."
    )


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.1f} hours"


def _tokens(count: float) -> str:
    size, name = (GB, "billion") if count >= GB else (1e6, "million")
    return f"{count / size:,.4g} {name} tokens"


def memory_here(trainer: ConsynTrainer) -> str:
    """Format the memory that the compiled train step needs on one device of this machine."""
    needs, limit = step_memory(trainer.compile_train_step(trainer.run)), device_bytes()
    flops = (
        trainer.sequences_per_step
        * trainer.run.row_length
        * train_flops_per_token(trainer.model.config, trainer.run.length, trainer.run.lora)
    )
    fits = (
        "fits"
        if needs.total <= limit
        else "DOES NOT FIT; --topology GPU:HOSTSxGPUS shows what it would need on other GPUs"
    )
    lines = [
        "memory of one device, as compiled",
        _row("state", needs.state),
        _row("temporary", needs.temporary),
        _total(needs.total, limit, fits),
        f"a step takes {flops / 1e12:,.3g} TFLOP over all devices",
    ]
    return "\n".join(lines)


def _what(plan: Plan) -> Iterator[str]:
    model, work, topology, budget = plan.model, plan.work, plan.topology, plan.run.budget
    axes = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.sizes.items() if size > 1)
    accumulation = budget.gradient_accumulation_steps
    accumulated = f", {accumulation} micro-batches" if accumulation > 1 else ""
    rows = "pairs of two sequences" if plan.run.trains_on_pairs else "sequences"
    yield (
        f"model      {plan.run.model.model}: {counted_parameters(model)}, "
        f"{model.num_layers} layers, {model.hidden_dim} wide"
    )
    if work.lora.is_used:
        yield (
            f"adapter    LoRA of rank {work.lora.rank}: "
            f"{num_adapter_parameters(model, work.lora):,} parameters are trained"
        )
    yield f"machine    {topology.description}"
    yield f"mesh       {axes or 'no split'} ({plan.mesh.reason})"
    yield (
        f"step       {work.tokens:,} tokens: {budget.batch_size} {rows} of "
        f"{work.length:,}{accumulated}; recomputed: {work.remat}"
    )
    if plan.compiled is not None:
        counted = plan.topology.compiler == "cuda"
        calls = ", ".join(
            f"{count} {name}" if counted else name
            for name, count in plan.compiled.kernels.items()
            if "attention" in name or "fmha" in name or "splash" in name
        )
        yield f"attention  {plan.compiled.attention}"
        if calls:
            yield f"           kernels{' per step' if counted else ''}: {calls}"


def _memory(plan: Plan) -> Iterator[str]:
    limit, found, memory = plan.topology.device.memory_bytes, plan.compiled, plan.work.memory
    device = "TPU" if plan.topology.compiler == "tpu" else "GPU"
    yield f"memory of one {device}{', by arithmetic' if found is None else ''}"
    if found is None:
        yield _row("parameters", memory.parameters)
        yield _row("optimizer", memory.moments)
        yield _row("gradients", memory.gradients)
        yield _row("activations", memory.activations)
        yield _row("working", memory.working)
    else:
        rest = memory.gradients + memory.working
        yield _row("parameters", found.parameter_bytes)
        yield _row("optimizer", found.optimizer_bytes)
        batch = "batch" if not plan.work.lora.is_used else "frozen, batch"
        yield _row(batch, found.argument_bytes - found.parameter_bytes - found.optimizer_bytes)
        yield (
            _row("temporary", found.temporary_bytes)
            + f"   of which about {memory.activations / GIB:.2f} activations, "
            + f"{rest / GIB:.2f} gradients and working memory"
        )
    fits = "fits" if plan.fits else "DOES NOT FIT"
    if plan.refused_bytes is not None:
        yield _row("by compiler", plan.refused_bytes)
    yield _total(plan.total_bytes, limit, f"{fits} (a plan may use at most {FITS:.0%})")


def _row(name: str, size: int) -> str:
    return f"  {name:<13}{size / GIB:8.2f} GiB"


def _total(size: int, limit: int, verdict: str) -> str:
    return f"{_row('total', size)}   of {limit / GIB:.1f}: {size / limit:.0%}; {verdict}"


def _collectives(plan: Plan) -> Iterator[str]:
    if plan.compiled is None:
        if plan.time is not None:
            yield "collectives  not compiled; their time is estimated below, under network"
        else:
            yield "collectives  n/a, because the program was not compiled"
        return
    if plan.compiled.collectives is None:
        yield NO_COLLECTIVES
        return
    if not plan.compiled.collectives:
        yield "collectives  none"
        return
    yield "collectives per step, in bytes of the whole arrays"
    small = 0
    for found in sorted(plan.compiled.collectives, key=lambda c: -c.payload_bytes):
        if found.payload_bytes < SMALL_BYTES:
            small += found.payload_bytes
            continue
        axes = ", ".join(found.axes) or "unknown axes"
        yield (
            f"  {found.kind:<18} {found.dtype:<5} over {axes:<14} {found.count:7,} calls "
            f"{found.payload_bytes / GB:10.3f} GB"
        )
    if small:
        yield f"  and {small / 1e3:,.0f} kB in smaller collectives"
    if (hidden := plan.compiled.hidden_share) is not None:
        yield f"  at least {hidden:.0%} of their time overlaps with matmuls in the schedule"
    for warning in plan.compiled.warnings:
        yield f"  WARNING {warning}"


def _work(plan: Plan) -> Iterator[str]:
    tflop = plan.work.flops / plan.topology.num_devices / 1e12
    peak = plan.topology.device.bf16_flops / 1e12
    yield f"step       {tflop:,.1f} TFLOP per device, whose peak is {peak:,.0f} TFLOP/s; {NO_TIME}"


def _time(plan: Plan, time: StepTime, assumptions: bool) -> Iterator[str]:
    assert isinstance(plan.topology, GpuTopology)
    tflop = plan.work.flops / plan.topology.num_devices / 1e12
    yield (
        f"step time, estimated: {in_seconds(time.total)} for {tflop:,.1f} TFLOP per GPU, "
        f"{plan.peak_share(time.total):.0%} of its peak"
    )
    for name in ("matmuls", "attention", "memory", "optimizer"):
        yield f"  {name:<12} {in_seconds(getattr(time, name)):>10}"
    collectives = ", ".join(
        f"{' x '.join(axes)} {in_seconds(seconds)}" for axes, seconds in time.network.items()
    )
    if collectives:
        yield f"  {'network':<12} {in_seconds(time.exposed):>10}   exposed part of {collectives}"
    if plan.run.hardware.mixed_precision == "no":
        yield "  THIS RUN is in float32, and several times slower than this estimate for bfloat16"
    if not assumptions:
        yield "  --verbose lists the assumptions"
        return
    rates, stretch = roofline.OWN, roofline.stretch_of(plan.work, plan.topology)
    lines = _assumptions(plan.topology.gpu, plan.run.hardware.mixed_precision, rates, stretch)
    yield "assumed    " + "\n           ".join(lines)


def _assumptions(gpu: DescribedGpu, precision: str, rates: Rates, stretch: float) -> Iterator[str]:
    yield "bfloat16, with attention in a fused kernel"
    if precision == "fp8":
        yield (
            f"matmuls of the blocks in 8 bits, at {roofline.FP8_SPEEDUP} x the rate below (from "
            f"data sheets); activations take as much memory as in bfloat16"
        )
    yield (
        f"matmuls at {gpu.matmul_flops * rates.matmul / 1e12:.0f} TFLOP/s; memory-bound kernels at "
        f"{gpu.memory_bandwidth * rates.memory / 1e12:.2f} TB/s"
    )
    attention = ", ".join(
        f"{share:.0%} of peak for heads of {width}" for width, share in rates.attention.items()
    )
    yield f"attention at {attention}, if documents are as long as a sequence"
    link = gpu.link_bandwidth * network.LINK_EFFICIENCY / 1e9
    ports = gpu.network_bandwidth * network.LINK_EFFICIENCY / 1e9
    yield f"links at {link:.0f} GB/s inside a host, {ports:.3g} GB/s per GPU between hosts"
    yield (
        f"collectives of weights and gradients overlap with at most {roofline.OVERLAP:.0%} of the "
        f"kernels' time; each second of overlap delays the kernels by {roofline.CONTENTION:.1f} s"
    )
    yield (
        f"times of kernels multiplied by {stretch:.2f}, for launches and gaps; "
        f"sources: docs/planning.md"
    )


def _budget(plan: Plan) -> Iterator[str]:
    if plan.time is not None:
        yield from _speed(plan, plan.time.total)
    elif plan.steps is not None:
        yield (
            f"budget     {plan.steps:,} steps, {plan.steps * plan.work.tokens / GB:,.2f} billion "
            "tokens"
        )
    lora = plan.work.lora
    trained = num_adapter_parameters(plan.model, lora) if lora.is_used else None
    state = (
        (trained or num_parameters(plan.model)) * (4 + plan.work.moment_bytes)
        if plan.compiled is None
        else plan.compiled.state_bytes
    )
    kept = plan.run.saving.keep_last
    yield (
        f"checkpoint {state / GB:,.2f} GB on disk, "
        f"{state * kept / GB:,.1f} GB for the {kept} that are kept"
    )


def _speed(plan: Plan, seconds: float) -> Iterator[str]:
    """Format the tokens per second and the length of the run, if a step takes `seconds`."""
    devices, rate = plan.topology.num_devices, plan.work.tokens / seconds
    yield (
        f"speed      {rate:,.0f} tokens/s, {rate / devices:,.0f} per GPU; "
        f"{rate * DAY_S / GB:,.2f} billion per day"
    )
    if plan.steps is None:
        yield (
            "budget     unknown, because epochs need the data; "
            "give --total_tokens or --max_steps to see days and GPU-hours"
        )
        return
    whole, tokens = plan.steps * seconds, plan.steps * plan.work.tokens
    yield (
        f"budget     {plan.steps:,} steps, {tokens / GB:,.2f} billion tokens: "
        f"{whole / DAY_S:,.2f} days, {whole * devices / 3600:,.0f} GPU-hours"
    )


def _ways_out(plan: Plan) -> Iterator[str]:
    limit = FITS * plan.topology.device.memory_bytes
    # The compiled program may need more memory than the arithmetic says.
    correction = max(1.0, plan.total_bytes / plan.work.memory.total)
    ways = [way for way in alternatives(plan) if way.plan.total_bytes * correction <= limit]
    if not ways:
        yield "what would fit: nothing here. Use more or larger devices, or a smaller model"
        if (adapter := adapter_that_fits(plan)) is not None:
            yield f"an adapter would fit: {in_memory(adapter)}"
        return
    yield "what would fit, cheapest first, by arithmetic (--fit also compiles, and writes a recipe)"
    for way in _plainest(ways):
        other = "   (rounded moments change the result)" if "moment_dtype" in way.changes else ""
        yield (
            f"  {way.plan.total_bytes / GIB:6.1f} GiB{_each_step(way.plan)}: "
            f"{in_flags(way.changes)}{other}"
        )


def _each_step(plan: Plan) -> str:
    return "" if plan.time is None else f", {in_seconds(plan.time.total)} per step"


def _plainest(ways: list[Alternative]) -> list[Alternative]:
    """Select a few variants of a plan, the best first.

    A variant is left out if its changes include all changes of another variant.
    """
    plain: list[Alternative] = []
    for way in sorted(ways, key=lambda way: (len(way.changes), way.cost)):
        if not any(set(other.changes) <= set(way.changes) for other in plain):
            plain.append(way)
    return sorted(plain, key=lambda way: way.cost)[:ALTERNATIVES]
