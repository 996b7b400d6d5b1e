"""What a run would need and take on machines that need not be there, and what would fit where it does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax

from consyn_jax.config import ModelConfig, RunConfig, UserError, flags, with_flags
from consyn_jax.distributed.auto_mesh import FITS, MeshChoice
from consyn_jax.planning.aot import CompiledProgram, compile_train_step, summary
from consyn_jax.planning.roofline import StepTime, Workload, estimate_step, workload
from consyn_jax.planning.topology import Topology, known_gpu
from consyn_jax.training.host_state import HOST_RULES
from consyn_jax.training.program import mesh_of, this_machine
from consyn_jax.training.trainer import ConsynTrainer

MAX_COMPILED = 4  # candidates of one search


@dataclass(frozen=True)
class Plan:
    """A run on a topology.

    Attributes:
        steps: of the budget; None where it counts epochs of data that nobody has read.
        compiled: None for arithmetic alone.
    """

    model: ModelConfig
    run: RunConfig
    topology: Topology
    mesh: MeshChoice
    work: Workload
    time: StepTime
    steps: int | None
    compiled: CompiledProgram | None = None

    @property
    def total_bytes(self) -> int:
        """What one GPU must hold: as compiled, or by arithmetic."""
        return self.work.memory.total if self.compiled is None else self.compiled.total_bytes

    @property
    def fits(self) -> bool:
        """At most `auto_mesh.FITS` of the GPU's memory."""
        return self.total_bytes <= FITS * self.topology.gpu.memory_bytes

    @property
    def peak_share(self) -> float:
        """Model FLOP utilisation, of the specified peak."""
        return self.work.flops / (self.time.total * self.topology.num_devices * self.topology.gpu.bf16_flops)


def estimate(model: ModelConfig, run: RunConfig, topology: Topology) -> Plan:
    """By arithmetic.

    Args:
        run: resolved.

    Raises:
        UserError: a mesh or batch that cannot be on this topology.
    """
    mesh = mesh_of(model, run, topology.machine)
    work, budget = workload(model, run, mesh.sizes), run.budget
    limits = [budget.max_steps] if budget.max_steps is not None else []
    if budget.total_tokens is not None:
        limits.append(math.ceil(budget.total_tokens / work.tokens))
    return Plan(model, run, topology, mesh, work, estimate_step(work, topology), min(limits, default=None))


def compiled(plan: Plan, topology: str) -> Plan:
    """The same with the compiler's memory and exchanges.

    Args:
        topology: of the plan, as text.

    Raises:
        UserError: the CUDA packages are missing.
    """
    program = compile_train_step(plan.model, plan.run, topology)
    return dataclasses.replace(plan, compiled=program, time=estimate_step(plan.work, plan.topology, program.collectives))


def plan_here(trainer: ConsynTrainer) -> Plan | None:
    """Of a run on the GPUs of this machine, its train step compiled for them; None for devices that are not in the table of GPUs."""
    device, machine = jax.devices()[0], this_machine()
    gpu = known_gpu(device.device_kind)
    if gpu is None:
        return None
    plan = estimate(trainer.model.config, trainer.run, Topology(gpu, machine.hosts, machine.per_host))
    program = summary(trainer.build(), trainer.compile_train_step(trainer.run), plan.topology)
    time = estimate_step(plan.work, plan.topology, program.collectives)
    return dataclasses.replace(plan, compiled=program, time=time, steps=trainer.total_steps)


# -------------------------------------------------------------------------------------------------------------- what would fit


@dataclass(frozen=True)
class Alternative:
    """The same training with other flags.

    Attributes:
        changes: values by flag name.
    """

    changes: dict[str, Any]
    plan: Plan

    @property
    def cost(self) -> tuple[bool, float, int]:
        """What is cheaper comes first: the same result before another, then the shorter step, then the fewer changes."""
        return "moment_dtype" in self.changes, self.plan.time.total, len(self.changes)


def alternatives(plan: Plan) -> list[Alternative]:
    """Every way to split the same step into micro-batches, to recompute, to lay out the weights and to keep the moments that the
    arithmetic says to fit, the cheapest first. Without a change where the plan itself is among them."""
    found = []
    for choice in product(_micro_batches(plan), _recomputations(plan), _meshes(plan), _moments(plan)):
        changes = {name: value for part in choice for name, value in part.items()}
        try:
            other = estimate(plan.model, with_flags(plan.run, changes), plan.topology)
        except UserError:  # a mesh that does not divide the batch
            continue
        if other.fits:
            found.append(Alternative(changes, other))
    return sorted(found, key=lambda a: a.cost)


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
    for name in flags()["gradient_checkpointing"].choices:
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
    if hardware.optimizer_memory == "device" and hardware.mixed_precision != "fp16" and plan.run.optimizer.optimizer in HOST_RULES:
        yield {"optimizer_memory": "host"}


def fit(plan: Plan, topology: str, *, compile: bool) -> Alternative:
    """The cheapest alternative that fits, confirmed by the compiler where it is there.

    Args:
        topology: of the plan, as text.
        compile: or go by arithmetic alone.

    Raises:
        UserError: nothing fits.
    """
    correction, tried = 1.0, 0
    for candidate in alternatives(plan):
        if not compile:
            return candidate
        if candidate.plan.total_bytes * correction > FITS * plan.topology.gpu.memory_bytes:
            continue
        confirmed = compiled(candidate.plan, topology)
        if confirmed.fits:
            return Alternative(candidate.changes, confirmed)
        tried, correction = tried + 1, max(correction, confirmed.total_bytes / candidate.plan.total_bytes)
        if tried == MAX_COMPILED:
            break
    raise UserError(
        f"No micro-batch, recomputation, mesh, place or type of the moments makes this run fit {topology}. Use more or larger GPUs, or a smaller model."
    )
