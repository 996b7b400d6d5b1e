"""The decoder: pre-norm, RMSNorm, RoPE, SwiGLU, grouped-query attention.

Parameters have logical axis names, which `distributed/mesh.py` maps to the mesh. The blocks are
stacked along a leading `layers` axis, and one `jax.lax.scan` runs them. The scan is unrolled if
there are few blocks; otherwise it is a loop, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.mesh import constrain
from consyn_jax.model.attention import BACKENDS, causal_attention
from consyn_jax.model.block_matmuls import Attend, Matmuls, PlainMatmuls, matmuls_of
from consyn_jax.model.dropout import (
    ATTENTION,
    ATTENTION_BRANCH,
    EMBEDDING,
    MLP_BRANCH,
    Dropout,
    drop_out,
)
from consyn_jax.model.embedding import lookup
from consyn_jax.model.fp8.slots import Slot, cast_here, slot_for
from consyn_jax.model.kernels.reference_attention import Documents, documents
from consyn_jax.model.linear import MlpWeights, QkvWeights, add_bias
from consyn_jax.model.norms import rms_norm
from consyn_jax.model.rematerialisation import BLOCK_INPUT, rematerialise
from consyn_jax.model.rope import Rope, rope_of, rotated_where, spans_until
from consyn_jax.model_config import ModelConfig

PLAIN = PlainMatmuls()
BLOCK_PARTS = ("attention", "MLP", "residual stream")


class LayerKinds(NamedTuple):
    """Whether each layer has a sliding window, and whether it applies RoPE.

    A field is None if all layers have the same value.
    """

    has_window_L: Bool[Array, " L"] | None
    rotates_L: Bool[Array, " L"] | None


def layer_kinds(config: ModelConfig) -> LayerKinds:
    """Return the settings of each layer as arrays, so that one loop can run all layers."""
    windows = rotates = None
    if config.window_layers is not None:
        windows = jnp.array(config.window_layers)
    if config.rotary_layers is not None:
        rotates = jnp.array(config.rotary_layers)
    return LayerKinds(windows, rotates)


@dataclass(frozen=True)
class Compute:
    """Settings of the forward pass.

    Attributes:
        dtype: The compute dtype.
        attention: The attention backend, a key of `attention.BACKENDS`.
        remat: Which activations a block's backward pass recomputes. "none": none; "minimal": all
            except matrix products and attention; "attention": all except attention; "full": all;
            "offload": as "attention", with the saved activations in host memory.
        fp8: Whether the matrix products of the blocks use 8-bit floats (model/fp8/).
        unroll: Whether the loop over the blocks is unrolled. This is faster, but the compiled
            program grows with depth.
    """

    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    fp8: bool = False
    unroll: bool = False


class Block(nnx.Module):
    """One decoder block: attention and SwiGLU.

    Each of the two reads the normed residual stream, and its output is added to the stream.

    The parameters are declared in the order in which the forward pass uses them;
    `parameters.forward_order` relies on it.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F = config.hidden_dim, config.mlp_dim
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        residual = (
            2 * config.num_layers
        ) ** -0.5  # the sum of all 2L branches has the variance of one branch (GPT-2)
        self.eps = config.norm_eps
        self.attention_norm = parameter(rngs, (D,), ("norm",), None)
        self.q = parameter(rngs, (D, N, H), ("embed", "heads", "head_dim"), D**-0.5)
        self.q_bias = _bias(rngs, (N, H), ("heads", "head_dim"), config.qkv_bias)
        self.k = parameter(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        self.k_bias = _bias(rngs, (K, H), ("kv_heads", "head_dim"), config.qkv_bias)
        self.v = parameter(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        self.v_bias = _bias(rngs, (K, H), ("kv_heads", "head_dim"), config.qkv_bias)
        self.q_norm = parameter(rngs, (H,), ("norm",), None) if config.qk_norm else None
        self.k_norm = parameter(rngs, (H,), ("norm",), None) if config.qk_norm else None
        self.o = parameter(
            rngs, (N, H, D), ("heads", "head_dim", "embed"), (N * H) ** -0.5 * residual
        )
        self.o_bias = _bias(rngs, (D,), ("norm",), config.output_bias)
        self.mlp_norm = parameter(rngs, (D,), ("norm",), None)
        self.gate = parameter(rngs, (D, F), ("embed", "mlp"), D**-0.5)
        self.gate_bias = _bias(rngs, (F,), ("mlp",), config.mlp_bias)
        self.up = parameter(rngs, (D, F), ("embed", "mlp"), D**-0.5)
        self.up_bias = _bias(rngs, (F,), ("mlp",), config.mlp_bias)
        self.down = parameter(rngs, (F, D), ("mlp", "embed"), F**-0.5 * residual)
        self.down_bias = _bias(rngs, (D,), ("norm",), config.mlp_bias)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        attend: Attend,
        dropout: Dropout | None = None,
    ) -> Float[Array, "B T D"]:
        """Compute the output of the block.

        Args:
            attend: Attention function of q, k and v, for training or for decoding.
        """
        return self.parts(x_BTD, rope, attend, dropout)[0][-1]

    def parts(
        self,
        x_BTD: jax.Array,
        rope: Rope,
        attend: Attend,
        dropout: Dropout | None,
        matmuls: Matmuls = PLAIN,
        slot: Slot | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Slot | None]:
        """Compute the outputs of both branches and of the block, as named in `BLOCK_PARTS`.

        Args:
            matmuls: The matmuls, including the norms before them.
            slot: The slot that the block before returned, in fp8.

        Returns:
            The outputs, and the slot for the gradient of the block's output, in fp8.
        """
        with jax.named_scope("attention"):
            x_BTD, heads = matmuls.normed_qkv(x_BTD, slot, self._qkv, rope, self.eps)
            out_BTD, slot = matmuls.attended(attend, heads, self.o[...])
            attention_BTD, slot = _branch(out_BTD, slot, self.o_bias, dropout, ATTENTION_BRANCH)
        with jax.named_scope("mlp"):
            x_BTD, out_BTD, slot = matmuls.normed_mlp(
                x_BTD, attention_BTD, slot, self._mlp, self.eps
            )
            mlp_BTD, slot = _branch(out_BTD, slot, self.down_bias, dropout, MLP_BRANCH)
        return (attention_BTD, mlp_BTD, x_BTD + mlp_BTD), slot

    @property
    def _qkv(self) -> QkvWeights:
        weights = (p[...] for p in (self.attention_norm, self.q, self.k, self.v))
        others = (self.q_bias, self.k_bias, self.v_bias, self.q_norm, self.k_norm)
        return QkvWeights(*weights, *(None if p is None else p[...] for p in others))

    @property
    def _mlp(self) -> MlpWeights:
        biases = (None if b is None else b[...] for b in (self.gate_bias, self.up_bias))
        weights = (p[...] for p in (self.mlp_norm, self.gate, self.up, self.down))
        return MlpWeights(*weights, *biases)


class Decoder(nnx.Module):
    """Decoder from token ids to hidden states, with the output embedding for the logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        V, D = config.padded_vocab_size, config.hidden_dim
        self.config = config
        # A tied embedding must be small, so that the first logits are small. An untied embedding
        # has the scale of the block outputs that are added to it.
        self.embedding = parameter(
            rngs, (V, D), ("vocab", "embed"), 0.02 if config.tie_embeddings else 1.0
        )
        self.layers = nnx.vmap(lambda r: Block(config, r), in_axes=0, out_axes=0)(
            rngs.split(config.num_layers)
        )
        self.norm = parameter(rngs, (D,), ("norm",), None)
        # zero, so that the untrained model predicts exactly the uniform distribution
        self.output = (
            None if config.tie_embeddings else parameter(rngs, (V, D), ("vocab", "embed"), 0.0)
        )

    @property
    def head_VD(self) -> jax.Array:
        """The output embedding [padded V, D]; with tied embeddings, it is the input embedding."""
        return self.embedding[...] if self.output is None else self.output[...]

    @jax.named_scope("embedding")
    def embed(self, input_ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Look up the embeddings of token ids."""
        return constrain(lookup(self.embedding[...], input_ids, dtype), "batch", "sequence", None)

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        compute: Compute,
        dropout: Dropout | None = None,
        scales: Float[Array, "L arrays"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Compute the hidden states after the final norm, in the compute dtype.

        Args:
            dropout: Dropout of the embedding, of the attention weights and of the branches of each
                block, for training; None for no dropout.
            scales: Scales of each block's 8-bit arrays, for fp8; None to compute the scales from
                the arrays.
        """
        return self.traced(input_ids, segment_ids, compute, dropout, lambda x_BTD: None, scales)[0]

    def traced(
        self,
        input_ids: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        compute: Compute,
        dropout: Dropout | None,
        look: Callable[[jax.Array], Any],
        scales: Float[Array, "L arrays"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Compute `hidden`, and apply `look` to the activations [B, T, D] along the way.

        Returns:
            The hidden states, and the results of `look` by name: "embedding", and the names in
            `BLOCK_PARTS`, stacked over the layers.
        """
        config, backend = self.config, BACKENDS[compute.attention]
        inside = None if segment_ids is None else documents(segment_ids)
        attend = partial(causal_attention, inside=inside, backend=compute.attention)
        rope, kinds = self._rope(input_ids.shape, inside), layer_kinds(config)
        recast, norms = compute.remat == "none", backend.norms(config.head_dim)
        matmuls = matmuls_of(compute.fp8, recast, norms, partial(backend.writers, config.head_dim))
        graphdef, stacked = nnx.split(self.layers)
        numbers_L = None if dropout is None else jnp.arange(1, config.num_layers + 1)

        def body(carry: Any, xs: Any) -> tuple[Any, dict[str, Any]]:
            (x_BTD, slot), (layer, number, kind, scales) = carry, xs
            attend_here = partial(
                attend, sliding_window=config.sliding_window, has_window=kind.has_window_L
            )
            here = None if dropout is None else dropout.at(number)
            x_BTD = checkpoint_name(x_BTD, BLOCK_INPUT)
            parts, slot = nnx.merge(graphdef, layer).parts(
                x_BTD,
                rotated_where(rope, kind.rotates_L),
                partial(attend_here, dropout=None if here is None else here.at(ATTENTION)),
                here,
                matmuls(scales),
                slot,
            )
            return (parts[-1], slot), dict(zip(BLOCK_PARTS, map(look, parts), strict=True))

        body = rematerialise(body, compute.remat, backend.saved_names)
        x_BTD = self.embed(input_ids, compute.dtype)
        x_BTD = drop_out(x_BTD, None if dropout is None else dropout.at(0), EMBEDDING)
        looks = {"embedding": look(x_BTD)}
        unroll, xs = config.num_layers if compute.unroll else 1, (stacked, numbers_L, kinds, scales)
        slot = None if dropout is not None or not compute.fp8 else _first_slot(x_BTD, scales)
        (x_BTD, slot), blocks = jax.lax.scan(body, (x_BTD, slot), xs, unroll=unroll)
        x_BTD = x_BTD if slot is None else cast_here(x_BTD, slot)
        return rms_norm(x_BTD, self.norm[...], config.norm_eps), looks | blocks

    def _rope(self, shape: tuple[int, ...], inside: Documents | None) -> Rope:
        """Cosines and sines for positions that are counted from the start of each document."""
        start_BT: Any = 0 if inside is None else inside.first_BT
        positions_BT = jnp.broadcast_to(jnp.arange(shape[1]) - start_BT, shape)
        span_BT = None
        if inside is not None and spans_until(self.config) is not None:
            span_BT = inside.last_BT - inside.first_BT + 1
        return rope_of(self.config, positions_BT, shape[1], span_BT)


def _bias(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], exists: bool
) -> nnx.Param | None:
    """Create a bias of zeros, or return None if the model has no such bias."""
    return parameter(rngs, shape, axes, 0.0) if exists else None


def _first_slot(x_BTD: jax.Array, scales: jax.Array | None) -> Slot:
    """Return a slot for the first block, like those of the others, which no matmul reads."""
    return slot_for(x_BTD, None if scales is None else jnp.ones((), scales.dtype))


def _branch(
    out_BTD: jax.Array,
    slot: Slot | None,
    bias: nnx.Param | None,
    dropout: Dropout | None,
    place: int,
) -> tuple[jax.Array, Slot | None]:
    """Return what a branch adds to the residual stream, and the slot for the stream's gradient.

    There is no slot after dropout: the gradient of the stream is then another one.
    """
    out_BTD = constrain(out_BTD, "batch", "sequence", None)
    if dropout is not None and slot is not None:
        out_BTD, slot = cast_here(out_BTD, slot), None
    out_BTD = out_BTD if bias is None else add_bias(out_BTD, bias[...])
    return drop_out(out_BTD, dropout, place), slot


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float | None
) -> nnx.Param:
    """Create a float32 parameter with named axes.

    Args:
        axes: Logical name of each axis.
        std: Standard deviation of normally distributed values; 0 gives zeros, None gives ones.
    """
    if std is None:
        return nnx.Param(jnp.ones(shape), axes=axes)
    value = std * jax.random.normal(rngs.params(), shape) if std else jnp.zeros(shape)
    return nnx.Param(value, axes=axes)
