"""Load a model for scoring: its number type, mesh and batch size."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from consyn_jax.config import ModelConfig
from consyn_jax.distributed.auto_mesh import FITS
from consyn_jax.distributed.mesh import AXES, build_mesh, check_model, parse_mesh
from consyn_jax.inference.model_source import ModelSource
from consyn_jax.model.attention import choose_attention
from consyn_jax.model.parameters import layout
from consyn_jax.scoring.scorer import Scorer
from consyn_jax.training.runtime.memory import device_bytes

WEIGHT_SHARE = 0.6  # share of a device's memory for weights; the rest is for activations and logits


def load_scorer(
    source: ModelSource, dtype: str = "auto", mesh: str = "auto", batch_size: int = 8
) -> Scorer:
    """Load a model onto the devices.

    Args:
        dtype: float32, bfloat16 or float16; "auto" means float32 on a CPU and bfloat16 on a GPU.
        mesh: A value of `--mesh`; "auto" splits the batch over the devices and gives each a copy of
            the weights, or shards the weights if a copy does not fit.
        batch_size: Sequences in a batch, rounded up to a number that the mesh can split evenly.

    Raises:
        UserError: The model is damaged, or the mesh does not suit the model.
    """
    device = jax.devices()[0]
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    sizes = scoring_mesh(source.config, mesh, jnp.dtype(dtype).itemsize)
    built = build_mesh(sizes)
    share = sizes["data"] * sizes["fsdp"]
    capability = getattr(device, "compute_capability", "")
    attention = choose_attention(
        device.platform, jnp.dtype(dtype), source.config.head_dim, capability
    ).backend
    return Scorer(
        source.config,
        source.parameters(built, jnp.dtype(dtype)),
        built,
        jnp.dtype(dtype),
        attention,
        math.ceil(batch_size / share) * share,
    )


def scoring_mesh(config: ModelConfig, text: str, weight_bytes: int) -> dict[str, int]:
    """Choose the size of each mesh axis.

    Args:
        text: Value of `--mesh`.
        weight_bytes: Bytes per parameter.

    Raises:
        UserError: The mesh does not fit the devices or the model.
    """
    count = jax.device_count()
    names = ("hidden_dim", "num_heads", "num_kv_heads", "mlp_dim")
    if text != "auto":
        sizes = parse_mesh(text, count)
    else:
        sizes = dict.fromkeys(AXES, 1) | {"data": count}
        needed = layout(config).num_parameters * weight_bytes
        if count > 1 and needed > WEIGHT_SHARE * FITS * device_bytes():
            tensor = math.gcd(count, *(getattr(config, name) for name in names[1:]))
            sizes |= {"data": 1, "tensor": tensor, "fsdp": count // tensor}
    check_model(sizes, {name: getattr(config, name) for name in names})
    return sizes
