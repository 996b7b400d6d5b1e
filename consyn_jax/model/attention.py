"""Causal attention inside documents: the backends, and the steps that they share.

A query sees the keys of its own document up to its own position, and only those inside the window
if there is one. On a mesh with a `context` axis each device holds a part of the sequence: it
gathers keys and values and keeps its queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.hardware import runs_triton
from consyn_jax.distributed.mesh import mesh_sizes, on_each_device
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.norms import NORMS, Norms, norm_then_rope
from consyn_jax.model.rematerialisation import ATTENTION_OUTPUT, KERNEL_RESIDUALS

Drop = Callable[[jax.Array], jax.Array]  # dropout of attention weights [B, K, N / K, T, S]
Window = int | Int[Array, ""] | None  # tokens; an array if layers differ


class Documents(NamedTuple):
    """First and last position of each token's document; a document is a contiguous interval."""

    first_BT: Int[Array, "B T"]
    last_BT: Int[Array, "B T"]


def documents(segment_ids_BT: Int[Array, "B T"]) -> Documents:
    """Find the documents: one starts wherever the segment id changes, even to an earlier id."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    changes = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts, ends = (
        jnp.pad(changes, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1))
    )
    first_BT = jax.lax.cummax(jnp.where(starts, index_T, 0), axis=1)
    return Documents(
        first_BT, jax.lax.cummin(jnp.where(ends, index_T, index_T.size), axis=1, reverse=True)
    )


def attention_mask(
    query_positions: Int[Array, " T"],
    key_positions: Int[Array, " S"],
    first_key_BT: Int[Array, "B T"] | None = None,
    sliding_window: Window = None,
) -> Bool[Array, "B 1 T S"]:
    """True where a key is not after the query, not before `first_key_BT`, and in the window."""
    distance_TS = query_positions[:, None] - key_positions[None, :]
    mask = distance_TS >= 0
    if sliding_window is not None:
        mask &= distance_TS < sliding_window
    mask = mask[None, None]
    return (
        mask if first_key_BT is None else mask & (key_positions >= first_key_BT[:, None, :, None])
    )


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 T S"],
    drop: Drop | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads, scaled by H**-0.5, under an explicit mask.

    The readable reference for the kernels.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGTS = jnp.where(mask[:, :, None], scores_BKGTS, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    if drop is not None:
        weights_BKGTS = drop(weights_BKGTS)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    inside: Documents | None,
    *,
    backend: str,
    sliding_window: Window = None,
    dropout: Dropout | None = None,
) -> Float[Array, "B T N H"]:
    """Causal self-attention inside documents, on the mesh in context if there is one.

    Args:
        inside: The documents; None if each row is one.
        backend: A key of `BACKENDS`.
        sliding_window: In tokens, as an array if layers differ in it; None for no window.
        dropout: Dropout of the attention weights, for backends that support it.
    """
    chosen = BACKENDS[backend]
    assert dropout is None or chosen.drops_weights
    weights = ("batch", "heads", "sequence", None)
    B, T, N, _ = q_BTNH.shape
    # drawn for the whole array, so that every mesh draws the same; each device takes its part
    kept_BNTS = None if dropout is None else dropout.kept((B, N, T, T), weights)
    heads, kv_heads = (("batch", "sequence", name, None) for name in ("heads", "kv_heads"))
    # a device needs the first positions for its own queries, the last ones for all keys
    spans: Any = ("batch", "sequence"), ("batch", None)
    in_axes: Any = (
        *(heads, kv_heads, kv_heads),
        None if inside is None else Documents(*spans),
        weights,
    )
    arrays: Any = (q_BTNH, k_BTKH, v_BTKH, inside, kept_BNTS)
    run = partial(_local_attention, backend=chosen, dropout=dropout)
    if isinstance(sliding_window, jax.Array):
        arrays, in_axes = (*arrays, sliding_window), (*in_axes, ())
    else:
        run = partial(run, window=sliding_window)
    local = on_each_device(run, in_axes, heads)
    return checkpoint_name(local(*arrays), ATTENTION_OUTPUT)


def _local_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    inside: Documents | None,
    kept_BNTS: jax.Array | None,
    window: Window = None,
    *,
    backend: Backend,
    dropout: Dropout | None,
) -> jax.Array:
    T = q_BTNH.shape[1]
    first: Any = 0
    if mesh_sizes()["context"] > 1:
        first = jax.lax.axis_index("context") * T
        k_BSKH, v_BSKH = (
            jax.lax.all_gather(x, axis_name="context", axis=1, tiled=True) for x in (k_BSKH, v_BSKH)
        )
    drop = None
    if dropout is not None:
        drop = partial(_drop, dropout=dropout, kept_BNTS=kept_BNTS)
    queries_T, keys_S = first + jnp.arange(T), jnp.arange(k_BSKH.shape[1])
    return backend.attend(q_BTNH, k_BSKH, v_BSKH, Visible(queries_T, keys_S, inside, window), drop)


def _drop(weights_BKGTS: jax.Array, dropout: Dropout, kept_BNTS: Any) -> jax.Array:
    return dropout.apply(weights_BKGTS, kept_BNTS.reshape(weights_BKGTS.shape))


class Visible(NamedTuple):
    """Positions, documents and window, which decide the keys that a query sees."""

    queries_T: Int[Array, " T"]  # positions
    keys_S: Int[Array, " S"]
    inside: Documents | None
    window: Window


def _masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visible, drop: Drop | None
) -> jax.Array:
    queries_T, keys_S, inside, window = visible
    mask = attention_mask(queries_T, keys_S, None if inside is None else inside.first_BT, window)
    return attend(q_BTNH, k_BSKH, v_BSKH, mask, drop)


def _kernel_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visible, drop: Drop | None
) -> jax.Array:
    # Pallas takes half a second to import, and only GPUs need it
    from consyn_jax.model.kernels.document_attention import document_attention

    queries_T, keys_S, inside, window = visible
    B = q_BTNH.shape[0]
    first_BT, last_BS = (0, keys_S.size - 1) if inside is None else inside
    if window is not None:
        first_BT = jnp.maximum(first_BT, queries_T - window + 1)
        last_BS = jnp.minimum(last_BS, keys_S + window - 1)
    first_BT = jnp.broadcast_to(first_BT, (B, queries_T.size))
    last_BS = jnp.broadcast_to(last_BS, (B, keys_S.size))
    return document_attention(q_BTNH, k_BSKH, v_BSKH, first_BT, last_BS, queries_T[0])


# ----------------------------------------------------------------------------------------- backends


def _kernel_obstacle(
    platform: str, dtype: Any, head_dim: int, compute_capability: str, dropout: float
) -> str | None:
    obstacle = None
    if platform not in ("gpu", "cuda"):
        return f"the {platform} has no fused kernel"
    if dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"needs bf16 or fp16, and the run computes in {jnp.dtype(dtype).name}"
    elif not runs_triton(platform, compute_capability):
        obstacle = f"needs compute capability 8.0, and this GPU has {compute_capability}"
    elif head_dim > 128 or head_dim % 8:
        obstacle = f"takes heads up to 128 wide in multiples of 8, not {head_dim}"
    elif dropout:
        obstacle = "has no dropout that draws the same on every mesh"
    return obstacle and (
        f"fused attention {obstacle}; plain XLA is slower, "
        "and its memory grows with the square of the sequence"
    )


def _kernel_norms(head_dim: int) -> Norms:
    """Norm kernels; the one for heads needs a width that is a power of two, at least 16."""
    from consyn_jax.model.kernels.branched_norm import branched_norm
    from consyn_jax.model.kernels.norm_rope import norm_rope

    fits = head_dim >= 16 and head_dim.bit_count() == 1
    return Norms(branched_norm, norm_rope if fits else norm_then_rope, merges=True)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention, with everything that the rest of the model asks about it.

    Attributes:
        attend: `attend(q, k, v, visible, drop)` on one device.
        obstacle: Takes the arguments of `choose_attention`; returns why it cannot run, or None.
        description: A few words for the header of a run.
        saved_names: `checkpoint_name`s of what its backward pass needs. Rematerialisation policies
            that keep attention save these; by default that is its output.
        norms: Takes the width of a head; returns the norms that blocks use with this backend.
        drops_weights: Whether `attend` applies `drop`.
    """

    attend: Callable[..., jax.Array]
    obstacle: Callable[[str, Any, int, str, float], str | None]
    description: str
    saved_names: tuple[str, ...] = (ATTENTION_OUTPUT,)
    norms: Callable[[int], Norms] = lambda head_dim: NORMS
    drops_weights: bool = False


# The first one without an obstacle is used.
BACKENDS = {
    "fused": Backend(
        _kernel_attention,
        _kernel_obstacle,
        "this package's kernel",
        saved_names=(KERNEL_RESIDUALS,),
        norms=_kernel_norms,
    ),
    "xla": Backend(_masked_attention, lambda *_: None, "XLA's operations", drops_weights=True),
}


class AttentionChoice(NamedTuple):
    """The backend that will run, and why."""

    backend: str
    reason: str


def choose_attention(
    platform: str, dtype: Any, head_dim: int, compute_capability: str = "", dropout: float = 0.0
) -> AttentionChoice:
    """Choose the fastest backend that is correct on a device.

    Args:
        platform: "cpu", "gpu", "cuda" or "rocm", as in `jax.Device.platform` and
            `jax.default_backend`.
        compute_capability: "9.0" for Hopper; empty on other platforms.
        dropout: Share of the attention weights that training drops.
    """
    obstacles: list[str] = []
    for name, backend in BACKENDS.items():
        obstacle = backend.obstacle(platform, dtype, head_dim, compute_capability, dropout)
        if obstacle is None:
            return AttentionChoice(name, "; ".join(obstacles) or backend.description)
        obstacles.append(obstacle)
    raise AssertionError("the last backend runs everywhere")
