"""Attention inside documents in XLA's operations: the reference for the kernels.

A query attends to the keys of its own document, up to its own position, and within the sliding
window if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Drop = Callable[[jax.Array], jax.Array]  # dropout of attention weights [B, K, N / K, T, S]


class Documents(NamedTuple):
    """For each token, the first and the last position of its document, within the row."""

    first_BT: Int[Array, "B T"]
    last_BT: Int[Array, "B T"]


def documents(segment_ids_BT: Int[Array, "B T"]) -> Documents:
    """Find the documents of each row: a new one starts wherever the segment id changes.

    A segment id that reappears later in the row starts another document.
    """
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
    sliding_window: int | Int[Array, ""] | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Mask that is True where a query attends to a key.

    The key must not come after the query, nor before the query's entry in `first_key_BT`, and must
    be less than `sliding_window` tokens away.
    """
    distance_TS = query_positions[:, None] - key_positions[None, :]
    mask = distance_TS >= 0
    if sliding_window is not None:
        mask &= distance_TS < sliding_window
    if first_key_BT is None:
        return mask[None, None]
    return mask[None, None] & (key_positions >= first_key_BT[:, None, :, None])


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Bool[Array, "#B 1 T S"],
    drop: Drop | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads, scores scaled by H**-0.5, and an explicit mask.

    Tests compare the fused kernels with this function.
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
