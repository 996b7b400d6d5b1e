"""The programs of a run, tied to a mesh: shapes and places of the state, the train step and the evaluation step, ready to compile.

Nothing here needs a device: on a mesh of a described topology the same programs compile for machines that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from consyn_jax.config import ModelConfig, RegularisationOptions, RunConfig
from consyn_jax.distributed.auto_mesh import Machine, MeshChoice, choose_mesh
from consyn_jax.distributed.compiler import compiler_options
from consyn_jax.distributed.hardware import runs_triton
from consyn_jax.distributed.mesh import build_mesh, check_batch, check_model, parse_mesh, sharding
from consyn_jax.distributed.peers import current_peers
from consyn_jax.model.arithmetic import estimate_memory
from consyn_jax.model.attention import AttentionChoice, choose_attention
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.parameters import Layout, Params, layout
from consyn_jax.model.transformer import Compute, Decoder
from consyn_jax.training.guard import guarded
from consyn_jax.training.host_state import check_rule, in_host_memory, streamed
from consyn_jax.training.loss import CHUNKS, CPU_CHUNKS, GPU_CHUNKS, Chunks, Extras, LossSums, head_loss, head_objective
from consyn_jax.training.memory import device_bytes
from consyn_jax.training.optimizer import configured_optimizer, moment_bytes, place_state
from consyn_jax.training.precision import PrecisionChoice, choose_precision, make_scaled_train_step, with_loss_scale
from consyn_jax.training.signals import SIGNALS, is_shared, signals_like, with_signals
from consyn_jax.training.step import Batch, Step, TrainState, make_step, make_train_step, with_dropout

BATCH_DTYPES = {"input_ids": jnp.int32, "labels": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
TRAIN_AXES = (None, "batch", "sequence")  # [A, B, T]
EVAL_AXES = ("batch", "sequence")  # [B, T]
# Without a loop over the layers a step is a fifth faster on CPUs, and on GPUs what is kept of each layer for the backward pass need not be
# copied into one array of all layers and out of it again. With more layers, compiling takes too long.
UNROLLED_LAYERS = {"cpu": 12, "gpu": 24}


@dataclass(frozen=True)
class Program:
    """What is trained, how, and where.

    Args:
        optimizer: with its schedule inside.
        max_grad_norm: 0 for no clipping.
        regularisation: of training; evaluation is without.
        seed: of what training draws.
        max_nonfinite_steps: as many steps in a row that are not finite stop the state for good.
        host_moments: the optimizer's moments lie in the host's memory (training/host_state.py).
    """

    config: ModelConfig
    compute: Compute
    optimizer: optax.GradientTransformation
    max_grad_norm: float
    mesh: Mesh
    regularisation: RegularisationOptions = field(default_factory=RegularisationOptions)
    seed: int = 0
    max_nonfinite_steps: int = 1
    host_moments: bool = False

    @cached_property
    def layout(self) -> Layout:
        """Shapes and logical axes of the parameters."""
        return layout(self.config)

    @cached_property
    def rule(self) -> optax.GradientTransformation:
        """The optimizer, with the scale of the loss around it where the run computes in float16."""
        return with_loss_scale(self.optimizer) if self.compute.dtype == jnp.float16 else self.optimizer

    @property
    def chunks(self) -> Chunks:
        """How the devices hold logits best. Narrow types are only simulated on CPUs, where XLA may lack their products in that order."""
        device = self.mesh.devices.flat[0]
        if runs_triton(device.platform, getattr(device, "compute_capability", "")):
            return GPU_CHUNKS
        return CPU_CHUNKS if device.platform == "cpu" and self.compute.dtype == jnp.float32 else CHUNKS

    def loss(self, params: Params, batch: Batch) -> LossSums:
        """Loss sums of one micro-batch [B, T], as evaluation has them."""
        model: Decoder = nnx.merge(self.layout.graphdef, params)
        x_BTD = model.hidden(batch["input_ids"], batch["segment_ids"], self.compute)
        return head_loss(x_BTD, model.head_VD, batch["labels"], batch["loss_mask"], self.config.vocab_size, self.chunks)

    def objective(self, params: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
        """What training minimises, summed over the tokens of one micro-batch [B, T], and its loss sums.

        Args:
            batch: with a `dropout_key` where there is dropout.
        """
        options = self.regularisation
        dropout = Dropout(batch["dropout_key"], options.dropout) if options.dropout else None
        model: Decoder = nnx.merge(self.layout.graphdef, params)
        x_BTD = model.hidden(batch["input_ids"], batch["segment_ids"], self.compute, dropout)
        extras = Extras(options.label_smoothing, options.z_loss)
        return head_objective(x_BTD, model.head_VD, batch["labels"], batch["loss_mask"], self.config.vocab_size, extras, self.chunks)

    @cached_property
    def state_like(self) -> Any:
        """The training state as shapes, dtypes and shardings."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        place = partial(jax.tree.map, lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where))
        shardings = self.layout.shardings(self.mesh)
        places = jax.tree.map(in_host_memory, shardings) if self.host_moments else shardings
        opt_state = place_state(jax.eval_shape(self.rule.init, self.layout.shapes), self.layout.shapes, places, everywhere)
        count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        return TrainState(count, place(self.layout.shapes, shardings), opt_state, count)

    def initial_state(self, params: Params) -> TrainState:
        """Step 0 with these parameters, which the state takes over."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_like)
        if self.host_moments:  # on the way there one array at a time is on the devices
            places, tree = jax.tree.flatten(shardings.opt_state)
            each = (jax.jit(lambda p, i=i: jax.tree.leaves(self.rule.init(p))[i], out_shardings=where) for i, where in enumerate(places))
            opt_state = jax.tree.unflatten(tree, [make(params) for make in each])
        else:
            opt_state = jax.jit(self.rule.init, out_shardings=shardings.opt_state)(params)
        return TrainState(jax.device_put(jnp.int32(0), shardings.step), params, opt_state, jax.device_put(jnp.int32(0), shardings.nonfinite))

    def step(self, rule: optax.GradientTransformation, max_grad_norm: float) -> Step:
        """The train step with this update rule, its state's scale of the loss included."""
        make = make_scaled_train_step if self.compute.dtype == jnp.float16 else make_train_step
        return self.with_draws(make(self.objective, rule, max_grad_norm))

    def with_draws(self, step: Step) -> Step:
        """`step`, whose batch has the keys of what this run draws."""
        return with_dropout(step, self.seed) if self.regularisation.dropout else step

    def lower_train_step(self, accumulation: int, batch_size: int, length: int) -> jax.stages.Lowered:
        """`step(state, batch [A, B, T]) -> (state, metrics)`, the state donated, with the compiler's settings for the mesh's devices."""
        if self.host_moments:
            step = self.with_draws(make_step(self.objective, streamed(self.rule, self.layout), self.max_grad_norm))
        else:
            step = self.step(self.rule, self.max_grad_norm)
        step = guarded(step, self.max_nonfinite_steps, chooses=not self.host_moments)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_like)
        batch = self.batch_like((accumulation, batch_size, length), TRAIN_AXES)
        if is_shared(self.mesh):
            step, batch = with_signals(step), batch | {SIGNALS: signals_like(self.mesh)}
        options = compiler_options(list(self.mesh.devices.flat)) or None
        with jax.set_mesh(self.mesh), jax.threefry_partitionable(True):  # draws count by element, wherever it lies
            return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options).lower(self.state_like, batch)

    def lower_eval_step(self, batch_size: int, length: int) -> jax.stages.Lowered:
        """`sums(params, batch [B, T]) -> LossSums`."""
        options = compiler_options(list(self.mesh.devices.flat)) or None
        with jax.set_mesh(self.mesh):
            return jax.jit(self.loss, compiler_options=options).lower(self.state_like.params, self.batch_like((batch_size, length), EVAL_AXES))

    def batch_like(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, Any]:
        """A batch as shapes, dtypes and shardings."""
        where = sharding(self.mesh, axes)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in BATCH_DTYPES.items()}


class Built(NamedTuple):
    """The programs of a run, and what was chosen for them."""

    program: Program
    attention: AttentionChoice
    precision: PrecisionChoice
    mesh: MeshChoice


@cache
def this_machine() -> Machine:
    """As JAX sees it. A host is what has fast links among its devices, and not a process; all processes see the same machine.

    Found once: processes must ask each other in the same order, and programs are compiled beside other questions.
    """
    hosts = len({getattr(device, "slice_index", 0) for device in jax.devices()})
    if jax.device_count() % hosts:  # hosts that are not alike
        hosts = 1
    memory_bytes, peers = device_bytes(), current_peers()
    if hosts > 1 and peers is not None:  # drivers leave a little more or less free, and all must choose the same mesh
        memory_bytes = min(map(int, peers.gather(str(memory_bytes))))
    return Machine(hosts, jax.device_count() // hosts, memory_bytes)


def mesh_of(model: ModelConfig, run: RunConfig, machine: Machine) -> MeshChoice:
    """The mesh that `run` asks for on `machine`, or with `--mesh auto` the one that suits it.

    Raises:
        UserError: a mesh or batch that cannot be there.
    """
    budget, text, length, devices = run.budget, run.hardware.mesh, run.length, machine.hosts * machine.per_host
    remat, batch_size, accumulation = run.hardware.gradient_checkpointing, budget.batch_size, budget.gradient_accumulation_steps
    if run.hardware.auto_batch:  # the mesh must not change when the batch does
        batch_size, accumulation = devices, 2

    def needs(sizes: dict[str, int]) -> int:
        moments = moment_bytes(run.optimizer) if run.hardware.optimizer_memory == "device" else 0
        return estimate_memory(model, sizes, batch_size, accumulation, length, remat, moments).total

    if text != "auto":
        choice = MeshChoice(parse_mesh(text, devices), "as asked for")
    else:
        splits = {"context": length, "tensor": math.gcd(model.num_heads, model.num_kv_heads, model.mlp_dim)}
        choice = choose_mesh(machine.hosts, machine.per_host, model.hidden_dim, machine.memory_bytes, needs, batch_size, splits)
    check_batch(choice.sizes, budget.batch_size, length)
    dimensions = {name: getattr(model, name) for name in ("hidden_dim", "num_heads", "num_kv_heads", "mlp_dim")}
    check_model(choice.sizes, dimensions)
    return choice


def _unrolls(platform: str, num_layers: int, remat: str) -> bool:
    """Whether the blocks are better without a loop. On GPUs a pass that recomputes keeps too little for that to matter."""
    if platform == "cpu":
        return num_layers <= UNROLLED_LAYERS["cpu"]
    return remat == "none" and num_layers <= UNROLLED_LAYERS["gpu"]


def build_program(model: ModelConfig, run: RunConfig, schedule: optax.Schedule, devices: Sequence[Any], machine: Machine | None = None) -> Built:
    """The programs that `run` comes to on `devices`, which need not be there.

    Args:
        run: resolved; its batch, mesh, precision, optimizer, regularisation and gradient checkpointing count.
        devices: of this machine, or of a described topology.
        machine: that the devices are in; None for this one.

    Raises:
        UserError: a mesh, batch or precision that cannot be on these devices.
    """
    budget, hardware, optimizer, regularisation = run.budget, run.hardware, run.optimizer, run.regularisation
    mesh = mesh_of(model, run, machine or this_machine())
    device = devices[0]
    capability = getattr(device, "compute_capability", "")
    precision = choose_precision(hardware.mixed_precision, device.platform, capability, device.device_kind)
    attention = choose_attention(device.platform, precision.dtype, model.head_dim, capability, regularisation.dropout)
    unroll = _unrolls(device.platform, model.num_layers, hardware.gradient_checkpointing)
    compute = Compute(precision.dtype, attention.backend, hardware.gradient_checkpointing, precision.fp8, unroll)
    rule = configured_optimizer(optimizer, schedule, layout(model).logical_axes)
    limit = 1 if optimizer.on_nonfinite == "halt" else optimizer.max_nonfinite_steps
    on_host = hardware.optimizer_memory == "host"
    if on_host:
        check_rule(optimizer.optimizer, precision.dtype)
    program = Program(model, compute, rule, optimizer.max_grad_norm, build_mesh(mesh.sizes, devices), regularisation, budget.seed, limit, on_host)
    return Built(program, attention, precision, mesh)
