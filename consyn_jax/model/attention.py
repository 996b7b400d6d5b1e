"""Attention: which kernel, which mask, in one place.

All see the same keys: those of a query's own document that do not lie after it, and inside the window if there is one. On a mesh with
a `context` axis each device holds a part of the sequence: it gathers keys and values and keeps its queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.hardware import runs_triton
from consyn_jax.distributed.mesh import mesh_sizes, partition_spec
from consyn_jax.model.dropout import Dropout

Backend = Literal["xla", "fused"]


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel that will run, and why."""

    backend: Backend
    reason: str


def choose_attention(platform: str, dtype: Any, head_dim: int, compute_capability: str = "", dropout: float = 0.0) -> AttentionChoice:
    """The fastest correct kernel for a device: fused ones on NVIDIA from Ampere on, XLA's operations elsewhere.

    Args:
        platform: "cpu", "gpu", "cuda", "rocm" as `jax.Device.platform` and `jax.default_backend` name it.
        compute_capability: "9.0" for Hopper; empty on other platforms.
        dropout: share of the attention weights that training drops.
    """
    if platform not in ("gpu", "cuda"):
        return AttentionChoice("xla", f"the {platform} has no fused kernel")
    if dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"needs bf16 or fp16, and the run computes in {jnp.dtype(dtype).name}"
    elif not runs_triton(platform, compute_capability):
        obstacle = f"needs compute capability 8.0, and this GPU has {compute_capability}"
    elif head_dim > 128 or head_dim % 8:
        obstacle = f"takes heads up to 128 wide in multiples of 8, not {head_dim}"
    elif dropout:
        obstacle = "has no dropout that draws the same on every mesh"
    else:
        return AttentionChoice("fused", "this package's kernel")
    return AttentionChoice("xla", f"fused attention {obstacle}; this is slower, and its memory grows with the square of the sequence")


class Documents(NamedTuple):
    """For each token the first and the last position of its document. An interval, as documents lie in a row one after the other."""

    first_BT: Int[Array, "B T"]
    last_BT: Int[Array, "B T"]


def documents(segment_ids_BT: Int[Array, "B T"]) -> Documents:
    """One begins wherever the segment id changes: an id that comes back is another document."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    changes = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts, ends = (jnp.pad(changes, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1)))
    first_BT = jax.lax.cummax(jnp.where(starts, index_T, 0), axis=1)
    return Documents(first_BT, jax.lax.cummin(jnp.where(ends, index_T, index_T.size), axis=1, reverse=True))


def attention_mask(
    query_positions: Int[Array, " T"],
    key_positions: Int[Array, " S"],
    first_key_BT: Int[Array, "B T"] | None = None,
    sliding_window: int | None = None,
) -> Bool[Array, "B 1 T S"]:
    """True where a query may look: not at later positions, not before `first_key_BT`, not out of the window."""
    distance_TS = query_positions[:, None] - key_positions[None, :]
    mask = distance_TS >= 0
    if sliding_window is not None:
        mask &= distance_TS < sliding_window
    mask = mask[None, None]
    return mask if first_key_BT is None else mask & (key_positions >= first_key_BT[:, None, :, None])


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 T S"],
    drop: Callable[[jax.Array], jax.Array] = lambda weights_BKGTS: weights_BKGTS,
) -> Float[Array, "B T N H"]:
    """Softmax attention, scaled by H**-0.5, grouped heads, under an explicit mask: the backend "xla", and the reference of the others.

    Args:
        drop: dropout of the attention weights [B, K, N / K, T, S].
    """
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
    inside: Documents | None,
    *,
    backend: Backend,
    sliding_window: int | None = None,
    dropout: Dropout | None = None,
) -> Float[Array, "B T N H"]:
    """Causal self-attention inside documents; on the mesh in context if there is one.

    Args:
        inside: the documents; None: each row is one.
        dropout: of the attention weights, with the backend "xla" only.
    """
    assert dropout is None or backend == "xla"
    local = partial(_local_attention, backend=backend, sliding_window=sliding_window, context=mesh_sizes()["context"], dropout=dropout)
    weights = ("batch", "heads", "sequence", None)
    B, T, N, _ = q_BTNH.shape
    # drawn here, where the whole array is in sight, for a device to take its part
    kept_BNTS = None if dropout is None else dropout.kept((B, N, T, T), weights)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q_BTNH, k_BTKH, v_BTKH, inside, kept_BNTS)
    heads, kv_heads = partition_spec(("batch", "sequence", "heads", None)), partition_spec(("batch", "sequence", "kv_heads", None))
    # of its own queries a device needs to know where their documents begin, and of all keys where theirs end
    intervals = None if inside is None else Documents(partition_spec(("batch", "sequence")), partition_spec(("batch", None)))  # type: ignore[arg-type]
    specs = (heads, kv_heads, kv_heads, intervals, partition_spec(weights))
    # check_vma off: the kernel's custom call does not say over which axes its result varies
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(q_BTNH, k_BTKH, v_BTKH, inside, kept_BNTS)


def _local_attention(q_BTNH, k_BSKH, v_BSKH, inside, kept_BNTS, *, backend: Backend, sliding_window: int | None, context: int, dropout: Dropout | None):
    T, first = q_BTNH.shape[1], 0
    if context > 1:
        first = jax.lax.axis_index("context") * T
        k_BSKH, v_BSKH = (jax.lax.all_gather(x, axis_name="context", axis=1, tiled=True) for x in (k_BSKH, v_BSKH))
    queries_T, keys_S = first + jnp.arange(T), jnp.arange(k_BSKH.shape[1])
    if backend == "fused":
        return _inside_documents(q_BTNH, k_BSKH, v_BSKH, inside, queries_T, keys_S, sliding_window)
    mask = attention_mask(queries_T, keys_S, None if inside is None else inside.first_BT, sliding_window)
    if dropout is None:
        return attend(q_BTNH, k_BSKH, v_BSKH, mask)
    B, N, T, S = kept_BNTS.shape
    K = k_BSKH.shape[2]
    return attend(q_BTNH, k_BSKH, v_BSKH, mask, partial(dropout.apply, kept=kept_BNTS.reshape(B, K, N // K, T, S)))


def _inside_documents(q_BTNH, k_BSKH, v_BSKH, inside, queries_T, keys_S, sliding_window: int | None):
    from consyn_jax.model.document_attention import document_attention  # takes half a second to import, and only GPUs use it

    B = q_BTNH.shape[0]
    first_BT, last_BS = (0, keys_S.size - 1) if inside is None else inside
    if sliding_window is not None:
        first_BT, last_BS = jnp.maximum(first_BT, queries_T - sliding_window + 1), jnp.minimum(last_BS, keys_S + sliding_window - 1)
    first_BT, last_BS = jnp.broadcast_to(first_BT, (B, queries_T.size)), jnp.broadcast_to(last_BS, (B, keys_S.size))
    return document_attention(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BS, queries_T[0])
