"""The page of `--dry_run --topology`: a plan in words and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from consyn_jax.config import RunConfig, flat
from consyn_jax.distributed.auto_mesh import FITS
from consyn_jax.model.arithmetic import num_parameters, train_flops_per_token
from consyn_jax.planning import roofline
from consyn_jax.planning.plan import Alternative, Plan, alternatives
from consyn_jax.planning.topology import Gpu
from consyn_jax.training.memory import device_bytes, step_memory
from consyn_jax.training.trainer import ConsynTrainer

GIB, GB, DAY_S = 2**30, 1e9, 86_400
SMALL_BYTES = 1e6  # exchanges below are told together
ALTERNATIVES = 4  # that the page tells where a run does not fit
NOT_INSTALLED = (
    "Not compiled: the CUDA packages are not installed, so memory, kernels and exchanges below are estimates by arithmetic.\n"
    "With pip install 'consyn_jax[cuda13]', on any machine, they are the compiler's.\n"
)


def page(plan: Plan) -> str:
    """The whole page."""
    sections = [_what(plan), _memory(plan), _exchanges(plan), _time(plan), _budget(plan)]
    if not plan.fits:
        sections.append(_ways_out(plan))
    start = NOT_INSTALLED + "\n" if plan.compiled is None else ""
    return start + "\n\n".join("\n".join(section) for section in sections)


def memory_here(trainer: ConsynTrainer) -> str:
    """What the train step of a run needs of one device here, as compiled for it."""
    needs, limit = step_memory(trainer.compile_train_step(trainer.run)), device_bytes()
    flops = trainer.sequences_per_step * trainer.run.length * train_flops_per_token(trainer.model.config, trainer.run.length)
    lines = ["memory of one device, as compiled", _row("state", needs.state), _row("temporary", needs.temporary)]
    verdict = "fits" if needs.total <= limit else "DOES NOT FIT; --topology GPU:HOSTSxGPUS says what it would need of others"
    lines.append(_row("in all", needs.total) + f"   of {limit / GIB:.1f}: {needs.total / limit:.0%}; {verdict}")
    return "\n".join([*lines, f"a step takes {flops / 1e12:,.3g} TFLOP over all devices"])


def _what(plan: Plan) -> Iterator[str]:
    model, work, topology, budget = plan.model, plan.work, plan.topology, plan.run.budget
    parameters = num_parameters(model) if plan.compiled is None else plan.compiled.num_parameters
    split = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.sizes.items() if size > 1) or "no split"
    yield f"model      {plan.run.model.model}: {parameters:,} parameters, {model.num_layers} layers, {model.hidden_dim} wide"
    yield f"machine    {topology.hosts} x {topology.gpus_per_host} {topology.gpu.kind}"
    yield f"mesh       {split} ({plan.mesh.reason})"
    accumulated = f", {budget.gradient_accumulation_steps} micro-batches" if budget.gradient_accumulation_steps > 1 else ""
    yield f"step       {work.tokens:,} tokens: {budget.batch_size} sequences of {work.length:,}{accumulated}; recomputed: {work.remat}"
    if plan.compiled is not None:
        calls = ", ".join(f"{count} {name}" for name, count in plan.compiled.kernels.items() if "attention" in name or "fmha" in name)
        yield f"attention  {plan.compiled.attention}"
        if calls:
            yield f"           a step runs {calls}"


def _memory(plan: Plan) -> Iterator[str]:
    limit, found, memory = plan.topology.gpu.memory_bytes, plan.compiled, plan.work.memory
    yield f"memory of one GPU{' by arithmetic' if found is None else ''}"
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
        yield _row("batch", found.argument_bytes - found.parameter_bytes - found.optimizer_bytes)
        yield _row("temporary", found.temporary_bytes) + f"   of it about {memory.activations / GIB:.2f} activations, {rest / GIB:.2f} gradients and the like"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield _row("in all", plan.total_bytes) + f"   of {limit / GIB:.1f}: {plan.total_bytes / limit:.0%}; {verdict} (at most {FITS:.0%} may be planned)"


def _row(name: str, size: int) -> str:
    return f"  {name:<12} {size / GIB:8.2f} GiB"


def _exchanges(plan: Plan) -> Iterator[str]:
    if plan.compiled is None:
        yield "exchanges  see the network's share of the step"
        return
    if not plan.compiled.collectives:
        yield "exchanges  none"
        return
    yield "exchanges in a step, bytes of the whole arrays"
    small = 0
    for found in sorted(plan.compiled.collectives, key=lambda c: -c.payload_bytes):
        if found.payload_bytes < SMALL_BYTES:
            small += found.payload_bytes
            continue
        axes = ", ".join(found.axes) or "axis not known"
        yield f"  {found.kind:<18} {found.dtype:<5} over {axes:<14} {found.count:7,} calls {found.payload_bytes / GB:10.3f} GB"
    if small:
        yield f"  and {small / 1e3:,.0f} kB of small ones"
    yield f"  in the compiler's order at least {plan.compiled.hidden_share:.0%} of their time lies behind products"
    for warning in plan.compiled.warnings:
        yield f"  WARNING {warning}"


def _time(plan: Plan) -> Iterator[str]:
    time, gpu = plan.time, plan.topology.gpu
    flops = plan.work.flops
    yield f"step time, estimated: {_seconds(time.total)} for {flops / plan.topology.num_devices / 1e12:,.1f} TFLOP a GPU, {plan.peak_share:.0%} of its peak"
    for name in ("products", "attention", "memory", "optimizer"):
        yield f"  {name:<12} {_seconds(getattr(time, name)):>10}"
    network = ", ".join(f"{' x '.join(axes)} {_seconds(seconds)}" for axes, seconds in time.network.items())
    if network:
        yield f"  {'network':<12} {_seconds(time.exposed):>10}   not hidden; in all {network}"
    yield "assumed    " + "\n           ".join(_assumptions(gpu, plan.run.hardware.mixed_precision, roofline.stretch_of(plan.work, plan.topology)))


def _assumptions(gpu: Gpu, precision: str, stretch: float) -> Iterator[str]:
    yield "bfloat16, and attention in a fused kernel" + ("; THIS RUN is in float32, and several times slower" if precision == "no" else "")
    if precision == "fp8":
        yield f"the products of the blocks in 8 bits at {roofline.FP8_SPEEDUP} x the rate below, as data sheets say; what is kept, as large as in bfloat16"
    yield f"products {gpu.matmul_flops / 1e12:.0f} TFLOP/s or {gpu.memory_bandwidth * roofline.MEMORY_EFFICIENCY / 1e12:.2f} TB/s, whichever is slower"
    attention = ", ".join(f"{share:.0%} of peak for heads of {width}" for width, share in roofline.ATTENTION_EFFICIENCY.items())
    yield f"attention {attention}; {roofline.DOCUMENT_SHARE:.0%} of that inside documents, which are taken to be as long as a sequence"
    link, ports = gpu.link_bandwidth * roofline.LINK_EFFICIENCY / 1e9, gpu.network_bandwidth * roofline.LINK_EFFICIENCY / 1e9
    yield f"links {link:.0f} GB/s inside a host, {ports:.3g} GB/s a GPU between hosts"
    yield f"weights and gradients hide behind {roofline.OVERLAP:.0%} of the kernels, and slow them by {roofline.CONTENTION:.0%} of their own time"
    yield f"all kernels together {stretch} x their sum; sources and checks in docs/planning.md"


def _budget(plan: Plan) -> Iterator[str]:
    devices, a_second = plan.topology.num_devices, plan.work.tokens / plan.time.total
    yield f"speed      {a_second:,.0f} tokens/s, {a_second / devices:,.0f} a GPU; {a_second * DAY_S / GB:,.2f} billion a day"
    if plan.steps is None:
        yield "budget     epochs of data that is not read here; with --total_tokens or --max_steps this says days"
    else:
        seconds = plan.steps * plan.time.total
        tokens = plan.steps * plan.work.tokens
        yield f"budget     {plan.steps:,} steps, {tokens / GB:,.2f} billion tokens: {seconds / DAY_S:,.2f} days, {seconds * devices / 3600:,.0f} GPU-hours"
    state = num_parameters(plan.model) * (4 + plan.work.moment_bytes) if plan.compiled is None else plan.compiled.state_bytes
    kept = plan.run.saving.keep_last
    yield f"checkpoint {state / GB:,.2f} GB on disk, {state * kept / GB:,.1f} GB for the {kept} that are kept"


def _ways_out(plan: Plan) -> Iterator[str]:
    limit = FITS * plan.topology.gpu.memory_bytes
    correction = plan.total_bytes / plan.work.memory.total  # where the compiler needs more than the arithmetic
    ways = [a for a in alternatives(plan) if a.plan.total_bytes * max(1.0, correction) <= limit]
    if not ways:
        yield "what would fit: nothing on these GPUs; use more or larger ones, or a smaller model"
        return
    yield "what would fit, the cheapest first, by arithmetic (--fit compiles and writes a recipe)"
    for way in _plainest(ways):
        other = "   (rounded moments: another result)" if "moment_dtype" in way.changes else ""
        yield f"  {way.plan.total_bytes / GIB:6.1f} GiB, {_seconds(way.plan.time.total)} a step: {in_flags(way.changes)}{other}"


def _plainest(ways: list[Alternative]) -> list[Alternative]:
    """The first few, without those that change more flags than another needs."""
    plain: list[Alternative] = []
    for way in sorted(ways, key=lambda way: (len(way.changes), way.cost)):
        if not any(set(other.changes) <= set(way.changes) for other in plain):
            plain.append(way)
    return sorted(plain, key=lambda way: way.cost)[:ALTERNATIVES]


def in_flags(changes: dict[str, Any]) -> str:
    """As they are written on the command line."""
    return " ".join(f"--{name} {value}" for name, value in changes.items()) or "as it is"


def recipe(found: Alternative, origins: dict[str, str], topology: str) -> str:
    """The YAML of a run that fits: what the user gave, with what was changed.

    Args:
        origins: of the values, by flag name.
    """
    plan = found.plan
    how = "as compiled" if plan.compiled is not None else "by arithmetic, not compiled"
    given = {name: value for name, value in _given(plan.run, origins).items() if name not in ("topology", "fit")}
    head = (
        f"# consyn-train --config THIS_FILE\n#\n"
        f"# For {topology}: {plan.total_bytes / GIB:.1f} GiB of {plan.topology.gpu.memory_bytes / GIB:.1f} on each GPU, {how}.\n"
        f"# EXPECTED, not measured: {_seconds(plan.time.total)} a step, {plan.work.tokens / plan.time.total:,.0f} tokens/s.\n"
        f"# Changed by --fit: {in_flags(found.changes) if found.changes else 'nothing'}\n"
    )
    return head + yaml.safe_dump(given | found.changes, sort_keys=False, allow_unicode=True)


def _given(run: RunConfig, origins: dict[str, str]) -> dict[str, Any]:
    values = flat(run)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if origins[name].startswith(("flag", "file", "keyword"))}


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
