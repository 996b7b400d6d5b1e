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
from consyn_jax.model.fp8.quantisation import Scales
from consyn_jax.model.linear import MlpWeights, add_bias, linear, linear_pair
from consyn_jax.model.matrices.frozen_matrix import over_frozen
from consyn_jax.model.norms import NORMS, Norms, Rotate

Product = Callable[[jax.Array, jax.Array], jax.Array]
Pair = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Stream = Float[Array, "B T D"]


@runtime_checkable
class Matmuls(Protocol):
    """The matmuls of a block, with the norms in front of them."""

    @property
    def rotate(self) -> Rotate:
        """The function that norms and rotates queries or keys, from `Norms`."""

    def linear(self, x_BTD: Stream, w: Any) -> jax.Array:
        """Return the product of attention's output `x` with `w`, the matrix of the projection o."""

    def normed_qkv(
        self, x_BTD: Stream, scale_D: jax.Array, eps: float, weights: tuple[Any, ...]
    ) -> tuple[Stream, tuple[jax.Array, ...]]:
        """Return x, and the products of norm(x) with the matrices of q, k and v."""

    def normed_mlp(
        self, x_BTD: Stream, added_BTD: Stream, mlp: MlpWeights, eps: float
    ) -> tuple[Stream, Stream]:
        """Return y = x + added, and the MLP's output for norm(y) before the bias of `down`."""


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

    @property
    def rotate(self) -> Rotate:
        """The function that norms and rotates queries or keys."""
        return self.norms.rotate

    def linear(self, x_BTD: Stream, w: Any) -> jax.Array:
        """Return the product of attention's output `x` with `w`, the matrix of the projection o."""
        return self.product(x_BTD, w)

    def normed_qkv(
        self, x_BTD: Stream, scale_D: jax.Array, eps: float, weights: tuple[Any, ...]
    ) -> tuple[Stream, tuple[jax.Array, ...]]:
        """Return x, and the products of norm(x) with the matrices of q, k and v."""
        x_BTD, *branches = self.norms.branch(x_BTD, scale_D, eps, len(weights))
        return x_BTD, tuple(self.product(x, w) for x, w in zip(branches, weights, strict=True))

    def normed_mlp(
        self, x_BTD: Stream, added_BTD: Stream, mlp: MlpWeights, eps: float
    ) -> tuple[Stream, Stream]:
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
        return x_BTD, self.product(constrain(hidden_BTF, "batch", "sequence", "mlp"), mlp.down)


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
        return How(self.recast, eps, REFERENCE if self.scales is None else self.writers)

    def linear(self, x_BTD: Stream, w: Any) -> jax.Array:
        """Return the product of attention's output `x` with `w`, the matrix of the projection o."""
        return fp8_linear(x_BTD, w, self.scales, how=self._how())

    def normed_qkv(
        self, x_BTD: Stream, scale_D: jax.Array, eps: float, weights: tuple[Any, ...]
    ) -> tuple[Stream, tuple[jax.Array, ...]]:
        """Return x, and the products of norm(x) with the matrices of q, k and v."""
        return fp8_normed_qkv(x_BTD, scale_D, weights, self.scales, self._how(eps))

    def normed_mlp(
        self, x_BTD: Stream, added_BTD: Stream, mlp: MlpWeights, eps: float
    ) -> tuple[Stream, Stream]:
        """Return y = x + added, and the MLP's output for norm(y) before the bias of `down`."""
        return fp8_normed_mlp(x_BTD, added_BTD, mlp, self.scales, self._how(eps))


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
