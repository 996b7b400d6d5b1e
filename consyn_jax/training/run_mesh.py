"""The mesh of a run: as `--mesh` specifies, or the best mesh for the machine."""

from __future__ import annotations

import math
from functools import cache

import jax

from consyn_jax.config import BudgetOptions, HardwareOptions
from consyn_jax.distributed.auto_mesh import Machine, MeshChoice, choose_mesh
from consyn_jax.distributed.mesh import check_batch, check_model, parse_mesh
from consyn_jax.distributed.process_group import gather
from consyn_jax.model.arithmetic import BYTES_OF_LOGIT
from consyn_jax.model_config import NO_LORA, LoraOptions, ModelConfig
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.runtime.memory import device_bytes
from consyn_jax.training.runtime.step_memory import estimate_memory


@cache
def this_machine() -> Machine:
    """Describe this machine as JAX sees it; all processes get the same answer.

    A host is a group of devices with fast links; several processes may share it. All processes must
    call `gather` in the same order, but threads that compile programs call this function at any
    time. So its result is cached.
    """
    hosts = len({getattr(device, "slice_index", 0) for device in jax.devices()})
    if jax.device_count() % hosts:  # hosts of different sizes count as one
        hosts = 1
    memory_bytes = device_bytes()
    if hosts > 1:
        # Free memory differs a little by host, but all processes must choose the same mesh.
        memory_bytes = min(map(int, gather(str(memory_bytes))))
    name = "slice" if jax.devices()[0].platform == "tpu" else "host"
    return Machine(hosts, jax.device_count() // hosts, memory_bytes, name)


def choose_run_mesh(
    model: ModelConfig,
    budget: BudgetOptions,
    hardware: HardwareOptions,
    optimizer: OptimizerOptions,
    length: int,
    machine: Machine,
    lora: LoraOptions = NO_LORA,
    sequences: int = 1,
) -> MeshChoice:
    """Choose the mesh of a run on `machine`: the value of `--mesh`, or the best for "auto".

    Args:
        length: Tokens per row.
        sequences: Sequences per row.

    Raises:
        UserError: The mesh or the batch does not fit the model or the devices.
    """
    devices = machine.hosts * machine.per_host
    batch_size, accumulation = budget.batch_size, budget.gradient_accumulation_steps
    if hardware.auto_batch:  # the mesh must not change when --auto_batch changes the batch
        batch_size, accumulation = devices, 2
    moments = optimizer.moment_bytes if hardware.optimizer_memory == "device" else 0
    remat, logit = hardware.gradient_checkpointing, BYTES_OF_LOGIT[hardware.logits_dtype]
    # Training reads the GPU's memory from a table to choose the size of loss chunks. The measured
    # memory differs a little from the table, but gives chunks of the same size.
    gpu_bytes = 0 if machine.name_of_host == "slice" else machine.memory_bytes

    def needed_bytes(sizes: dict[str, int]) -> int:
        batch = (batch_size, accumulation, length)
        return estimate_memory(model, sizes, *batch, remat, moments, lora, gpu_bytes, logit).total

    if hardware.mesh != "auto":
        choice = MeshChoice(parse_mesh(hardware.mesh, devices), "as requested")
    else:
        heads = math.gcd(model.num_kv_heads, model.mlp_dim)  # divides num_heads, too
        splits = {"context": length, "tensor": heads}
        choice = choose_mesh(machine, model.hidden_dim, needed_bytes, batch_size, splits)
    check_batch(choice.sizes, budget.batch_size, length // sequences, sequences)
    names = ("hidden_dim", "num_heads", "num_kv_heads", "mlp_dim")
    check_model(choice.sizes, {name: getattr(model, name) for name in names})
    return choice
