"""The decoder: pre-norm, RMSNorm, RoPE, SwiGLU, grouped-query attention. One class, four presets.

Parameters carry the logical names of their axes (`distributed/mesh.py` maps them to the mesh). The blocks are stacked along a
leading `layers` axis and run by one `jax.lax.scan`: unrolled where they are few, else a loop, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import Offloadable, Recompute, checkpoint_name
from jaxtyping import Array, Float, Int

from consyn_jax.config import ModelConfig
from consyn_jax.distributed.mesh import constrain, mesh_sizes, partition_spec, split_axes
from consyn_jax.model.attention import Backend, causal_attention, documents
from consyn_jax.model.dropout import ATTENTION, ATTENTION_BRANCH, EMBEDDING, MLP_BRANCH, Dropout, drop_out
from consyn_jax.model.fp8 import fp8_linear
from consyn_jax.model.linear import linear

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Product = Callable[[jax.Array, jax.Array], jax.Array]
Rope = tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]  # cosines and sines
BLOCK_PARTS = ("attention", "MLP", "residual stream")
BLOCK_INPUT = "block input"


@dataclass(frozen=True)
class Compute:
    """How the forward pass runs.

    Attributes:
        remat: what the backward pass recomputes of a block: none: nothing; minimal: all but products and attention; attention: all but the
            attention's output; full: all; offload: as attention, and what is kept lies in the host's memory.
        fp8: the products of the blocks multiply numbers of 8 bits (model/fp8.py).
        unroll: blocks one after the other instead of in a loop: faster, and a program that grows with depth.
    """

    dtype: Any = jnp.float32
    attention: Backend = "xla"
    remat: str = "none"
    fp8: bool = False
    unroll: bool = False


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float | None) -> nnx.Param:
    """A float32 parameter with named axes: normal with deviation `std`, zeros for 0, ones for None."""
    if std is None:
        return nnx.Param(jnp.ones(shape), axes=axes)
    value = std * jax.random.normal(rngs.params(), shape) if std else jnp.zeros(shape)
    return nnx.Param(value, axes=axes)


@partial(jax.checkpoint, static_argnums=2)
@jax.named_scope("norm")
def rms_norm(x: Float[Array, "*B D"], scale_D: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang and Sennrich, 2019).

    Its backward pass starts from `x` again: to keep the float32 values between costs more memory than all else in a block.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps) * scale_D).astype(x.dtype)


@jax.checkpoint
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up (Shazeer, 2020); its backward pass keeps nothing but the two."""
    return jax.nn.silu(gate) * up


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows(table_VD: Float[Array, "V D"], ids: Int[Array, "*B"], dtype: Any) -> Float[Array, "*B D"]:
    """Rows of a float32 table in `dtype`, which is the type they travel in; their gradients are summed in float32."""
    return _rows(table_VD.astype(dtype), ids)


def _rows(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    return constrain(table_VD, "vocab", None)[ids]


def _rows_backward(dtype: Any, kept: Any, dx: jax.Array) -> tuple[jax.Array, None]:
    ids, shape = kept
    local = partial(_sum_rows, shape=shape.shape, sizes=mesh_sizes())
    if not jax.sharding.get_abstract_mesh().empty:  # by hand, since the compiler sums whole tables over all devices before it splits them
        tokens, hidden = partition_spec(("batch", "sequence")), partition_spec(("batch", "sequence", None))
        local = jax.shard_map(local, in_specs=(hidden, tokens), out_specs=partition_spec(("vocab", "embed")), check_vma=False)
    return local(dx, ids), None


def _sum_rows(dx: jax.Array, ids: jax.Array, *, shape: tuple[int, int], sizes: dict[str, int]) -> jax.Array:
    """One device's part of the table's gradient: of all devices' tokens, its rows and columns."""
    token_axes, vocab_axes, embed_axes = split_axes(sizes, "batch", "sequence"), split_axes(sizes, "vocab"), split_axes(sizes, "embed")
    rows = shape[0] // sizes["tensor"]
    at = ids - (jax.lax.axis_index(vocab_axes) * rows if vocab_axes else 0)
    dtable = jnp.zeros((rows, shape[1])).at[jnp.where((at >= 0) & (at < rows), at, rows)].add(dx.astype(jnp.float32), mode="drop")
    if embed_axes:
        dtable = jax.lax.psum_scatter(dtable, embed_axes, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in token_axes if axis not in embed_axes)
    return jax.lax.psum(dtable, rest) if rest else dtable


rows.defvjp(lambda table, ids, dtype: (rows(table, ids, dtype), (ids, jax.ShapeDtypeStruct(table.shape, jnp.float32))), _rows_backward)


def rope_table(positions: Int[Array, "B T"], length: int, head_dim: int, theta: float) -> Rope:
    """Cosine and sine of every rotation angle, float32 (Su et al., 2021), pairs laid out as Hugging Face's llama has them.

    Args:
        length: positions are below it. They are looked up in a table, as XLA on CPUs would compute cosines again for every use of every element.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.cos(angles)[positions][:, :, None], jnp.sin(angles)[positions][:, :, None]


def apply_rope(x_BTNH: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of each head, in float32."""
    cos, sin = rope
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def norm_then_rope(x_BTNH: Float[Array, "B T N H"], scale_H: Float[Array, " H"], rope: Rope, eps: float, heads: str = "heads") -> Float[Array, "B T N H"]:
    """What becomes of queries and keys; the reference of the kernel `norm_rope`, which must know the logical name of the axis N."""
    return apply_rope(rms_norm(x_BTNH, scale_H, eps), rope)


def norm_then_branch(x_BTD: Float[Array, "B T D"], scale_D: Float[Array, " D"], eps: float, uses: int) -> tuple[Float[Array, "B T D"], ...]:
    """x and, for each that reads it, x normed; the reference of the kernel `branched_norm`."""
    return x_BTD, *[rms_norm(x_BTD, scale_D, eps)] * uses


class Norms(NamedTuple):
    """How a block norms: `branch` the residual stream, `rotate` queries and keys."""

    branch: Callable[[jax.Array, jax.Array, float, int], tuple[jax.Array, ...]] = norm_then_branch
    rotate: Callable[[jax.Array, jax.Array, Rope, float, str], jax.Array] = norm_then_rope


NORMS = Norms()


class Block(nnx.Module):
    """One decoder block: attention and SwiGLU, each on a normed input, each added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, N, K, H, F = config.hidden_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.mlp_dim
        residual = (2 * config.num_layers) ** -0.5  # 2L branches add up to the variance of one (GPT-2)
        self.eps = config.norm_eps
        self.attention_norm = parameter(rngs, (D,), ("norm",), None)
        self.q = parameter(rngs, (D, N, H), ("embed", "heads", "head_dim"), D**-0.5)
        self.k = parameter(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        self.v = parameter(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        self.o = parameter(rngs, (N, H, D), ("heads", "head_dim", "embed"), (N * H) ** -0.5 * residual)
        self.q_norm = parameter(rngs, (H,), ("norm",), None) if config.qk_norm else None
        self.k_norm = parameter(rngs, (H,), ("norm",), None) if config.qk_norm else None
        self.mlp_norm = parameter(rngs, (D,), ("norm",), None)
        self.gate = parameter(rngs, (D, F), ("embed", "mlp"), D**-0.5)
        self.up = parameter(rngs, (D, F), ("embed", "mlp"), D**-0.5)
        self.down = parameter(rngs, (F, D), ("mlp", "embed"), F**-0.5 * residual)

    def __call__(self, x_BTD: Float[Array, "B T D"], rope: Rope, attend: Attend, dropout: Dropout | None = None) -> Float[Array, "B T D"]:
        """The block's output; `attend(q, k, v)` is the attention of training or of decoding from a cache."""
        return self.parts(x_BTD, rope, attend, dropout)[-1]

    def parts(
        self, x_BTD: jax.Array, rope: Rope, attend: Attend, dropout: Dropout | None, product: Product = linear, norms: Norms = NORMS
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Both branches and the output, each [B, T, D]: `BLOCK_PARTS`.

        Args:
            product: `linear`, or what stands in for it.
            norms: kernels that stand in for the plain ones.
        """
        with jax.named_scope("attention"):
            x_BTD, *branches = norms.branch(x_BTD, self.attention_norm[...], self.eps, 3)
            attention_BTD = self._attention(branches, rope, attend, product, norms)
            attention_BTD = drop_out(attention_BTD, dropout, ATTENTION_BRANCH)
            x_BTD = x_BTD + attention_BTD
        with jax.named_scope("mlp"):
            x_BTD, to_gate_BTD, to_up_BTD = norms.branch(x_BTD, self.mlp_norm[...], self.eps, 2)
            mlp_BTD = drop_out(self._mlp(to_gate_BTD, to_up_BTD, product), dropout, MLP_BRANCH)
        return attention_BTD, mlp_BTD, x_BTD + mlp_BTD

    def _attention(self, branches: list[jax.Array], rope: Rope, attend: Attend, product: Product, norms: Norms) -> jax.Array:
        B, T, _ = branches[0].shape
        weights = (self.q, self.k, self.v)
        q_BTNH, k_BTKH, v_BTKH = (product(x, w[...]).reshape(B, T, *w.shape[1:]) for x, w in zip(branches, weights, strict=True))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH = norms.rotate(q_BTNH, self.q_norm[...], rope, self.eps, "heads")
            k_BTKH = norms.rotate(k_BTKH, self.k_norm[...], rope, self.eps, "kv_heads")
        else:
            q_BTNH, k_BTKH = apply_rope(q_BTNH, rope), apply_rope(k_BTKH, rope)
        out_BTD = product(attend(q_BTNH, k_BTKH, v_BTKH).reshape(B, T, -1), self.o[...])
        return constrain(out_BTD, "batch", "sequence", None)

    def _mlp(self, to_gate_BTD: jax.Array, to_up_BTD: jax.Array, product: Product) -> jax.Array:
        hidden_BTF = swiglu(product(to_gate_BTD, self.gate[...]), product(to_up_BTD, self.up[...]))
        return constrain(product(constrain(hidden_BTF, "batch", "sequence", "mlp"), self.down[...]), "batch", "sequence", None)


def _is_attention(primitive: Any, parameters: Any) -> bool:
    """Whether it gives attention's output, of a kernel with the sums that its backward pass needs."""
    return primitive.name == "name" and parameters["name"] in ("xla attention", "document attention")


def _keep_products(primitive: Any, *shapes: Any, **parameters: Any) -> bool:
    return _is_attention(primitive, parameters) or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *shapes, **parameters)


def _keep_attention(primitive: Any, *_: Any, **parameters: Any) -> bool:
    return _is_attention(primitive, parameters)


def _keep_on_the_host(primitive: Any, *_: Any, **parameters: Any) -> Any:
    """Attention's output as `_keep_attention` does, and the block's input, which else stays on the device."""
    if _is_attention(primitive, parameters) or (primitive.name == "name" and parameters["name"] == BLOCK_INPUT):
        return Offloadable("device", "pinned_host")
    return Recompute


REMAT_POLICIES: dict[str, Any] = {
    "minimal": _keep_products,
    "attention": _keep_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": _keep_on_the_host,
}


def _norms(compute: Compute, head_dim: int) -> Norms:
    """The kernels where attention has one; heads must be a power of two wide for theirs."""
    if compute.attention != "fused":
        return NORMS
    from consyn_jax.model.branched_norm import branched_norm  # Pallas takes half a second to import, and only GPUs use it
    from consyn_jax.model.norm_rope import norm_rope

    return Norms(branched_norm, norm_rope if head_dim >= 16 and head_dim.bit_count() == 1 else norm_then_rope)


class Decoder(nnx.Module):
    """Token ids to hidden states, and the output embedding that turns those into logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        V, D = config.padded_vocab_size, config.hidden_dim
        self.config = config
        # a tied embedding must not make the first logits large; one of its own is as large as what the blocks add to it
        self.embedding = parameter(rngs, (V, D), ("vocab", "embed"), 0.02 if config.tie_embeddings else 1.0)
        self.layers = nnx.vmap(lambda r: Block(config, r), in_axes=0, out_axes=0)(rngs.split(config.num_layers))
        self.norm = parameter(rngs, (D,), ("norm",), None)
        # zero: the untrained model starts at the uniform distribution exactly
        self.output = None if config.tie_embeddings else parameter(rngs, (V, D), ("vocab", "embed"), 0.0)

    @property
    def head_VD(self) -> jax.Array:
        """The output embedding [V padded, D]: the input embedding where they are tied."""
        return self.embedding[...] if self.output is None else self.output[...]

    @jax.named_scope("embedding")
    def embed(self, input_ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Rows of the embedding table."""
        return constrain(rows(self.embedding[...], input_ids, dtype), "batch", "sequence", None)

    def hidden(
        self, input_ids: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None, compute: Compute, dropout: Dropout | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states after the last norm, in the compute dtype.

        Args:
            dropout: of the embedding, the attention weights and the branches of each block, in training.
        """
        return self.traced(input_ids, segment_ids, compute, dropout, lambda values: None)[0]

    def traced(
        self,
        input_ids: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        compute: Compute,
        dropout: Dropout | None,
        look: Callable[[jax.Array], Any],
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """`hidden`, and what `look` makes of the activations [B, T, D] on the way: of "embedding", and of `BLOCK_PARTS` stacked over the layers."""
        B, T = input_ids.shape
        inside = None if segment_ids is None else documents(segment_ids)
        positions = jnp.broadcast_to(jnp.arange(T) - (0 if inside is None else inside.first_BT), (B, T))
        rope = rope_table(positions, T, self.config.head_dim, self.config.rope_theta)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, dropout: Dropout | None) -> jax.Array:
            window = self.config.sliding_window
            out = causal_attention(q, k, v, inside, backend=compute.attention, sliding_window=window, dropout=dropout)
            return checkpoint_name(out, f"{compute.attention} attention")

        graphdef, stacked = nnx.split(self.layers)
        product = partial(fp8_linear if compute.fp8 else linear, recast=compute.remat == "none")
        norms = _norms(compute, self.config.head_dim)
        numbers_L = None if dropout is None else jnp.arange(1, self.config.num_layers + 1)

        def body(x_BTD: jax.Array, xs: Any) -> tuple[jax.Array, dict[str, Any]]:
            layer, number = xs
            here = None if dropout is None else dropout.at(number)
            weights = None if here is None else here.at(ATTENTION)
            x_BTD = checkpoint_name(x_BTD, BLOCK_INPUT)
            parts = nnx.merge(graphdef, layer).parts(x_BTD, rope, partial(attend, dropout=weights), here, product, norms)
            return parts[-1], dict(zip(BLOCK_PARTS, map(look, parts), strict=True))

        if compute.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)
        unroll = self.config.num_layers if compute.unroll else 1
        x_BTD = drop_out(self.embed(input_ids, compute.dtype), None if dropout is None else dropout.at(0), EMBEDDING)
        seen = {"embedding": look(x_BTD)}
        x_BTD, blocks = jax.lax.scan(body, x_BTD, (stacked, numbers_L), unroll=unroll)
        return rms_norm(x_BTD, self.norm[...], self.config.norm_eps), seen | blocks
