"""Load a model for generation: its devices, its number type and its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from consyn_jax.distributed.auto_mesh import FITS
from consyn_jax.distributed.mesh import AXES, build_mesh, check_model, parse_mesh
from consyn_jax.errors import UserError
from consyn_jax.inference.model_source import ModelSource
from consyn_jax.inference.text_generation.generation_options import GenerateModelOptions
from consyn_jax.model.attention import choose_attention
from consyn_jax.model.generation.draws import Sampling
from consyn_jax.model.generation.engine import Engine
from consyn_jax.model.generation.runtime_weights import Weights, runtime_weights
from consyn_jax.model.parameters import layout
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.runtime.memory import device_bytes

CACHE_SHARE = 0.8  # share of device memory for weights; the rest is for cache and temporaries


class NumberType(NamedTuple):
    """Number type of the matmuls, and whether the blocks' weights are in int8."""

    dtype: Any
    int8: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of each weight in the transformer blocks."""
        return 1 if self.int8 else jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Runtime:
    """A model's weights on their devices, with everything needed to generate text."""

    config: ModelConfig
    weights: Weights
    tokenizer: BPETokenizer
    attention: str
    description: str

    def engine(self, slots: int, sampling: Sampling) -> Engine:
        """Build an engine that generates up to `slots` texts at once."""
        ends: Iterable[int] = self.config.eos_token_ids or (self.tokenizer.eos_token_id,)
        return Engine(
            self.config, self.weights, slots, sampling, attention=self.attention, ends=ends
        )


def load_runtime(
    source: ModelSource, options: GenerateModelOptions, tokenizer: BPETokenizer | None = None
) -> Runtime:
    """Load a model onto the devices.

    Args:
        tokenizer: Tokenizer to use; by default the model's.

    Raises:
        UserError: The model has no tokenizer or is damaged, or the mesh does not suit the model.
    """
    tokenizer = tokenizer or known_tokenizer(source)
    device = jax.devices()[0]
    kind = number_type(options.dtype, device.platform)
    mesh = choose_generation_mesh(source.config, options.mesh, kind.weight_bytes)
    params = source.parameters(mesh, kind.dtype)
    weights = runtime_weights(source.config, params, kind.dtype, kind.int8, consume=True)
    capability = getattr(device, "compute_capability", "")
    attention = choose_attention(
        device.platform, kind.dtype, source.config.head_dim, capability
    ).backend
    count = 1 if mesh is None else mesh.size
    where = f"{count} {device.device_kind} device{'' if count == 1 else 's'}"
    name = jnp.dtype(kind.dtype).name
    text = f"{'int8 weights, ' if kind.int8 else ''}{name} on {where}"
    return Runtime(source.config, weights, tokenizer, attention, text)


def known_tokenizer(source: ModelSource) -> BPETokenizer:
    """Return the tokenizer of a model.

    Raises:
        UserError: The model has no tokenizer.
    """
    if source.tokenizer is None:
        raise UserError(
            f"{source.name} has no tokenizer, so it cannot read or write text. Put the files of "
            "its tokenizer into the model's directory."
        )
    return source.tokenizer


def number_type(name: str, platform: str) -> NumberType:
    """The number type that `--dtype` names on a platform.

    >>> number_type("auto", "cpu").dtype.name, number_type("int8", "gpu")[1]
    ('float32', True)
    """
    plain = "float32" if platform == "cpu" else "bfloat16"
    return NumberType(jnp.dtype(plain if name in ("auto", "int8") else name), name == "int8")


def choose_generation_mesh(config: ModelConfig, text: str, weight_bytes: int) -> Mesh | None:
    """Build the mesh of `--mesh`; None for one device.

    "auto" takes one device if the weights fit. Otherwise the tensor axis, which splits heads and
    feed-forward layers, is as large as possible, and the fsdp axis splits the width over the
    remaining devices.

    Args:
        weight_bytes: Bytes per weight.

    Raises:
        UserError: The mesh does not fit the devices or the model.
    """
    count = jax.device_count()
    dimensions = {
        name: getattr(config, name)
        for name in ("hidden_dim", "num_heads", "num_kv_heads", "mlp_dim")
    }
    if text == "auto":
        needed = layout(config).num_parameters * weight_bytes
        if count == 1 or needed <= CACHE_SHARE * FITS * device_bytes():
            return None
        tensor = math.gcd(count, config.num_heads, config.num_kv_heads, config.mlp_dim)
        sizes = dict.fromkeys(AXES, 1) | {"tensor": tensor, "fsdp": count // tensor}
    else:
        sizes = parse_mesh(text, count)
        if sizes["context"] > 1:
            raise UserError(
                f"--mesh {text} splits sequences (context), but tokens are generated one at a "
                "time. Use the axis tensor or fsdp."
            )
    check_model(sizes, dimensions)
    return build_mesh(sizes) if count > 1 else None
