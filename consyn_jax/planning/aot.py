"""Compile the train step of a run for absent devices, and summarise the program.

The CUDA plugin and libtpu can compile for a described machine without a driver. This needs
environment variables that JAX reads at its start, so compiling runs in a process of its own. The
packages of the extra `cuda13` or `tpu` must be installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from consyn_jax.config import RunConfig
from consyn_jax.distributed.compiled import (
    Collective,
    collectives,
    instructions,
    kernels,
    update_bytes,
)
from consyn_jax.errors import UserError
from consyn_jax.flags import flat
from consyn_jax.model_config import ModelConfig
from consyn_jax.planning.timeline import play
from consyn_jax.planning.topology import GpuTopology, Topology, parse_topology
from consyn_jax.resolve import resolve

if TYPE_CHECKING:
    from consyn_jax.training.program import Built

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the default backend; the CUDA plugin is loaded nevertheless
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # otherwise the plugin asks the driver
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "1",  # show warnings: `resharded` reads them
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu asks a cloud's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise one process at a time may load libtpu
    "TPU_LOG_DIR": "disabled",  # otherwise libtpu writes into /tmp/tpu_logs
}


class Compiler(NamedTuple):
    """A compiler for absent devices.

    Attributes:
        devices: the kind of devices that it compiles for, in words.
        extra: the extra of this package that installs it.
        module: a module whose presence shows that the compiler is installed.
    """

    devices: str
    extra: str
    module: str

    @property
    def is_installed(self) -> bool:
        """Whether the compiler's packages are installed."""
        package = self.module.partition(".")[0]
        return all(map(importlib.util.find_spec, dict.fromkeys((package, self.module))))


COMPILERS = {
    "cuda": Compiler("NVIDIA GPUs", "cuda13", "jax_plugins.xla_cuda13"),
    "tpu": Compiler("TPUs", "tpu", "libtpu"),
}
# Part of the SPMD partitioner's warning that it gathers an array on every device to reshard it.
RESHARDING = "Involuntary full rematerialization"
NO_TUNING = "--xla_gpu_autotune_level=0"  # tuning would have to run kernels
TOTAL_STEPS = 10_000  # steps of the schedule; the number hardly affects the program


@dataclass(frozen=True)
class CompiledProgram:
    """Facts about a compiled train step; bytes are per device unless stated otherwise.

    Attributes:
        parameter_bytes, optimizer_bytes: size of the parameters and of the optimizer's state.
            Moments in host memory are not counted.
        argument_bytes: the training state and one batch; the new state reuses the old state's
            memory.
        temporary_bytes: peak memory of everything else, such as activations, gradients and
            gathered weights.
        state_bytes: the whole training state over all devices, as in a checkpoint.
        attention: the kernel that was chosen, and why.
        kernels: executions per step of each kernel that XLA did not generate; for TPUs, the number
            of instructions that call it.
        collectives: the collectives of a step. None for TPUs: their compiler does not write how
            often loops run, and it splits collectives into pieces inside matmuls.
        update_bytes: bytes that the optimizer reads and writes, also for the gradient norm and
            clipping. Moments in host memory are not counted. None for TPUs, because their programs
            do not name the optimizer's instructions.
        hidden_share: the share of the collectives' time that the compiler's schedule overlaps with
            matmuls (planning/timeline.py). None for TPUs, whose times are unknown.
        warnings: one warning of the SPMD partitioner for each array that is gathered and resharded.
    """

    parameter_bytes: int
    optimizer_bytes: int
    argument_bytes: int
    temporary_bytes: int
    state_bytes: int
    num_parameters: int
    attention: str
    kernels: dict[str, int]
    update_bytes: int | None
    collectives: tuple[Collective, ...] | None
    hidden_share: float | None
    warnings: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """The memory that one device needs for the step."""
        return self.argument_bytes + self.temporary_bytes

    @property
    def update_passes(self) -> float:
        """Ratio of `update_bytes` to its minimum.

        The minimum is one read of the gradients, and one read and one write of the state.
        """
        assert self.update_bytes is not None
        return self.update_bytes / (3 * self.parameter_bytes + 2 * self.optimizer_bytes)


def environment() -> dict[str, str]:
    """Return environment variables for a process that compiles; `XLA_FLAGS` are kept."""
    own = os.environ.get("XLA_FLAGS", "")
    flags = f"{own} {NO_TUNING}".strip() if own.startswith("-") else NO_TUNING
    return os.environ | ENVIRONMENT | {"XLA_FLAGS": flags}


def packages_are_there(compiler: str = "cuda") -> bool:
    """Whether the packages of a compiler, a key of `COMPILERS`, are installed."""
    return COMPILERS[compiler].is_installed


def check_packages(compiler: str = "cuda") -> None:
    """Check that the packages of a compiler are installed; no device or driver is needed.

    Raises:
        UserError: they are not installed.
    """
    devices, extra, _ = COMPILERS[compiler]
    if not packages_are_there(compiler):
        raise UserError(
            f"Compiling for {devices} needs no device, but it needs the packages of the extra "
            f"{extra}. Install them with: pip install 'consyn_jax[{extra}]'."
        )


class NeedsMoreMemoryError(Exception):
    """The compiler refused a program because it needs more memory than a device has.

    Attributes:
        needed: bytes that the program needs.
    """

    def __init__(self, needed: int):
        super().__init__(f"needs {needed:,} bytes")
        self.needed = needed


def compile_train_step(
    model: ModelConfig, run: RunConfig, topology: str, text_file: Path | None = None
) -> CompiledProgram:
    """Compile the train step of `run` for `topology` in a process of its own.

    Args:
        run: the resolved run.
        topology: the devices as text, such as "h200:1x8" (one host with eight H200).
        text_file: file for the text of the compiled program; None to write none.

    Raises:
        UserError: the compiler's packages are missing, or the mesh or batch does not suit the
            topology.
        NeedsMoreMemoryError: the devices have too little memory. Only the compiler for TPUs checks
            this.
        RuntimeError: the compiler failed; the message ends with its output.
    """
    check_packages(parse_topology(topology).compiler)
    request = {
        "model": dataclasses.asdict(model),
        "run": flat(run),
        "topology": topology,
        "text_file": text_file and str(text_file),
    }
    # The child must import this copy of the package, not one in the working directory.
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from consyn_jax.planning.aot import _child; _child()"],
        input=json.dumps(request),
        env=environment() | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"Compiling for {topology} failed:\n{done.stderr[-4000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    if "needed" in answer:
        raise NeedsMoreMemoryError(answer["needed"])
    communicated = answer["collectives"] and tuple(
        Collective(**c | {"axes": tuple(c["axes"])}) for c in answer["collectives"]
    )
    warnings = resharded(done.stderr)
    return CompiledProgram(**answer | {"collectives": communicated, "warnings": warnings})


def resharded(stderr: str) -> tuple[str, ...]:
    """Find the partitioner's warnings about resharded arrays in a compiler's stderr."""
    return tuple(
        line.partition("] ")[2] or line for line in stderr.splitlines() if RESHARDING in line
    )


def _child() -> None:
    request = json.load(sys.stdin)
    run, _ = resolve(request["run"])
    topology = parse_topology(request["topology"])
    try:
        built = build(ModelConfig(**request["model"]), run, topology)
        compiled = _compile(lower(built, run))
        answer = dataclasses.asdict(summary(built, compiled, topology))
    except UserError as mistake:
        answer = {"mistake": str(mistake)}
    except NeedsMoreMemoryError as refused:
        answer = {"needed": refused.needed}
    else:
        if request["text_file"]:
            Path(request["text_file"]).write_text(compiled.as_text(), encoding="utf-8")
    print(json.dumps(answer))


def _compile(lowered: Any) -> Any:
    import jax

    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = refused_bytes(str(error))
        if needed is None:
            raise
        raise NeedsMoreMemoryError(needed) from error


def refused_bytes(message: str) -> int | None:
    """Parse the bytes that a program needs from an out-of-memory error; None for other errors.

    >>> refused_bytes("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    ... "for HLO temporaries (1.50G) exceeds available HBM (1.25G).") == 1.5 * 2**30
    True
    >>> refused_bytes("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.00G of "
    ... "15.75G hbm. Exceeded hbm capacity by 1.25G.") == 17 * 2**30
    True
    """
    pattern = r"RESOURCE_EXHAUSTED.*?(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)"
    found = re.search(pattern, message, re.DOTALL)
    return found and int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))))


def build(model: ModelConfig, run: RunConfig, topology: Topology) -> Built:
    """Build the programs that `consyn-train` would run on this topology.

    The process must have been started with the environment variables of `environment()`.

    Raises:
        UserError: the mesh or batch of the run does not suit the topology's devices.
    """
    from consyn_jax.training.optim.schedules import build_schedule
    from consyn_jax.training.program import build_program

    schedule = build_schedule(run.optimizer, TOTAL_STEPS)
    return build_program(
        model,
        run.budget,
        run.hardware,
        run.optimizer,
        run.regularisation,
        lora=run.lora,
        length=run.row_length,
        schedule=schedule,
        devices=topology.described_devices(),
        machine=topology.machine,
    )


def lower(built: Built, run: RunConfig) -> Any:
    """Lower the train step of `run`; return a `jax.stages.Lowered`."""
    budget = run.budget
    return built.program.lower_train_step(
        budget.gradient_accumulation_steps, budget.batch_size, run.row_length
    )


def summary(built: Built, compiled: Any, topology: Topology) -> CompiledProgram:
    """Summarise a compiled train step.

    Args:
        compiled: the train step, a `jax.stages.Compiled`.
    """
    import jax

    memory, text, state = compiled.memory_analysis(), compiled.as_text(), built.program.state_like
    program, parameters = instructions(text), jax.tree.leaves(state.params)
    moved = hidden = communicated = None
    if isinstance(topology, GpuTopology):
        communicated = tuple(collectives(program, built.mesh.sizes))
        moved = update_bytes(program, set(map(_local_size, parameters)))
        hidden = play(text, built.mesh.sizes, topology).hidden_share
    return CompiledProgram(
        parameter_bytes=_local_bytes(state.params),
        optimizer_bytes=0 if built.program.host_moments else _local_bytes(state.opt_state),
        argument_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        num_parameters=built.program.layout.num_parameters,
        attention=f"{built.attention.backend}: {built.attention.reason}",
        kernels=kernels(program),
        update_bytes=moved,
        collectives=communicated,
        hidden_share=hidden,
    )


def _local_size(leaf: Any) -> int:
    """Count the elements of an array's shard, from the shape and the sharding."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _local_bytes(tree: Any) -> int:
    """Count the bytes that arrays take on one device, from their shapes and shardings."""
    import jax

    return sum(_local_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
