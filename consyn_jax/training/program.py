"""The programs of a run: model, loss and train step, combined and ready to compile.

The devices need not be present: on a mesh of described devices, the programs can be compiled for
another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt

from consyn_jax.config import BudgetOptions, HardwareOptions, RegularisationOptions
from consyn_jax.data.pairs import CHOSEN_REFERENCE, REJECTED_REFERENCE
from consyn_jax.distributed.auto_mesh import Machine, MeshChoice
from consyn_jax.distributed.compiler import compiler_options
from consyn_jax.distributed.hardware import described_memory, runs_triton
from consyn_jax.distributed.mesh import build_mesh, sharding
from consyn_jax.model.attention import AttentionChoice, choose_attention
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.fp8.quantisation import first_scales
from consyn_jax.model.lora import BaseTypes, base_like, base_types, trained_layout, with_adapter
from consyn_jax.model.parameters import Layout, Params
from consyn_jax.model.pretrained.config_json import family_of
from consyn_jax.model.rematerialisation import unrolls
from consyn_jax.model.transformer import Compute, Decoder
from consyn_jax.model_config import NO_LORA, LoraOptions, ModelConfig
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.loss import (
    CHUNKS,
    CPU_CHUNKS,
    GPU_CHUNKS,
    Chunks,
    head_loss,
    head_objective,
)
from consyn_jax.training.optim.groups import mup_rates
from consyn_jax.training.optim.offload import check_offload, in_host_memory, layerwise_update
from consyn_jax.training.optim.optimizers import build_optimizer
from consyn_jax.training.optim.schedules import RatesAhead
from consyn_jax.training.optim.skip_nonfinite import skip_nonfinite
from consyn_jax.training.optim.state import new_state, place_state, with_update_count
from consyn_jax.training.precision import (
    PrecisionChoice,
    choose_precision,
    make_scaled_train_step,
    with_loss_scale,
)
from consyn_jax.training.preference.pair_loss import answer_log_probs, pair_objective
from consyn_jax.training.program_arguments import Extras, Number, is_used
from consyn_jax.training.run_mesh import choose_run_mesh, this_machine
from consyn_jax.training.runtime.signals import SIGNALS, is_shared, signals_like, with_signals
from consyn_jax.training.step import (
    BASE,
    Batch,
    Objective,
    Step,
    Sums,
    TrainState,
    make_step,
    make_train_step,
    new_scales,
    with_dropout,
)

# Arrays of a batch of pairs with one value per row.
PAIR_DTYPES = {CHOSEN_REFERENCE: jnp.float32, REJECTED_REFERENCE: jnp.float32}
BATCH_DTYPES = {
    "input_ids": jnp.int32,
    "labels": jnp.int32,
    "segment_ids": jnp.int32,
    "loss_mask": jnp.bool_,
}
_Parts = tuple[Any, Any, Any, Any, int]
TRAIN_AXES = (None, "batch", "sequence")  # [A, B, T]
EVAL_AXES = ("batch", "sequence")  # [B, T]


@dataclass(frozen=True)
class Program:
    """The model, loss, optimizer and mesh of a run, and methods that lower its steps.

    Args:
        optimizer: The optimizer, including its schedule.
        max_grad_norm: Maximum norm for gradient clipping; 0 for no clipping.
        regularisation: Dropout and extra loss terms, for training only.
        seed: Random seed of dropout.
        max_nonfinite_steps: Number of consecutive non-finite steps after which the state is frozen.
        host_moments: Whether the moments are in host memory (training/optim/offload.py).
        schedule: Learning-rate schedule. If it is None, the state has no count of updates, and
            `learning_rate` cannot be used.
        lora: Options of an adapter. If one is used, the parameters are those of the adapter, and
            every batch includes the frozen weights as `BASE`.
        base_types: Dtypes of the frozen weights; None without an adapter.
        logits_dtype: The dtype in which the training loss stores its logits.
    """

    config: ModelConfig
    compute: Compute
    optimizer: optax.GradientTransformation
    max_grad_norm: Number
    mesh: Mesh
    regularisation: RegularisationOptions = field(default_factory=RegularisationOptions)
    seed: int | UInt[Array, ""] = 0
    max_nonfinite_steps: int = 1
    host_moments: bool = False
    schedule: optax.Schedule | None = None
    lora: LoraOptions = NO_LORA
    base_types: BaseTypes | None = None
    logits_dtype: Any = jnp.float32

    @cached_property
    def layout(self) -> Layout:
        """Shapes and logical axes of the trained parameters."""
        return trained_layout(self.config, self.lora)

    @cached_property
    def base_like(self) -> dict[str, Any]:
        """Shapes of the frozen weights that every batch includes; empty without an adapter."""
        if self.base_types is None:
            return {}
        return {BASE: base_like(self.config, self.base_types, self.mesh)}

    def whole(
        self, params: Params, base: Any = None, dropout_key: jax.Array | None = None
    ) -> Params:
        """Return the parameters of a `Decoder`: `params`, or the base with `params` as its adapter.

        Args:
            dropout_key: Random key of a micro-batch; None without dropout.
        """
        return params if base is None else with_adapter(base, params, self.lora, dropout_key)

    @property
    def draws(self) -> bool:
        """Whether a step needs random numbers, for dropout."""
        of_lora = self.lora.is_used and self.lora.lora_dropout
        return is_used(self.regularisation.dropout) or bool(of_lora)

    @cached_property
    def rule(self) -> optax.GradientTransformation:
        """The update rule: the optimizer, with a loss scale if the run computes in float16."""
        return (
            with_loss_scale(self.optimizer) if self.compute.dtype == jnp.float16 else self.optimizer
        )

    @cached_property
    def learning_rate(self) -> Callable[[int], float]:
        """Function that returns the schedule's learning rate after a number of updates."""
        assert self.schedule is not None
        return RatesAhead(self.schedule)

    @property
    def chunks(self) -> Chunks:
        """The chunk size and memory layout of the logits that suit the devices.

        On CPUs, only float32 uses `CPU_CHUNKS`, because XLA may lack this layout for other dtypes.
        """
        device = self.mesh.devices.flat[0]
        is_plain_cpu = device.platform == "cpu" and self.compute.dtype == jnp.float32
        chunks = CPU_CHUNKS if is_plain_cpu else CHUNKS
        if runs_triton(device.platform, getattr(device, "compute_capability", "")):
            chunks = GPU_CHUNKS._replace(gpu_bytes=described_memory(device.device_kind))
        frozen = self.lora.is_used
        return chunks._replace(head_is_frozen=frozen, logits_dtype=self.logits_dtype)

    @property
    def trains_on_pairs(self) -> bool:
        """Whether each row of a batch has the two sequences of a preference pair."""
        return self.regularisation.trains_on_pairs

    @property
    def batch_dtypes(self) -> dict[str, Any]:
        """Dtypes of a batch's arrays by name, including those that only pairs have."""
        return BATCH_DTYPES | (PAIR_DTYPES if self.trains_on_pairs else {})

    def _parts(
        self, params: Params, batch: Batch, base: Any, dropout: Any = None, scales: Any = None
    ) -> _Parts:
        """Compute the inputs of a loss: hidden states, head, labels, mask, and vocabulary size."""
        whole = self.whole(params, base, batch.get("dropout_key"))
        model: Decoder = nnx.merge(self.layout.graphdef, whole)
        ids, documents = batch["input_ids"], batch["segment_ids"]
        x_BTD = model.hidden(ids, documents, self.compute, dropout, scales)
        head_VD, size = model.head_VD, self.config.vocab_size
        return x_BTD, head_VD, batch["labels"], batch["loss_mask"], size

    def log_probs(
        self, params: Params, batch: Batch, base: Params | None = None, scales: Any = None
    ) -> jax.Array:
        """Compute the log-probability [B, 2] of each answer of a micro-batch of pairs."""
        return answer_log_probs(*self._parts(params, batch, base, scales=scales), self.chunks)

    def loss(self, params: Params, batch: Batch) -> Sums:
        """Compute the loss sums of one micro-batch [B, T], for evaluation."""
        base = batch.get(BASE)
        if self.trains_on_pairs:
            return self.objective(params, batch, base=base)[1]
        return head_loss(*self._parts(params, batch, base), self.chunks)

    def objective(
        self, params: Params, batch: Batch, scales: Any = None, base: Params | None = None
    ) -> tuple[jax.Array, Sums]:
        """Compute the training objective, summed over one micro-batch [B, T], and the loss sums.

        Args:
            batch: Arrays of the micro-batch, including a `dropout_key` if there is dropout.
            scales: In fp8, the scales of the training state; None for scales that are computed
                from the arrays themselves, as in evaluations.
            base: The frozen weights, if the parameters are those of an adapter.
        """
        options = self.regularisation
        if self.trains_on_pairs:
            return pair_objective(
                self.log_probs(params, batch, base, scales), batch, options.dpo_beta
            )
        drops = is_used(options.dropout)
        dropout = Dropout(batch["dropout_key"], options.dropout) if drops else None
        extras = Extras(options.label_smoothing, options.z_loss)
        parts = self._parts(params, batch, base, dropout, scales)
        return head_objective(*parts, extras, self.chunks)

    @cached_property
    def state_like(self) -> Any:
        """Shapes, dtypes and shardings of the training state."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        shapes, shardings = self.layout.shapes, self.layout.shardings(self.mesh)
        params = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            shardings,
        )
        places = jax.tree.map(in_host_memory, shardings) if self.host_moments else shardings
        opt_state = jax.eval_shape(self.rule.init, shapes)
        opt_state = place_state(opt_state, shapes, places, everywhere)
        layers, fp8 = self.config.num_layers, self.compute.fp8
        count, scales = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(lambda: (jnp.int32(0), (first_scales(layers),) if fp8 else ())),
        )
        return TrainState(count, params, opt_state, count, scales)

    def initial_state(self, params: Params) -> TrainState:
        """Create the state of step 0 with these parameters, which must not be used afterwards."""
        like = self.state_like
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        opt_state = new_state(self.rule, params, shardings.opt_state, self.host_moments)
        # `device_put` would compare the values across processes. While another process compiles,
        # that comparison could time out in Gloo.
        step, nonfinite = jax.jit(
            lambda: (jnp.int32(0), jnp.int32(0)),
            out_shardings=(shardings.step, shardings.nonfinite),
        )()
        return TrainState(step, params, opt_state, nonfinite, new_scales(like.scales))

    def step(self, rule: optax.GradientTransformation, max_grad_norm: Number) -> Step:
        """Make the train step for an update rule; non-finite steps are not skipped.

        Args:
            rule: Update rule. In a float16 run, the state of the rule must be a `ScaledState`.
        """
        is_scaled = self.compute.dtype == jnp.float16
        make = make_scaled_train_step if is_scaled else make_train_step
        return self._of_objective(lambda objective: make(objective, rule, max_grad_norm))

    def _of_objective(self, make: Callable[[Objective], Step]) -> Step:
        """Make a step whose objective gets the frozen weights and dropout keys, if any."""
        step = make(self.objective)
        if self.lora.is_used:

            def step(state: TrainState, batch: Batch) -> Any:
                arrays: Any = dict(batch)
                base = arrays.pop(BASE)
                return make(partial(self.objective, base=base))(state, arrays)

        return with_dropout(step, self.seed) if self.draws else step

    def train_step(self) -> Step:
        """Make `step(state, batch [A, B, T]) -> (state, metrics)`."""
        if self.host_moments:
            update, norm = layerwise_update(self.rule, self.layout), self.max_grad_norm
            step = self._of_objective(lambda objective: make_step(objective, update, norm))
        else:
            step = self.step(self.rule, self.max_grad_norm)
        step = skip_nonfinite(step, self.max_nonfinite_steps, keeps_state=self.host_moments)
        if self.schedule is not None:
            step = with_update_count(step)
        return with_signals(step) if is_shared(self.mesh) else step

    def lower_train_step(
        self, accumulation: int, batch_size: int, length: int
    ) -> jax.stages.Lowered:
        """Lower the train step for batches [accumulation, batch_size, length]."""
        batch = self.batch_like((accumulation, batch_size, length), TRAIN_AXES) | self.base_like
        if is_shared(self.mesh):
            batch |= {SIGNALS: signals_like(self.mesh)}
        return self.lower_step(self.train_step(), batch)

    def lower_step(self, step: Step, batch: Batch) -> jax.stages.Lowered:
        """Lower a step that donates its state, with compiler settings for the mesh's devices."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_like)
        options = compiler_options(list(self.mesh.devices.flat)) or None
        out = shardings, None
        # Partitionable: random bits depend on an element's index, not on the array's sharding.
        with jax.set_mesh(self.mesh), jax.threefry_partitionable(True):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)
            return jitted.lower(self.state_like, batch)

    def lower_eval_step(self, batch_size: int, length: int) -> jax.stages.Lowered:
        """Lower `sums(params, batch [B, T]) -> LossSums` or `PairSums`."""
        return self.lower_forward(self.loss, self.batch_like((batch_size, length), EVAL_AXES))

    def lower_forward(
        self, forward: Callable[..., Any], batch: dict[str, Any], where: Any = None
    ) -> jax.stages.Lowered:
        """Lower `forward(params, batch)`; `where` is the sharding of the result, or None."""
        options = compiler_options(list(self.mesh.devices.flat)) or None
        with jax.set_mesh(self.mesh):
            return jax.jit(forward, out_shardings=where, compiler_options=options).lower(
                self.state_like.params, batch | self.base_like
            )

    def batch_like(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, Any]:
        """Shapes, dtypes and shardings of a batch."""
        found = {}
        for name, dtype in self.batch_dtypes.items():
            rank = len(shape) - (name in PAIR_DTYPES)
            place = sharding(self.mesh, axes[:rank])
            found[name] = jax.ShapeDtypeStruct(shape[:rank], dtype, sharding=place)
        return found


class Built(NamedTuple):
    """The programs of a run, and the settings that were chosen for them."""

    program: Program
    attention: AttentionChoice
    precision: PrecisionChoice
    mesh: MeshChoice


def build_program(
    model: ModelConfig,
    budget: BudgetOptions,
    hardware: HardwareOptions,
    optimizer: OptimizerOptions,
    regularisation: RegularisationOptions,
    *,
    lora: LoraOptions = NO_LORA,
    length: int,
    schedule: optax.Schedule,
    devices: Sequence[Any],
    machine: Machine | None = None,
) -> Built:
    """Build the programs for resolved options on `devices`, which need not be present.

    Args:
        length: Tokens in a row of a batch.
        devices: Devices of this machine, or of a described topology.
        machine: The machine with the devices; None for this machine.

    Raises:
        UserError: The mesh, batch or precision does not work on these devices, or no file layout
            can describe the model.
    """
    family_of(model)  # raises now if the model could not be written at the end
    device, rest = devices[0], (length, machine or this_machine(), lora, regularisation.sequences)
    mesh = choose_run_mesh(model, budget, hardware, optimizer, *rest)
    platform, capability = device.platform, getattr(device, "compute_capability", "")
    kind, logits = device.device_kind, hardware.logits_dtype
    precision = choose_precision(hardware.mixed_precision, platform, capability, kind, logits)
    attention = choose_attention(
        platform, precision.dtype, model.head_dim, capability, regularisation.dropout
    )
    remat, host_moments = hardware.gradient_checkpointing, hardware.optimizer_memory == "host"
    unroll = unrolls(platform, model.num_layers, remat)
    if host_moments:
        check_offload(optimizer.optimizer, precision.dtype, platform)
    types, axes = base_types(lora, precision.dtype), trained_layout(model, lora).logical_axes
    program = Program(
        model,
        Compute(precision.dtype, attention.backend, remat, precision.fp8, unroll),
        build_optimizer(optimizer, schedule, axes, mup_rates(model, optimizer, axes)),
        optimizer.max_grad_norm,
        build_mesh(mesh.sizes, devices),
        regularisation,
        budget.seed,
        1 if optimizer.on_nonfinite == "halt" else optimizer.max_nonfinite_steps,
        *(host_moments, schedule, lora, types, precision.logits),
    )
    return Built(program, attention, precision, mesh)
