"""Causal attention inside documents: the table of backends, and the code that backends share.

A query attends to the keys of its own document, up to its own position, and within the sliding
window if there is one. On a mesh with a `context` axis, each device holds the queries of one
section of the sequence, and gathers the keys and values of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.hardware import runs_triton
from consyn_jax.distributed.mesh import mesh_sizes, on_each_device
from consyn_jax.model.arithmetic import query_blocks
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.fp8.operands import REFERENCE, Writers
from consyn_jax.model.fp8.quantisation import Quantised
from consyn_jax.model.fp8.slots import AttentionCasts, Slot
from consyn_jax.model.kernels.reference_attention import Documents, Drop, attend, attention_mask
from consyn_jax.model.norms import NORMS, Norms, norm_then_rope
from consyn_jax.model.rematerialisation import ATTENTION_OUTPUT, KERNEL_RESIDUALS

NO_WINDOW = 2**30  # a window, in tokens, that is longer than any sequence


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    inside: Documents | None,
    *,
    backend: str,
    sliding_window: int | None = None,
    has_window: Bool[Array, ""] | None = None,
    dropout: Dropout | None = None,
    casts: AttentionCasts | None = None,
) -> Any:
    """Causal self-attention inside documents, on the current mesh if one is set.

    Args:
        inside: The document of each token; None if each row is one document.
        backend: A key of `BACKENDS`.
        sliding_window: Length of the window in tokens; None for no window.
        has_window: Whether this layer uses the window; None if all layers do.
        dropout: Dropout of the attention weights, for backends that support it.
        casts: Places for 8 bits, for backends whose `writers` have `in_attention`.

    Returns:
        The output [B, T, N, H]; with `casts`, also the output in 8 bits and its largest magnitude.
    """
    chosen = BACKENDS[backend]
    assert dropout is None or chosen.drops_weights
    weights, (B, T, N, _) = ("batch", "heads", "sequence", None), q_BTNH.shape
    # Draw the mask of the whole array, to be the same on every mesh; each device takes a slice.
    kept_BNTS = None if dropout is None else dropout.kept((B, N, T, T), weights)
    heads, kv_heads = (("batch", "sequence", name, None) for name in ("heads", "kv_heads"))
    # A device needs `first_BT` only for its own queries, but `last_BT` for all keys.
    spans: Any = ("batch", "sequence"), ("batch", None)
    slot: Any = (*_axes_in_8_bits("kv_heads"), ())
    in_axes: Any = (
        *(heads, kv_heads, kv_heads),
        None if inside is None else Documents(*spans),
        None if kept_BNTS is None else weights,
        None if has_window is None else (),
        None if casts is None else AttentionCasts._make(((), Slot(*slot))),
    )
    arrays: Any = (q_BTNH, k_BTKH, v_BTKH, inside, kept_BNTS, has_window, casts)
    run = partial(_local_attention, backend=chosen, dropout=dropout, sliding_window=sliding_window)
    axes_in_8_bits = None if casts is None else _axes_in_8_bits("heads")
    out_BTNH, written = on_each_device(run, in_axes, (heads, axes_in_8_bits))(*arrays)
    out_BTNH = checkpoint_name(out_BTNH, ATTENTION_OUTPUT)
    if casts is None:
        return out_BTNH
    values, transposed, largest = written
    return out_BTNH, (Quantised(values, transposed, casts.out_scale), jnp.max(largest))


def _axes_in_8_bits(heads: str) -> tuple[Any, ...]:
    """Axes of values [B, T, D], their transpose, and the largest of each head, if D has `heads`."""
    return ("batch", "sequence", heads), (heads, "batch", "sequence"), ("batch", heads)


def _local_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    inside: Documents | None,
    kept_BNTS: jax.Array | None,
    has_window: jax.Array | None,
    casts: AttentionCasts | None,
    *,
    backend: Backend,
    dropout: Dropout | None,
    sliding_window: int | None,
) -> tuple[jax.Array, Any]:
    T = q_BTNH.shape[1]
    part: Any = 0
    if mesh_sizes()["context"] > 1:
        part = jax.lax.axis_index("context")
        k_BSKH, v_BSKH = (
            jax.lax.all_gather(x, axis_name="context", axis=1, tiled=True) for x in (k_BSKH, v_BSKH)
        )
    drop = None if dropout is None else partial(_drop, dropout=dropout, kept_BNTS=kept_BNTS)
    visible = Visible(part, T, k_BSKH.shape[1], inside, sliding_window, has_window)
    if casts is None:
        return backend.attend(q_BTNH, k_BSKH, v_BSKH, visible, drop), None
    # Pallas takes half a second to import
    from consyn_jax.model.kernels.eight_bit.eight_bit_attention import eight_bit_attention

    return eight_bit_attention(q_BTNH, k_BSKH, v_BSKH, *_spans(visible, q_BTNH.shape[0]), *casts)


def _drop(weights_BKGTS: jax.Array, dropout: Dropout, kept_BNTS: Any, start: int = 0) -> jax.Array:
    """Drop weights of the queries from `start` on, and of the keys from the first on."""
    T, S = weights_BKGTS.shape[3:]
    kept_BNTS = kept_BNTS[:, :, start : start + T, :S]
    return dropout.apply(weights_BKGTS, kept_BNTS.reshape(weights_BKGTS.shape))


class Visible(NamedTuple):
    """Positions, documents and window, which determine the keys that each query attends to.

    Attributes:
        part: Index of the part that has the queries, if the sequence is split into parts of `T`
            tokens.
        T: Number of queries.
        S: Number of keys; they cover the whole sequence.
        inside: First position of each query's document, and last position of each key's document.
        sliding_window: Length of the window in tokens; None for no window.
        has_window: Whether this layer uses the window; None if all layers do.
    """

    part: Int[Array, ""] | int
    T: int
    S: int
    inside: Documents | None
    sliding_window: int | None
    has_window: Bool[Array, ""] | None

    @property
    def queries_T(self) -> Int[Array, " T"]:
        """Positions of the queries."""
        return self.part * self.T + jnp.arange(self.T)

    @property
    def keys_S(self) -> Int[Array, " S"]:
        """Positions of the keys."""
        return jnp.arange(self.S)

    @property
    def window(self) -> int | Int[Array, ""] | None:
        """This layer's window in tokens; None if there is none."""
        if self.has_window is None or self.sliding_window is None:
            return self.sliding_window
        return jnp.where(self.has_window, self.sliding_window, NO_WINDOW)


def _masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visible, drop: Any
) -> jax.Array:
    """`attend`; whole sequences in blocks of queries, without the keys after each block."""
    first_BT = None if visible.inside is None else visible.inside.first_BT
    mask = attention_mask(visible.queries_T, visible.keys_S, first_BT, visible.window)
    blocks = query_blocks(visible.T)
    if blocks == 1 or visible.T < visible.S:
        return attend(q_BTNH, k_BSKH, v_BSKH, mask, drop)
    outs, size = [], visible.T // blocks
    for start in range(0, visible.T, size):
        stop = start + size
        keys, seen = (k_BSKH[:, :stop], v_BSKH[:, :stop]), mask[:, :, start:stop, :stop]
        drop_here = None if drop is None else partial(drop, start=start)
        outs.append(attend(q_BTNH[:, start:stop], *keys, seen, drop_here))
    return jnp.concatenate(outs, axis=1)


def _spans(visible: Visible, B: int) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """First key that each query attends to, and last query that attends to each key."""
    queries_T, keys_S = visible.queries_T, visible.keys_S
    inside, window = visible.inside, visible.window
    first_BT, last_BS = (0, keys_S.size - 1) if inside is None else inside
    if window is not None:
        first_BT = jnp.maximum(first_BT, queries_T - window + 1)
        last_BS = jnp.minimum(last_BS, keys_S + window - 1)
    first_BT = jnp.broadcast_to(first_BT, (B, queries_T.size))
    return first_BT, jnp.broadcast_to(last_BS, (B, keys_S.size))


def _kernel_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visible: Visible,
    drop: Drop | None,
    for_hopper: bool = False,
) -> jax.Array:
    spans = _spans(visible, q_BTNH.shape[0])
    given = q_BTNH, k_BSKH, v_BSKH, *spans, visible.queries_T[0]
    # Pallas takes half a second to import, and only GPUs need it
    if for_hopper:
        from consyn_jax.model.kernels.hopper_attention import hopper_attention

        return hopper_attention(*given)
    from consyn_jax.model.kernels.document_attention import document_attention

    return document_attention(*given)


def _splash_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visible, drop: Drop | None
) -> jax.Array:
    # Pallas takes half a second to import
    from consyn_jax.model.kernels.splash import splash_attention

    last_BS = None if visible.inside is None else visible.inside.last_BT
    window = visible.sliding_window, visible.has_window
    return splash_attention(q_BTNH, k_BSKH, v_BSKH, last_BS, *window, visible.part)


# ----------------------------------------------------------------------------------------- backends


def _kernel_obstacle(
    platform: str, dtype: Any, head_dim: int, compute_capability: str, dropout: float
) -> str | None:
    obstacle = None
    if dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"needs bf16 or fp16, and the run computes in {jnp.dtype(dtype).name}"
    elif not runs_triton(platform, compute_capability):
        obstacle = f"needs compute capability 8.0, and this GPU has {compute_capability}"
    elif head_dim > 128 or head_dim % 8:
        obstacle = f"needs a head_dim that is a multiple of 8 and at most 128, not {head_dim}"
    elif dropout:
        obstacle = "cannot draw the same dropout mask on every mesh"
    return obstacle and (
        f"fused attention {obstacle}; plain XLA is slower, "
        "and its memory grows with the square of the sequence length"
    )


def _splash_obstacle(
    platform: str, dtype: Any, head_dim: int, compute_capability: str, dropout: float
) -> str | None:
    if not dropout:
        return None
    return (
        "splash attention has no dropout; plain XLA's memory grows with the square of the "
        "sequence length"
    )


def _kernel_norms(head_dim: int) -> Norms:
    """Return the fused norm kernels.

    Where `head_dim` is not a power of two of at least 16, `norm_then_rope` replaces `norm_rope`.
    """
    from consyn_jax.model.kernels.branched_norm import branched_norm
    from consyn_jax.model.kernels.norm_rope import fits, norm_rope

    return Norms(branched_norm, norm_rope if fits(head_dim) else norm_then_rope, merges=True)


def _kernel_writers(head_dim: int) -> Writers:
    """Return the kernels that write 8-bit operands; XLA rotates heads that `norm_rope` cannot."""
    from consyn_jax.model.kernels.eight_bit.eight_bit_norm import eight_bit_norm
    from consyn_jax.model.kernels.eight_bit.eight_bit_norm_gradients import eight_bit_norm_gradients
    from consyn_jax.model.kernels.eight_bit.eight_bit_norm_rope import eight_bit_rotation_gradients
    from consyn_jax.model.kernels.eight_bit.eight_bit_swiglu import (
        eight_bit_swiglu,
        eight_bit_swiglu_gradients,
    )
    from consyn_jax.model.kernels.norm_rope import fits

    return Writers(
        eight_bit_norm,
        eight_bit_norm_gradients,
        eight_bit_rotation_gradients if fits(head_dim) else REFERENCE.rotation_gradients,
        eight_bit_swiglu,
        eight_bit_swiglu_gradients,
        in_attention=True,
    )


@dataclass(frozen=True)
class Backend:
    """An implementation of attention, and the properties that the rest of the model uses.

    Attributes:
        attend: Computes attention on one device: `attend(q, k, v, visible, drop)`.
        platforms: Platforms that the backend supports, as in `choose_attention`; empty for all.
        obstacle: Returns the reason why the backend cannot run, or None if it can. Takes the
            arguments of `choose_attention`.
        description: Short name of the backend, for the header of a run.
        saved_names: The `checkpoint_name`s of the arrays that the backward pass of attention needs,
            by default its output. Rematerialisation policies that do not recompute attention save
            the arrays with these names.
        norms: Returns the norms that blocks use with this backend, given the width of a head.
        writers: Returns the functions that write 8-bit operands in blocks, for runs in fp8, given
            the width of a head.
        drops_weights: Whether `attend` supports `drop`, the dropout of the attention weights.
        tuned_on: Name and compute capability of the GPUs on which its tiles were chosen.
        capability: Beginning of the compute capabilities that the backend supports; empty for all.
    """

    attend: Callable[..., jax.Array]
    obstacle: Callable[[str, Any, int, str, float], str | None]
    description: str
    saved_names: tuple[str, ...] = (ATTENTION_OUTPUT,)
    norms: Callable[[int], Norms] = lambda head_dim: NORMS
    writers: Callable[[int], Writers] = lambda head_dim: REFERENCE
    drops_weights: bool = False
    platforms: tuple[str, ...] = ()
    tuned_on: tuple[str, str] | None = None
    capability: str = ""

    def described(self, compute_capability: str) -> str:
        """Return the description for the header, which says if tiles were chosen on other GPUs."""
        if self.tuned_on is None or not compute_capability:
            return self.description
        if compute_capability.startswith(self.tuned_on[1]):
            return self.description
        return f"{self.description}, with tiles chosen on {self.tuned_on[0]} and not on this GPU"


FUSED = Backend(
    _kernel_attention,
    _kernel_obstacle,
    "this package's kernel",
    saved_names=(KERNEL_RESIDUALS,),
    norms=_kernel_norms,
    writers=_kernel_writers,
    platforms=("gpu", "cuda"),
    tuned_on=("Hopper", "9."),
)
BACKENDS = {
    "fused": FUSED,
    "hopper": replace(
        FUSED,
        attend=partial(_kernel_attention, for_hopper=True),
        writers=lambda head_dim: _kernel_writers(head_dim)._replace(in_attention=False),
        description="this package's kernel for Hopper",
        tuned_on=None,
        capability="9.",
    ),
    "splash": Backend(
        _splash_attention,
        _splash_obstacle,
        "JAX's splash attention",
        saved_names=(KERNEL_RESIDUALS,),
        platforms=("tpu",),
    ),
    "xla": Backend(_masked_attention, lambda *_: None, "XLA's operations", drops_weights=True),
}
# Fastest first. "hopper" is not among them until a GPU shows its place (benchmarks/attention.py).
CHOSEN = ("fused", "splash", "xla")


class AttentionChoice(NamedTuple):
    """The attention backend that will run, and the reason for the choice."""

    backend: str
    reason: str


def choose_attention(
    platform: str, dtype: Any, head_dim: int, compute_capability: str = "", dropout: float = 0.0
) -> AttentionChoice:
    """Choose the fastest backend that is correct on a device.

    Args:
        platform: "cpu", "gpu", "cuda", "rocm" or "tpu", as in `jax.Device.platform` and
            `jax.default_backend`.
        compute_capability: Compute capability of an NVIDIA GPU, such as "9.0" for Hopper; empty
            for other devices.
        dropout: Fraction of the attention weights that training drops.
    """
    obstacles: list[str] = []
    for name in CHOSEN:
        backend = BACKENDS[name]
        if backend.platforms and platform not in backend.platforms:
            continue
        if not compute_capability.startswith(backend.capability):
            continue
        obstacle = backend.obstacle(platform, dtype, head_dim, compute_capability, dropout)
        if obstacle is None:
            if backend.platforms:
                reason = backend.described(compute_capability)
            else:
                reason = f"the {platform} has no fused kernel"
            return AttentionChoice(name, "; ".join(dict.fromkeys(obstacles)) or reason)
        obstacles.append(obstacle)
    raise AssertionError("the last backend runs everywhere")
