"""Attention inside documents on TPUs: JAX's splash attention with this package's masks.

Documents become segment ids. The kernel computes the causal mask from the queries' positions, so no
mask is in memory. If no query of a block attends to a block of keys, the kernel skips this pair of
blocks. The reference is `attention.attend`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.model.rematerialisation import KERNEL_RESIDUALS

BLOCK = 128  # tokens; the lanes of a TPU, which every block must fill
LARGEST_BLOCK = 512
ANY_KEY = 2**30  # added to a query's position to switch the window off


class SomeWindows(CausalMask):
    """A causal mask with a window that can be switched off for each query at run time.

    To apply the window to a query, pass its position p to the kernel; to ignore the window, pass
    p + `ANY_KEY`. The blocks to skip are chosen earlier, when the kernel is built. So the kernel
    also visits the blocks that the window hides.
    """

    def __init__(self, shape: tuple[int, int], window: int):
        super().__init__(shape)
        self.window = window
        self.mask_function = self._sees

    def _sees(self, queries: Any, keys: Any) -> Any:
        positions = queries % ANY_KEY
        return (positions >= keys) & ((queries >= ANY_KEY) | (positions - keys < self.window))

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.window == getattr(other, "window", None)

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.window))


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    last_BS: Int[Array, "B S"] | None,
    window: int | None,
    has_window: Bool[Array, ""] | None,
    part: Int[Array, ""] | int = 0,
) -> Float[Array, "B T N H"]:
    """Causal softmax attention, scaled by H**-0.5.

    Args:
        last_BS: the last position of each key's document, which serves as its segment id.
        window: length of the sliding window in tokens; None for no window.
        has_window: whether this layer has the window; None if all layers have it.
        part: index of the section of T tokens that has these queries, if the keys have more tokens.
    """
    _, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    queries, keys = _up_to_blocks(T), _up_to_blocks(S)
    kernel = _kernel(N, T, S, queries, keys, window, has_window is not None)
    kernel = jax.tree.map(lambda x: _part(x, part, S // T), kernel)
    if has_window is not None:
        kernel = _limited(kernel, has_window)
    ids = None
    if last_BS is not None:
        own_BT = jax.lax.dynamic_slice_in_dim(last_BS, part * T, T, axis=1)
        ids = SegmentIds(_padded(own_BT, 1, queries), _padded(last_BS, 1, keys))
    q_BNTH = _padded(jnp.swapaxes(q_BTNH * H**-0.5, 1, 2), 2, queries)
    k_BKSH, v_BKSH = (_padded(jnp.swapaxes(x, 1, 2), 2, keys) for x in (k_BSKH, v_BSKH))
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, ids)
    return jnp.swapaxes(out_BNTH[:, :, :T], 1, 2)


def _kernel(
    heads: int, T: int, S: int, queries: int, keys: int, window: int | None, some: bool
) -> Any:
    """Build the kernel for all queries of a sequence; `_part` then selects a section of them."""
    parts = S // T
    shape = (parts * queries, keys)
    mask: Any = CausalMask(shape)
    if window is not None:
        mask = SomeWindows(shape, window) if some else LocalMask(shape, (window - 1, 0), 0)
    # Padding queries get the position of the last real query, so they need no further blocks.
    local = np.minimum(np.arange(queries), T - 1)
    mask.q_sequence = (T * np.arange(parts)[:, None] + local).ravel().astype(np.int32)
    if some and window is not None:  # keep all blocks that a layer without the window needs
        mask.q_sequence += ANY_KEY
    q, k = _block(queries), _block(keys)
    return make_splash_mha(
        MultiHeadMask([mask] * heads),
        block_sizes=BlockSizes(
            block_q=q,
            block_kv=k,
            block_q_dkv=q,
            block_kv_dkv=k,
            block_q_dq=q,
            block_kv_dq=k,
        ),
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=KERNEL_RESIDUALS,
    )


def _part(x: Any, part: Any, parts: int) -> Any:
    """Divide the queries in an array of the kernel into `parts` equal sections; select one.

    Query positions are sliced along their only axis, and arrays of block data along axis 1.
    """
    axis = 0 if x.ndim == 1 else 1
    size = x.shape[axis] // parts
    return x if parts == 1 else jax.lax.dynamic_slice_in_dim(x, part * size, size, axis)


def _limited(kernel: Any, has_window: jax.Array) -> Any:
    """Switch the window of a kernel on if `has_window` is true.

    The kernel is built with the window off: `ANY_KEY` has been added to all query positions.
    Subtracting it switches the window on.
    """
    less = jnp.where(has_window, ANY_KEY, 0)
    return jax.tree.map(lambda x: x - less if x.ndim == 1 else x, kernel)


def _up_to_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def _block(tokens: int) -> int:
    """Return the largest block size that divides `tokens`.

    >>> _block(2048), _block(384), _block(640)
    (512, 384, 128)
    """
    sizes = range(min(tokens, LARGEST_BLOCK), 0, -BLOCK)
    return next(size for size in sizes if tokens % size == 0)


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pad `x` to `size` along `axis` by repeating its last entry."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, mode="edge")
