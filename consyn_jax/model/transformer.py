"""The decoder: pre-norm, RMSNorm, RoPE, SwiGLU, grouped-query attention. One class, four presets.

Parameters carry the logical names of their axes (`distributed/mesh.py` maps them to the mesh). The blocks are stacked along a
leading `layers` axis and run by one `jax.lax.scan`, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from consyn_jax.config import ModelConfig
from consyn_jax.distributed.mesh import constrain
from consyn_jax.model.attention import Backend, causal_attention
from consyn_jax.model.linear import linear

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Compute:
    """How the forward pass runs.

    Attributes:
        remat: what the backward pass recomputes: none; attention: all but the attention's output; full: all of a block.
        unroll: blocks one after the other instead of in a loop: faster on CPUs, and a program that grows with depth.
    """

    dtype: Any = jnp.float32
    attention: Backend = "xla"
    remat: str = "none"
    unroll: bool = False


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float | None) -> nnx.Param:
    """A float32 parameter with named axes: normal with deviation `std`, zeros for 0, ones for None."""
    if std is None:
        return nnx.Param(jnp.ones(shape), axes=axes)
    value = std * jax.random.normal(rngs.params(), shape) if std else jnp.zeros(shape)
    return nnx.Param(value, axes=axes)


@partial(jax.checkpoint, static_argnums=2)
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


def segment_positions(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token inside its document: counting starts again wherever the segment id changes."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    starts = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return index_T - jax.lax.cummax(jnp.where(starts, index_T, 0), axis=1)


def rope_table(positions: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Cosine and sine of every rotation angle, float32 (Su et al., 2021), pairs laid out as Hugging Face's llama has them."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: Float[Array, "B T N H"], rope: tuple[jax.Array, jax.Array]) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of each head, in float32."""
    cos, sin = rope
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


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

    def __call__(self, x_BTD: Float[Array, "B T D"], rope: tuple[jax.Array, jax.Array], attend: Attend) -> Float[Array, "B T D"]:
        """The block's output; `attend(q, k, v)` is the attention of training or of decoding from a cache."""
        x_BTD = x_BTD + self._attention(rms_norm(x_BTD, self.attention_norm[...], self.eps), rope, attend)
        return x_BTD + self._mlp(rms_norm(x_BTD, self.mlp_norm[...], self.eps))

    def _attention(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        q_BTNH, k_BTKH, v_BTKH = (_heads(x_BTD, w[...]) for w in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], self.eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm[...], self.eps)
        out_BTNH = attend(apply_rope(q_BTNH, rope), apply_rope(k_BTKH, rope), v_BTKH)
        out_BTD = linear(out_BTNH.reshape(*x_BTD.shape[:2], -1), self.o[...].reshape(-1, x_BTD.shape[-1]))
        return constrain(out_BTD, "batch", "sequence", None)

    def _mlp(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = swiglu(linear(x_BTD, self.gate[...]), linear(x_BTD, self.up[...]))
        return constrain(linear(constrain(hidden_BTF, "batch", "sequence", "mlp"), self.down[...]), "batch", "sequence", None)


def _heads(x_BTD: jax.Array, w_DNH: jax.Array) -> jax.Array:
    """Project to heads [B, T, N, H]."""
    D, N, H = w_DNH.shape
    return linear(x_BTD, w_DNH.reshape(D, N * H)).reshape(*x_BTD.shape[:2], N, H)


def _keep_attention(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Keep what attention gives: cuDNN's kernel with the sums that its backward pass needs, or the named output of the XLA path."""
    return primitive.name == "dot_product_attention_fwd_wrapper" or (primitive.name == "name" and parameters["name"] == "xla attention")


REMAT_POLICIES: dict[str, Any] = {"attention": _keep_attention, "full": jax.checkpoint_policies.nothing_saveable}


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

    def embed(self, input_ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Rows of the embedding table."""
        table_VD = constrain(self.embedding[...].astype(dtype), "vocab", None)
        return constrain(table_VD[input_ids], "batch", "sequence", None)

    def hidden(self, input_ids: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None, compute: Compute) -> Float[Array, "B T D"]:
        """Hidden states after the last norm, in the compute dtype."""
        B, T = input_ids.shape
        positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if segment_ids is None else segment_positions(segment_ids)
        rope = rope_table(positions, self.config.head_dim, self.config.rope_theta)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = causal_attention(q, k, v, segment_ids, backend=compute.attention, sliding_window=self.config.sliding_window)
            return checkpoint_name(out, f"{compute.attention} attention")

        graphdef, stacked = nnx.split(self.layers)

        def body(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer)(x_BTD, rope, attend), None

        if compute.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)
        unroll = self.config.num_layers if compute.unroll else 1
        x_BTD, _ = jax.lax.scan(body, self.embed(input_ids, compute.dtype), stacked, unroll=unroll)
        return rms_norm(x_BTD, self.norm[...], self.config.norm_eps)
