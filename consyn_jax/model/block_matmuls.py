"""The matmuls of a block and the norms before them, in 32, 16 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from consyn_jax.distributed.mesh import constrain, mesh_sizes
from consyn_jax.model.fp8.operands import REFERENCE, Writers
from consyn_jax.model.fp8.products import How, fp8_linear, fp8_normed_mlp, fp8_normed_qkv
from consyn_jax.model.fp8.quantisation import Scales, scale_in
from consyn_jax.model.fp8.slots import AttentionCasts, Slot
from consyn_jax.model.linear import (
    MlpWeights,
    QkvWeights,
    add_bias,
    heads_of,
    linear,
    linear_pair,
)
from consyn_jax.model.matrices.frozen_matrix import over_frozen
from consyn_jax.model.norms import NORMS, Norms, Rotate, rotated
from consyn_jax.model.rope import Rope

Product = Callable[[jax.Array, jax.Array], jax.Array]
Pair = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Stream = Float[Array, "B T D"]
Heads = tuple[Any, ...]  # queries, keys, values, and in fp8 `AttentionCasts` or None
Attend = Callable[..., Any]


@runtime_checkable
class Matmuls(Protocol):
    """The matmuls of a block, with the norms in front of them and the rotation of their heads.

    In fp8, the gradients of the outputs that are added to the residual stream pass through slots
    (model/fp8/slots.py). Otherwise there are no slots.
    """

    def attended(self, attend: Attend, heads: Heads, w: Any) -> tuple[Stream, Slot | None]:
        """Return the product of attention's output with `w`, the matrix of the projection o.

        Args:
            heads: Queries, keys and values from `normed_qkv`.
        """

    def normed_qkv(
        self, x_BTD: Stream, slot: Slot | None, qkv: QkvWeights, rope: Rope, eps: float
    ) -> tuple[Stream, Heads]:
        """Return x, and queries, keys and values of norm(x) as attention reads them.

        Args:
            slot: Slot of the matmul whose output was added to x last.
        """

    def normed_mlp(
        self, x_BTD: Stream, added_BTD: Stream, slot: Slot | None, mlp: MlpWeights, eps: float
    ) -> tuple[Stream, Stream, Slot | None]:
        """Return y = x + added, and the MLP's output for norm(y) before the bias of `down`.

        Args:
            slot: Slot of the matmul whose output is `added_BTD`.
        """


@dataclass(frozen=True)
class PlainMatmuls:
    """The matmuls of a block in the dtype of the activations.

    Attributes:
        product: Matmul function, such as `linear`.
        norms: The norm functions, from `attention.Backend.norms`.
        pair: `linear_pair` if one call is faster than two matmuls with trained matrices, else None.
    """

    product: Product = linear
    norms: Norms = NORMS
    pair: Pair | None = None

    def attended(self, attend: Attend, heads: Heads, w: Any) -> tuple[Stream, Slot | None]:
        """Return the product of attention's output with `w`, the matrix of the projection o."""
        return self.product(_in_rows(attend(*heads)), w), None

    def normed_qkv(
        self, x_BTD: Stream, slot: Slot | None, qkv: QkvWeights, rope: Rope, eps: float
    ) -> tuple[Stream, Heads]:
        """Return x, and queries, keys and values of norm(x) as attention reads them."""
        x_BTD, *branches = self.norms.branch(x_BTD, qkv.norm, eps, 3)
        weights = (qkv.q, qkv.q_bias), (qkv.k, qkv.k_bias), (qkv.v, qkv.v_bias)
        q, k, v = (
            heads_of(self.product(x, w), w, bias)
            for x, (w, bias) in zip(branches, weights, strict=True)
        )
        q = rotated(q, qkv.q_norm, rope, eps, "heads", self.norms.rotate)
        k = rotated(k, qkv.k_norm, rope, eps, "kv_heads", self.norms.rotate)
        return x_BTD, (q, k, v)

    def normed_mlp(
        self, x_BTD: Stream, added_BTD: Stream, slot: Slot | None, mlp: MlpWeights, eps: float
    ) -> tuple[Stream, Stream, Slot | None]:
        """Return y = x + added, and the MLP's output for norm(y) before the bias of `down`."""
        pair = self.pair if isinstance(mlp.gate, jax.Array) else None
        uses = 2 if pair is None else 1
        x_BTD, *branches = self.norms.branch(x_BTD, mlp.norm, eps, uses, added_BTD)
        has_biases = mlp.gate_bias is not None and mlp.up_bias is not None
        if pair is None:
            gate_BTF = self.product(branches[0], mlp.gate)
            up_BTF = self.product(branches[1], mlp.up)
            if has_biases:
                gate_BTF, up_BTF = add_bias(gate_BTF, mlp.gate_bias), add_bias(up_BTF, mlp.up_bias)
            hidden_BTF = swiglu(gate_BTF, up_BTF)
        else:
            both_BT2F = pair(branches[0], mlp.gate, mlp.up)
            if has_biases:
                both_BT2F = add_bias(both_BT2F, jnp.stack([mlp.gate_bias, mlp.up_bias]))
            hidden_BTF = swiglu_of_pair(both_BT2F)
        hidden_BTF = constrain(hidden_BTF, "batch", "sequence", "mlp")
        return x_BTD, self.product(hidden_BTF, mlp.down), None


@dataclass(frozen=True)
class EightBitMatmuls:
    """The matmuls of a block in 8-bit floats.

    Attributes:
        rotate: Norms and rotates queries or keys, from `attention.Backend.norms`.
        scales: Scales of the block's arrays; None to compute the scales from the arrays.
        recast: Whether the backward pass casts float32 weights again, as in `linear`.
        writers: Functions that write 8-bit operands, given their scales.
    """

    rotate: Rotate
    scales: Scales | None
    recast: bool
    writers: Writers

    def _how(self, eps: float = 0.0) -> How:
        writers = REFERENCE if self.scales is None else self.writers
        # Where blocks are recomputed, attention's output is kept, but not in 8 bits. Where the
        # sequence is split, the gradient of the values is a sum over devices.
        in_attention = writers.in_attention and self.recast and mesh_sizes()["context"] == 1
        return How(self.recast, eps, writers._replace(in_attention=in_attention), self.rotate)

    def attended(self, attend: Attend, heads: Heads, w: Any) -> tuple[Stream, Slot]:
        """Return the product of attention's output with `w`, the matrix of the projection o."""
        *qkv, casts = heads
        if casts is None:
            return fp8_linear(_in_rows(attend(*qkv)), w, self.scales, how=self._how())
        out, written = attend(*qkv, casts=casts)
        return fp8_linear(_in_rows(out), w, self.scales, how=self._how(), written=written)

    def normed_qkv(
        self, x_BTD: Stream, slot: Slot | None, qkv: QkvWeights, rope: Rope, eps: float
    ) -> tuple[Stream, Heads]:
        """Return x, and queries, keys and values of norm(x) as attention reads them."""
        x_BTD, heads, v_slot = fp8_normed_qkv(x_BTD, slot, qkv, rope, self.scales, self._how(eps))
        if v_slot is None:
            return x_BTD, (*heads, None)
        out_scale = scale_in(self.scales, "o_input")
        assert out_scale is not None, "attention writes 8 bits only with given scales"
        return x_BTD, (*heads, AttentionCasts(out_scale, v_slot))

    def normed_mlp(
        self, x_BTD: Stream, added_BTD: Stream, slot: Slot | None, mlp: MlpWeights, eps: float
    ) -> tuple[Stream, Stream, Slot]:
        """Return y = x + added, and the MLP's output for norm(y) before the bias of `down`."""
        return fp8_normed_mlp(x_BTD, added_BTD, slot, mlp, self.scales, self._how(eps))


def matmuls_of(
    fp8: bool, recast: bool, norms: Norms, writers: Callable[[], Writers]
) -> Callable[[Scales | None], Matmuls]:
    """Return a function that makes the matmuls of a block from the block's scales.

    Only fp8 uses the scales. Two matmuls that read the same norm are computed as one matmul if
    `norms.merges` is true. In fp8 they stay separate, because each matrix has its own scale. They
    also stay separate if fsdp shards weights: the collective of a single matrix's gradient can
    start sooner.
    """
    if fp8:
        return lambda scales: EightBitMatmuls(norms.rotate, scales, recast, writers())
    merges = norms.merges and mesh_sizes()["fsdp"] == 1
    pair = partial(linear_pair, recast=recast) if merges else None
    plain = PlainMatmuls(over_frozen(partial(linear, recast=recast)), norms, pair)
    return lambda scales: plain


def _in_rows(out_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    return out_BTNH.reshape(*out_BTNH.shape[:2], -1)


@jax.checkpoint
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Compute silu(gate) * up (Shazeer, 2020).

    Only `gate` and `up` are saved for the backward pass.
    """
    return jax.nn.silu(gate) * up


@jax.checkpoint
def swiglu_of_pair(both: Float[Array, "*B 2 F"]) -> Float[Array, "*B F"]:
    """Compute `swiglu` of `gate` and `up` that are stacked in one array."""
    return jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
