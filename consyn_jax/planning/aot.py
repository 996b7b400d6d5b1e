"""Compiles the train step of a run for GPUs that are not there, and tells what the compiler made of it.

The CUDA plugin compiles for a described machine without a driver, if it is told so before JAX starts. So the work is done in a
process of its own, and whoever asks may be using JAX on whatever devices there are. It needs the packages of the `cuda13` extra.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consyn_jax.config import ModelConfig, RunConfig, UserError, flat
from consyn_jax.planning.compiled import BYTES, Collective, array_shapes, collectives, instructions, kernels, product_flops, update_bytes
from consyn_jax.planning.schedule import play
from consyn_jax.planning.topology import Topology, parse_topology
from consyn_jax.resolve import resolve

if TYPE_CHECKING:
    from consyn_jax.training.program import Built

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the default backend; the plugin for topologies loads all the same
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the plugin asks the driver for its version otherwise
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "1",  # warnings, which are read
}
RESHARDING = "Involuntary full rematerialization"  # the partitioner's warning of an array that every device gets whole on its way
NO_TUNING = "--xla_gpu_autotune_level=0"  # tuning runs kernels, and there is nothing to run them on
TOTAL_STEPS = 10_000  # of the schedule: a constant in the program, of no weight in what is read from it


@dataclass(frozen=True)
class CompiledProgram:
    """A train step as XLA compiled it. Bytes are per GPU.

    Attributes:
        parameter_bytes, optimizer_bytes: the training state, without moments that lie in the host's memory.
        argument_bytes: the training state and one batch; the state's memory is used again for the new state.
        temporary_bytes: everything else that is alive at once: activations, gradients, gathered weights.
        state_bytes: of the whole training state, over all GPUs: what a checkpoint holds.
        attention: the kernel that was chosen, and why.
        kernels: name -> executions a step, of those that are not XLA's own.
        product_flops: of XLA's own matrix products, "LEFT x RIGHT" types of the operands -> FLOPs a step.
        update_bytes: what the optimizer reads and writes, gradient norm and clipping included; of moments on the device.
        shapes: dtype -> dimensions of every such array that the program names, fused or not, as one GPU has them.
        hidden_share: of the exchanges' time, what the compiler's schedule puts behind products (planning/schedule.py).
        warnings: of the partitioner, where the layout of an array is changed by way of the whole of it.
    """

    devices: int
    parameter_bytes: int
    optimizer_bytes: int
    argument_bytes: int
    temporary_bytes: int
    state_bytes: int
    num_parameters: int
    attention: str
    kernels: dict[str, int]
    product_flops: dict[str, int]
    update_bytes: int
    collectives: tuple[Collective, ...]
    shapes: dict[str, tuple[tuple[int, ...], ...]]
    hidden_share: float
    warnings: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """What one GPU must hold for the step to run."""
        return self.argument_bytes + self.temporary_bytes

    @property
    def update_passes(self) -> float:
        """Bytes that the update moves, in units of the least there could be: gradients read, the state read and written."""
        return self.update_bytes / (3 * self.parameter_bytes + 2 * self.optimizer_bytes)


def environment() -> dict[str, str]:
    """Of a process that compiles: this one's, with what the plugin must be told before JAX starts. The user's own `XLA_FLAGS` stay."""
    own = os.environ.get("XLA_FLAGS", "")
    return os.environ | ENVIRONMENT | {"XLA_FLAGS": f"{own} {NO_TUNING}".strip() if own.startswith("-") else NO_TUNING}


def packages_are_there() -> bool:
    """Whether the packages of the `cuda13` extra are installed."""
    return importlib.util.find_spec("jax_plugins") is not None and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None


def check_packages() -> None:
    """Compiling for NVIDIA GPUs needs the packages of the `cuda13` extra, but no GPU and no driver.

    Raises:
        UserError: they are not installed.
    """
    if not packages_are_there():
        raise UserError("Compiling for NVIDIA GPUs needs the CUDA packages, on any machine. Install them with: pip install 'consyn_jax[cuda13]'.")


def compile_train_step(model: ModelConfig, run: RunConfig, topology: str) -> CompiledProgram:
    """Compile the train step of `run` for `topology` ("h200:1x8": hosts x GPUs) in a process of its own.

    Args:
        run: a resolved run, whose batch, precision, mesh, optimizer and gradient checkpointing count.

    Raises:
        UserError: the CUDA packages are missing, or the run does not fit the topology's devices.
        RuntimeError: the compiler failed; the message ends with what it said.
    """
    parse_topology(topology)
    check_packages()
    request = json.dumps({"model": dataclasses.asdict(model), "run": flat(run), "topology": topology})
    # the child must import this very package, whatever the working directory holds
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-P", "-c", "from consyn_jax.planning.aot import _child; _child()"]
    done = subprocess.run(command, input=request, env=environment() | path, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Compiling for {topology} failed:\n{done.stderr[-4000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    exchanged = tuple(Collective(**c | {"axes": tuple(c["axes"])}) for c in answer["collectives"])
    shapes = {dtype: tuple(map(tuple, found)) for dtype, found in answer["shapes"].items()}
    return CompiledProgram(**answer | {"collectives": exchanged, "shapes": shapes, "warnings": resharded(done.stderr)})


def resharded(complaints: str) -> tuple[str, ...]:
    """What the partitioner complained of on stderr: arrays that every device gets whole while their layout is changed."""
    return tuple(line.partition("] ")[2] or line for line in complaints.splitlines() if RESHARDING in line)


def _child() -> None:
    request = json.load(sys.stdin)
    run, _ = resolve(request["run"])
    try:
        answer = dataclasses.asdict(_compile(ModelConfig(**request["model"]), run, parse_topology(request["topology"])))
    except UserError as mistake:
        answer = {"mistake": str(mistake)}
    print(json.dumps(answer))


def _compile(model: ModelConfig, run: RunConfig, topology: Topology) -> CompiledProgram:
    from jax.experimental import topologies

    # slices x hosts x GPUs per host
    described = topologies.get_topology_desc(platform="cuda", target_config=topology.gpu.target_config, topology=f"1x{topology.hosts}x{topology.gpus_per_host}")
    budget, built = run.budget, _built(model, run, topology, described.devices)
    lowered = built.program.lower_train_step(budget.gradient_accumulation_steps, budget.batch_size, run.length)
    return summary(built, lowered.compile(), topology)


def summary(built: Built, compiled: Any, topology: Topology) -> CompiledProgram:
    """What a train step came to.

    Args:
        compiled: the train step, a `jax.stages.Compiled`.
    """
    import jax

    memory, text, state = compiled.memory_analysis(), compiled.as_text(), built.program.state_like
    program = instructions(text)
    return CompiledProgram(
        devices=built.program.mesh.size,
        parameter_bytes=_local_bytes(state.params),
        optimizer_bytes=0 if built.program.host_moments else _local_bytes(state.opt_state),
        argument_bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        num_parameters=built.program.layout.num_parameters,
        attention=f"{built.attention.backend}: {built.attention.reason}",
        kernels=kernels(program),
        product_flops={" x ".join(types): flops for types, flops in product_flops(program).items()},
        update_bytes=update_bytes(program, {math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params)}),
        collectives=tuple(collectives(program, built.mesh.sizes)),
        shapes={dtype: tuple(sorted(array_shapes(program, dtype))) for dtype in BYTES},
        hidden_share=play(text, built.mesh.sizes, topology).hidden_share,
    )


def _local_bytes(tree: Any) -> int:
    """Of arrays' shapes with their shardings, what lies on one device."""
    import jax

    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _built(model: ModelConfig, run: RunConfig, topology: Topology, devices: list[Any]) -> Built:
    """The programs that `consyn-train` would run on these devices."""
    from consyn_jax.training.program import build_program
    from consyn_jax.training.scheduler import configured_schedule

    return build_program(model, run, configured_schedule(run.optimizer, TOTAL_STEPS), devices, topology.machine)
