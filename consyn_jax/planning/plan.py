"""Plan the memory and time of a run on any machine, and find settings with which it fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax

from consyn_jax.config import REMAT_POLICIES, RunConfig
from consyn_jax.distributed.auto_mesh import FITS, MeshChoice
from consyn_jax.distributed.hardware import described_gpu
from consyn_jax.errors import UserError
from consyn_jax.flags import with_flags
from consyn_jax.model_config import ModelConfig
from consyn_jax.planning.aot import (
    CompiledProgram,
    NeedsMoreMemoryError,
    compile_train_step,
    summary,
)
from consyn_jax.planning.roofline import StepTime, estimate_step
from consyn_jax.planning.topology import GpuTopology, Topology
from consyn_jax.planning.workload import Workload, workload
from consyn_jax.training.optim.offload import check_offload
from consyn_jax.training.precision import choose_precision
from consyn_jax.training.run_mesh import choose_run_mesh, this_machine
from consyn_jax.training.trainer import ConsynTrainer
from consyn_jax.validation import validate

MAX_COMPILED = 4  # candidates that one search compiles
ADAPTER_RANK = 16  # LoRA rank of a suggested adapter


@dataclass(frozen=True)
class Plan:
    """A run on a topology, with its memory and time.

    Attributes:
        steps: number of steps; None for a budget of epochs, because planning reads no data.
        time: estimated time of a step; None for TPUs, where estimates were never compared with
            measurements.
        compiled: facts of the compiled step; None if it was not compiled or the compiler refused.
        refused_bytes: bytes that the step needs on a device, if the compiler refused the step for
            lack of memory; otherwise None.
    """

    model: ModelConfig
    run: RunConfig
    topology: Topology
    mesh: MeshChoice
    work: Workload
    time: StepTime | None
    steps: int | None
    compiled: CompiledProgram | None = None
    refused_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes that one device needs: the compiler's number if there is one, else an estimate."""
        if self.refused_bytes is not None:
            return self.refused_bytes
        return self.work.memory.total if self.compiled is None else self.compiled.total_bytes

    @property
    def fits(self) -> bool:
        """Whether the step needs at most the share `auto_mesh.FITS` of a device's memory."""
        return self.total_bytes <= FITS * self.topology.device.memory_bytes

    def peak_share(self, seconds: float) -> float:
        """Model FLOP utilisation of a step that takes `seconds`, relative to the specified peak."""
        return self.work.flops / (
            seconds * self.topology.num_devices * self.topology.device.bf16_flops
        )


def estimate(model: ModelConfig, run: RunConfig, topology: Topology) -> Plan:
    """Plan a resolved run by arithmetic, without compiling.

    Raises:
        UserError: mesh, batch, precision or `--optimizer_memory` is impossible on this topology.
    """
    platform, kind, hardware = topology.compiler, topology.device.kind, run.hardware
    precision = choose_precision(
        *(hardware.mixed_precision, platform, topology.compute_capability, kind),
        hardware.logits_dtype,
    )
    if hardware.optimizer_memory == "host":
        check_offload(run.optimizer.optimizer, precision.dtype, platform)
    mesh = choose_run_mesh(
        *(model, run.budget, run.hardware, run.optimizer, run.row_length),
        *(topology.machine, run.lora, run.regularisation.sequences),
    )
    gpu_bytes = topology.gpu.memory_bytes if isinstance(topology, GpuTopology) else 0
    work, budget = workload(model, run, mesh.sizes, gpu_bytes), run.budget
    limits = [budget.max_steps] if budget.max_steps is not None else []
    if budget.total_tokens is not None:
        limits.append(math.ceil(budget.total_tokens / work.tokens))
    time = estimate_step(work, topology) if isinstance(topology, GpuTopology) else None
    return Plan(model, run, topology, mesh, work, time, min(limits, default=None))


def compiled(plan: Plan, topology: str) -> Plan:
    """Compile the train step, and add the compiled step's memory and collectives to the plan.

    Args:
        topology: the plan's topology as text.

    Raises:
        UserError: the compiler's packages are missing.
    """
    try:
        program = compile_train_step(plan.model, plan.run, topology)
    except NeedsMoreMemoryError as refused:
        return dataclasses.replace(plan, refused_bytes=refused.needed)
    if isinstance(plan.topology, GpuTopology):
        time = estimate_step(plan.work, plan.topology, program.collectives)
        plan = dataclasses.replace(plan, time=time)
    return dataclasses.replace(plan, compiled=program)


def plan_here(trainer: ConsynTrainer) -> Plan | None:
    """Compile the train step for this machine's GPUs, and plan the run on them.

    Returns None if the GPUs are not in the table of GPUs.
    """
    device, machine = jax.devices()[0], this_machine()
    gpu = described_gpu(device.device_kind)
    if gpu is None:
        return None
    topology = GpuTopology(gpu, machine.hosts, machine.per_host)
    plan = estimate(trainer.model.config, trainer.run, topology)
    program = summary(trainer.build(), trainer.compile_train_step(trainer.run), topology)
    time = estimate_step(plan.work, topology, program.collectives)
    return dataclasses.replace(plan, compiled=program, time=time, steps=trainer.total_steps)


# ----------------------------------------------------------------------------------- what would fit


@dataclass(frozen=True)
class Alternative:
    """A variant of a plan, with some flags changed.

    Attributes:
        changes: the new values, by flag name.
    """

    changes: dict[str, Any]
    plan: Plan

    @property
    def cost(self) -> tuple[bool, float, int]:
        """Sort key of a variant; the smallest is the best.

        Variants that keep the dtype of the moments come first. Among these, variants with a shorter
        estimated step time come first, and then variants with fewer changes. If times are unknown,
        variants with less recomputation come first, and then variants with fewer micro-batches.
        """
        time, work = self.plan.time, self.plan.work
        recomputed = REMAT_POLICIES.index(work.remat)  # ordered from no recomputation to most
        length = recomputed + 1 - 1 / work.accumulation if time is None else time.total
        return "moment_dtype" in self.changes, length, len(self.changes)


def alternatives(plan: Plan) -> list[Alternative]:
    """List the variants of a plan whose estimated memory fits, the cheapest first.

    A variant differs in the size of micro-batches (the batch of a step is the same), the
    recomputation policy, the mesh, or the place and dtype of the optimizer's moments. The unchanged
    plan is in the list if it fits.
    """
    found = []
    for choice in product(
        _micro_batches(plan), _recomputations(plan), _meshes(plan), _moments(plan)
    ):
        changes = {name: value for part in choice for name, value in part.items()}
        try:
            other = estimate(plan.model, with_flags(plan.run, changes), plan.topology)
        except UserError:  # the mesh does not divide the batch, or moments cannot be on the host
            continue
        if other.fits:
            found.append(Alternative(changes, other))
    return sorted(found, key=lambda a: a.cost)


def adapter_that_fits(plan: Plan) -> Alternative | None:
    """Find the cheapest LoRA variant of a plan that fits; None if there is none.

    This variant is suggested if no other variant of the plan fits. The dtypes auto, int8 and nf4 of
    the frozen weights are tried in this order.
    """
    lora, rank = plan.run.lora, {}
    if not lora.is_used:
        rank = {"lora_rank": ADAPTER_RANK}
    for dtype in ("auto", "int8", "nf4"):
        changes = rank | ({} if dtype == lora.lora_base_dtype else {"lora_base_dtype": dtype})
        run = with_flags(plan.run, changes)
        try:
            validate(run)
            other = estimate(plan.model, run, plan.topology)
        except UserError:  # an adapter cannot be combined with other flags of the run
            return None
        if found := alternatives(other):
            return Alternative(changes | found[0].changes, found[0].plan)
    return None


def _micro_batches(plan: Plan) -> Iterator[dict[str, Any]]:
    size, number = plan.run.budget.batch_size, plan.run.budget.gradient_accumulation_steps
    yield {}
    for factor in (2**power for power in range(1, 24)):
        if size % factor == 0:
            yield {"batch_size": size // factor, "gradient_accumulation_steps": number * factor}
        if number % factor == 0:
            yield {"batch_size": size * factor, "gradient_accumulation_steps": number // factor}


def _recomputations(plan: Plan) -> Iterator[dict[str, Any]]:
    yield {}
    for name in REMAT_POLICIES:
        if name != plan.run.hardware.gradient_checkpointing:
            yield {"gradient_checkpointing": name}


def _meshes(plan: Plan) -> Iterator[dict[str, Any]]:
    yield {}
    if plan.mesh.sizes["data"] > 1:
        yield {"mesh": f"fsdp={plan.topology.num_devices}"}


def _moments(plan: Plan) -> Iterator[dict[str, Any]]:
    yield {}
    if plan.run.optimizer.moment_dtype == "float32":
        yield {"moment_dtype": "bfloat16"}
    hardware = plan.run.hardware
    if (
        plan.topology.compiler != "tpu"
        and hardware.optimizer_memory == "device"
        and hardware.mixed_precision != "fp16"
        and plan.run.optimizer.rule.layerwise
    ):
        yield {"optimizer_memory": "host"}


def fit(plan: Plan, topology: str, *, compile: bool) -> Alternative:
    """Find the cheapest change of options with which the run fits into memory.

    Args:
        topology: the plan's topology as text.
        compile: whether the compiler must confirm that it fits.

    Raises:
        UserError: nothing fits.
    """
    correction, tried = 1.0, 0
    for candidate in alternatives(plan):
        if not compile:
            return candidate
        if candidate.plan.total_bytes * correction > FITS * plan.topology.device.memory_bytes:
            continue
        confirmed = compiled(candidate.plan, topology)
        if confirmed.fits:
            return Alternative(candidate.changes, confirmed)
        correction = max(correction, confirmed.total_bytes / candidate.plan.total_bytes)
        tried += 1
        if tried == MAX_COMPILED:
            break
    adapter = adapter_that_fits(plan)
    remedy = "" if adapter is None else f", or train only an adapter: {in_memory(adapter)}"
    raise UserError(
        f"This run does not fit {topology} with any micro-batch size, recomputation, mesh, or "
        "place and type of the optimizer's moments. Use more or larger devices, or a smaller "
        f"model{remedy}."
    )


def in_memory(adapter: Alternative) -> str:
    """Describe an adapter run by its flags and its estimated memory."""
    run, gib = adapter.plan.run, adapter.plan.total_bytes / 2**30
    over = "" if run.model.checkpoint else ", over the weights that --checkpoint names"
    flags = " ".join(f"--{name} {value}" for name, value in adapter.changes.items())
    return f"{flags} needs {gib:.1f} GiB by arithmetic{over}"
