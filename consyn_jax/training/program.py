"""The programs of a run, tied to a mesh: shapes and places of the state, the train step and the evaluation step, ready to compile.

Nothing here needs a device: on a mesh of a described topology the same programs compile for machines that are not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from consyn_jax.config import ModelConfig, RegularisationOptions
from consyn_jax.distributed.mesh import sharding
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.parameters import Layout, Params, layout
from consyn_jax.model.transformer import Compute, Decoder
from consyn_jax.training.loss import Extras, LossSums, head_loss, head_objective
from consyn_jax.training.optimizer import place_state
from consyn_jax.training.precision import make_scaled_train_step, with_loss_scale
from consyn_jax.training.step import Batch, Step, TrainState, make_train_step, with_dropout

BATCH_DTYPES = {"input_ids": jnp.int32, "labels": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
TRAIN_AXES = (None, "batch", "sequence")  # [A, B, T]
EVAL_AXES = ("batch", "sequence")  # [B, T]


@dataclass(frozen=True)
class Program:
    """What is trained, how, and where.

    Args:
        optimizer: with its schedule inside.
        max_grad_norm: 0 for no clipping.
        regularisation: of training; evaluation is without.
        seed: of what training draws.
    """

    config: ModelConfig
    compute: Compute
    optimizer: optax.GradientTransformation
    max_grad_norm: float
    mesh: Mesh
    regularisation: RegularisationOptions = field(default_factory=RegularisationOptions)
    seed: int = 0

    @cached_property
    def layout(self) -> Layout:
        """Shapes and logical axes of the parameters."""
        return layout(self.config)

    @cached_property
    def rule(self) -> optax.GradientTransformation:
        """The optimizer, with the scale of the loss around it where the run computes in float16."""
        return with_loss_scale(self.optimizer) if self.compute.dtype == jnp.float16 else self.optimizer

    def loss(self, params: Params, batch: Batch) -> LossSums:
        """Loss sums of one micro-batch [B, T], as evaluation has them."""
        model: Decoder = nnx.merge(self.layout.graphdef, params)
        x_BTD = model.hidden(batch["input_ids"], batch["segment_ids"], self.compute)
        return head_loss(x_BTD, model.head_VD, batch["labels"], batch["loss_mask"], self.config.vocab_size)

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
        return head_objective(x_BTD, model.head_VD, batch["labels"], batch["loss_mask"], self.config.vocab_size, extras)

    @cached_property
    def state_like(self) -> Any:
        """The training state as shapes, dtypes and shardings."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        place = partial(jax.tree.map, lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where))
        shardings = self.layout.shardings(self.mesh)
        opt_state = place_state(jax.eval_shape(self.rule.init, self.layout.shapes), self.layout.shapes, shardings, everywhere)
        step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        return TrainState(step, place(self.layout.shapes, shardings), opt_state)

    def initial_state(self, params: Params) -> TrainState:
        """Step 0 with these parameters, which the state takes over."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_like)
        opt_state = jax.jit(self.rule.init, out_shardings=shardings.opt_state)(params)
        return TrainState(jax.device_put(jnp.int32(0), shardings.step), params, opt_state)

    def lower_train_step(self, accumulation: int, batch_size: int, length: int) -> jax.stages.Lowered:
        """`step(state, batch [A, B, T]) -> (state, metrics)`, the state donated."""
        make = make_scaled_train_step if self.compute.dtype == jnp.float16 else make_train_step
        step: Step = make(self.objective, self.rule, self.max_grad_norm)
        if self.regularisation.dropout:
            step = with_dropout(step, self.seed)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_like)
        batch = self._batch_like((accumulation, batch_size, length), TRAIN_AXES)
        with jax.set_mesh(self.mesh), jax.threefry_partitionable(True):  # draws count by element, wherever it lies
            return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(self.state_like, batch)

    def lower_eval_step(self, batch_size: int, length: int) -> jax.stages.Lowered:
        """`sums(params, batch [B, T]) -> LossSums`."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self.loss).lower(self.state_like.params, self._batch_like((batch_size, length), EVAL_AXES))

    def _batch_like(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, Any]:
        where = sharding(self.mesh, axes)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in BATCH_DTYPES.items()}
