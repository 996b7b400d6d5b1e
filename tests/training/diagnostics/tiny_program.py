"""A tiny program and its states for the tests of this folder."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from consyn_jax.config import RegularisationOptions
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.parameters import Params, initial_parameters, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import resolve
from consyn_jax.training.optim.optimizers import build_optimizer
from consyn_jax.training.program import TRAIN_AXES, Program
from consyn_jax.training.step import TrainState

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=32,
    context=64,
    tie_embeddings=False,
)
A, B, T = 2, 8, 8
RUN, _ = resolve(
    {
        "model": "haiku",
        "max_tokens": T,
        "mesh": "data=2,fsdp=4",
        "optimizer": "sgd",
        "lr": 1.0,
        "momentum": 0,
    }
)
FIRST = cache(lambda: initial_parameters(CONFIG, 0))


def program(dtype: Any = jnp.float32, dropout: float = 0.0, **axes: int) -> Program:
    mesh = build_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: math.prod(axes.values())])
    rule = build_optimizer(RUN.optimizer, optax.constant_schedule(1.0), layout(CONFIG).logical_axes)
    return Program(
        CONFIG, Compute(dtype), rule, 1.0, mesh, RegularisationOptions(dropout=dropout), seed=5
    )


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    return {
        name: jax.device_put(values, sharding(mesh, TRAIN_AXES)) for name, values in batch.items()
    }


def params_with(change: Callable[[Any], None] = lambda params: None) -> Params:
    """Initial values, with a head that is not zero, and a change."""
    params: Any = jax.tree.map(np.array, FIRST())
    params["output"] = (
        np.random.default_rng(1).normal(size=params["output"].shape).astype(np.float32)
    )
    change(params)
    return params


def state_of(p: Program, change: Callable[[Any], None] = lambda params: None) -> TrainState:
    params = jax.tree.map(jax.device_put, params_with(change), p.layout.shardings(p.mesh))
    return p.initial_state(params)
