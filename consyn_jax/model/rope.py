"""Rotary position embedding (Su et al., 2021), in the pair order of Hugging Face's llama.

A model can scale the rotations for a longer context (`RopeScaling`), rotate only a part of each
head, or rotate only in some layers. Elements that are not rotated have a cosine of 1 and a sine of
0, so the same code rotates all models. The scalings follow `modeling_rope_utils.py` of transformers
5.23.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.model_config import ModelConfig, RopeScaling

Rope = tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]  # cosines and sines
Span = int | Int[Array, "B T"]  # a document's length in tokens, or one for each token


def rope_table(positions: Int[Array, "B T"], length: int, head_dim: int, theta: float) -> Rope:
    """Float32 cosines and sines of the rotation angles, for heads in which all elements rotate.

    They are read from a table with a row per position, because XLA on CPUs would otherwise
    recompute a cosine wherever it is used.

    Args:
        length: Number of rows of the table; all positions are below it.
        theta: Base of the rotary embedding.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.cos(angles)[positions][:, :, None], jnp.sin(angles)[positions][:, :, None]


def rope_of(
    config: ModelConfig, positions_BT: Int[Array, "B T"], length: int, span: Span | None = None
) -> Rope:
    """Cosines and sines of the rotary embedding, for the layers that use it.

    Args:
        length: Upper bound of the positions.
        span: Length in tokens of each token's document, by default `length`. Only the scalings
            `dynamic` and `longrope` depend on it.
    """
    c, scaling = config, config.rope_scaling
    if scaling is None and c.rotary_dim == c.head_dim:
        return rope_table(positions_BT, length, c.head_dim, c.rope_theta)
    span = length if span is None else span
    threshold = None if scaling is None else spans_until(config)
    if threshold is None or length <= threshold or (isinstance(span, int) and span <= threshold):
        return _table(config, _frequencies(config, is_long=False), positions_BT, length)
    assert scaling is not None
    if scaling.rope_type == "dynamic":
        return _dynamic(config, positions_BT, span, threshold)
    long = _table(config, _frequencies(config, is_long=True), positions_BT, length)
    if isinstance(span, int):
        return long
    short = _table(config, _frequencies(config, is_long=False), positions_BT, length)
    is_long = (span > threshold)[:, :, None, None]
    return jnp.where(is_long, long[0], short[0]), jnp.where(is_long, long[1], short[1])


def spans_until(config: ModelConfig) -> int | None:
    """Document length in tokens above which the rotations change; None if they never change."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type not in ("dynamic", "longrope"):
        return None
    is_dynamic = scaling.rope_type == "dynamic"
    return config.context if is_dynamic else scaling.original_max_position_embeddings


def rotated_where(rope: Rope, rotates: Bool[Array, ""] | None) -> Rope:
    """Return `rope`, with all angles replaced by 0 if `rotates` is false.

    Args:
        rotates: Whether the layer uses the rotary embedding; None if all layers use it.
    """
    if rotates is None:
        return rope
    return jnp.where(rotates, rope[0], 1.0), jnp.where(rotates, rope[1], 0.0)


def apply_rope(x_BTNH: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of each head, in float32."""
    cos, sin = rope
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def partial_order(config: ModelConfig) -> np.ndarray:
    """Map the elements of a partially rotated head to their indices in the weight file.

    In the file, the first r elements of a head rotate, in pairs (i, i + r/2). In this package pairs
    are (i, i + H/2), and the rotated pairs come first. The same permutation of queries and keys
    does not change attention.
    """
    rotated, half = config.rotary_dim // 2, config.head_dim // 2
    rest = np.arange(2 * rotated, config.head_dim)
    first, second = rest[: half - rotated], rest[half - rotated :]
    return np.concatenate([np.arange(rotated), first, np.arange(rotated, 2 * rotated), second])


# ----------------------------------------------------------------------------------------- scalings


def _table(config: ModelConfig, pairs: np.ndarray, positions: jax.Array, length: int) -> Rope:
    """Read cosines and sines from a table with `length` rows, as `rope_table` does.

    All documents use the same frequencies.

    Args:
        pairs: Frequencies of the rotated pairs, in radians per token.
    """
    frequencies, factors = _whole_head(config, pairs.astype(np.float32))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    cos, sin = (f(angles) * factors for f in (jnp.cos, jnp.sin))
    return cos[positions][:, :, None], sin[positions][:, :, None]


def _whole_head(config: ModelConfig, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequency and attention factor of each pair of a head; 0 and 1 for pairs without rotation."""
    rest = (0, config.head_dim // 2 - pairs.size)
    factors = np.full(pairs.size, attention_factor(config), np.float32)
    return np.pad(pairs, rest), np.pad(factors, rest, constant_values=1)


def _dynamic(config: ModelConfig, positions: jax.Array, span: Span, context: int) -> Rope:
    """Cosines and sines of "NTK-aware" scaling.

    If a document is longer than the context, the base grows with the length of the document.
    """
    scaling, dim = config.rope_scaling, config.rotary_dim
    factor = _known(_known(scaling).factor)
    stretch = factor * jnp.maximum(span, context) / context - (factor - 1)
    base = jnp.asarray(config.rope_theta * stretch ** (dim / (dim - 2)), jnp.float32)
    base = jnp.broadcast_to(base, positions.shape)[:, :, None, None]
    pairs = 1 / base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    rest = ((0, 0), (0, 0), (0, 0), (0, (config.head_dim - dim) // 2))
    angles = positions[:, :, None, None] * jnp.pad(pairs, rest)
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(config: ModelConfig, is_long: bool) -> np.ndarray:
    """Frequency of each rotated pair after scaling, in radians per token, float32.

    The order of operations is the same as in transformers, because a difference in the last bit
    grows with the position.

    Args:
        is_long: Whether the document is longer than `spans_until(config)`.
    """
    plain, scaling = plain_frequencies(config), config.rope_scaling
    if scaling is None:
        return plain
    return SCALINGS[scaling.rope_type](plain, scaling, config, is_long)


def plain_frequencies(config: ModelConfig) -> np.ndarray:
    """Frequency of each rotated pair before scaling, in radians per token, float32."""
    dim = config.rotary_dim
    return 1 / np.float32(config.rope_theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)


def _known(value: Any) -> Any:
    """Return `value`, which is not None because `RopeScaling` has checked it."""
    assert value is not None
    return value


def _linear(plain: np.ndarray, s: RopeScaling, config: ModelConfig, is_long: bool) -> np.ndarray:
    return plain / _known(s.factor)


def _dynamic_short(
    plain: np.ndarray, s: RopeScaling, config: ModelConfig, is_long: bool
) -> np.ndarray:
    """Return unscaled frequencies; `_dynamic` handles documents longer than the context."""
    return plain


def _llama3(plain: np.ndarray, s: RopeScaling, config: ModelConfig, is_long: bool) -> np.ndarray:
    """Divide low frequencies by the factor, keep high ones, and interpolate between them."""
    low, high = _known(s.low_freq_factor), _known(s.high_freq_factor)
    turns = _known(s.original_max_position_embeddings) / (2 * math.pi / plain)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - share) * plain / _known(s.factor) + share * plain


def _yarn(plain: np.ndarray, s: RopeScaling, config: ModelConfig, is_long: bool) -> np.ndarray:
    """Divide low frequencies by the factor and keep high ones (YaRN; Peng et al., 2023).

    Between them, interpolate linearly in the index of the pair.
    """
    dim, original = config.rotary_dim, _known(s.original_max_position_embeddings)
    factor = s.factor or config.context / original

    def pair_that_turns(times: float | int) -> float:
        span = original / (times * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(s.beta_fast or 32), pair_that_turns(s.beta_slow or 1)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pairs = np.arange(dim // 2, dtype=np.float32)
    ramp = 1 - (1 - np.clip((pairs - low) / ((high - low) or 0.001), 0, 1))
    return plain / factor * ramp + plain * (1 - ramp)


def _longrope(plain: np.ndarray, s: RopeScaling, config: ModelConfig, is_long: bool) -> np.ndarray:
    """Divide each frequency by a factor that was found by search (Ding et al., 2024)."""
    factors = np.array(s.long_factor if is_long else s.short_factor, np.float32)
    dim = config.rotary_dim
    powers = np.float32(config.rope_theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    return 1 / (factors * powers)


SCALINGS: dict[str, Callable[[np.ndarray, RopeScaling, ModelConfig, bool], np.ndarray]] = {
    "linear": _linear,
    "dynamic": _dynamic_short,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def attention_factor(config: ModelConfig) -> float:
    """Factor of the cosines and sines; its square multiplies the attention scores."""
    s = config.rope_scaling
    if s is None or s.rope_type not in ("yarn", "longrope"):
        return 1.0
    if s.attention_factor is not None:
        return s.attention_factor
    original = _known(s.original_max_position_embeddings)
    factor = s.factor or config.context / original
    if s.rope_type == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def stretched(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if s.mscale and s.mscale_all_dim:
        return stretched(s.mscale) / stretched(s.mscale_all_dim)
    return stretched(1.0)
