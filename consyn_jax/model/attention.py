"""Attention: which kernel, which mask, in one place.

Both backends see the same mask: a query sees keys of its own document that do not lie after it, and inside the window if there is
one. On a mesh with a `context` axis each device holds a part of the sequence: it gathers keys and values and keeps its queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.mesh import partition_spec
from consyn_jax.model.dropout import Dropout

Backend = Literal["xla", "cudnn"]


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel that will run, and why."""

    backend: Backend
    reason: str


def choose_attention(platform: str, dtype: Any, head_dim: int, compute_capability: str = "", dropout: float = 0.0) -> AttentionChoice:
    """The fastest correct kernel for a device: cuDNN's fused attention on NVIDIA from Ampere on, XLA's operations elsewhere.

    Args:
        platform: "cpu", "gpu", "cuda", "rocm" as `jax.Device.platform` and `jax.default_backend` name it.
        compute_capability: "9.0" for Hopper; empty on other platforms.
        dropout: share of the attention weights that training drops.
    """
    if platform not in ("gpu", "cuda"):
        return AttentionChoice("xla", f"the {platform} has no fused kernel")
    if dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"needs bf16 or fp16, and the run computes in {jnp.dtype(dtype).name}"
    elif compute_capability and float(compute_capability) < 8.0:
        obstacle = f"needs compute capability 8.0, and this GPU has {compute_capability}"
    elif head_dim > 128 or head_dim % 8:
        obstacle = f"takes heads up to 128 wide in multiples of 8, not {head_dim}"
    elif dropout:
        obstacle = "draws its dropout by the shape of one device's part, so that another mesh would train another model"
    else:
        return AttentionChoice("cudnn", "fused kernel of an NVIDIA GPU")
    return AttentionChoice("xla", f"cuDNN attention {obstacle}; this is slower, and its memory grows with the square of the sequence")


def attention_mask(
    query_positions: Int[Array, " T"],
    key_positions: Int[Array, " S"],
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    sliding_window: int | None = None,
) -> Bool[Array, "B 1 T S"]:
    """True where a query may look: not at later positions, not into another document, not out of the window."""
    distance_TS = query_positions[:, None] - key_positions[None, :]
    mask = distance_TS >= 0
    if sliding_window is not None:
        mask &= distance_TS < sliding_window
    mask = mask[None, None]
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, None, :, None] == key_segments[:, None, None, :])
    return mask


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 T S"],
    backend: Backend,
    drop: Callable[[jax.Array], jax.Array] = lambda weights_BKGTS: weights_BKGTS,
) -> Float[Array, "B T N H"]:
    """Softmax attention, scaled by H**-0.5, grouped heads, under an explicit mask.

    Args:
        drop: dropout of the attention weights [B, K, N / K, T, S]; the fused kernel has none.
    """
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, implementation="cudnn")
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask[:, :, None], scores_BKGTS, -1e30)
    weights_BKGTS = drop(jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype))
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"] | None,
    *,
    backend: Backend,
    sliding_window: int | None = None,
    dropout: Dropout | None = None,
) -> Float[Array, "B T N H"]:
    """Causal self-attention inside documents; on the mesh in context if there is one.

    Args:
        segment_ids_BT: number of the document that each token belongs to; None: each row is one document.
        dropout: of the attention weights, with the backend "xla" only.
    """
    assert dropout is None or backend == "xla"
    mesh = jax.sharding.get_abstract_mesh()
    local = partial(_local_attention, backend=backend, sliding_window=sliding_window, context=0 if mesh.empty else mesh.shape["context"], dropout=dropout)
    weights = ("batch", "heads", "sequence", None)
    B, T, N, _ = q_BTNH.shape
    # drawn here, where the whole array is in sight, for a device to take its part
    kept_BNTS = None if dropout is None else dropout.kept((B, N, T, T), weights)
    if mesh.empty:
        return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, kept_BNTS)
    heads, kv_heads = partition_spec(("batch", "sequence", "heads", None)), partition_spec(("batch", "sequence", "kv_heads", None))
    segments = partition_spec(("batch", "sequence"))
    specs = (heads, kv_heads, kv_heads, segments, partition_spec(weights))
    # check_vma off: cuDNN's custom call does not say over which axes its result varies
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, kept_BNTS)


def _local_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, kept_BNTS, *, backend: Backend, sliding_window: int | None, context: int, dropout: Dropout | None):
    T = q_BTNH.shape[1]
    first, key_segments = 0, segment_ids_BT
    if context > 1:
        first = jax.lax.axis_index("context") * T
        gather = partial(jax.lax.all_gather, axis_name="context", axis=1, tiled=True)
        k_BTKH, v_BTKH = gather(k_BTKH), gather(v_BTKH)
        key_segments = None if segment_ids_BT is None else gather(segment_ids_BT)
    elif segment_ids_BT is None and backend == "cudnn":
        window = None if sliding_window is None else (sliding_window - 1, 0)
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=window, implementation="cudnn")
    mask = attention_mask(first + jnp.arange(T), jnp.arange(k_BTKH.shape[1]), segment_ids_BT, key_segments, sliding_window)
    if dropout is None:
        return attend(q_BTNH, k_BTKH, v_BTKH, mask, backend)
    B, N, T, S = kept_BNTS.shape
    K = k_BTKH.shape[2]
    return attend(q_BTNH, k_BTKH, v_BTKH, mask, backend, partial(dropout.apply, kept=kept_BNTS.reshape(B, K, N // K, T, S)))
