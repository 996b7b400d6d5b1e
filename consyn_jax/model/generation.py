"""Text from a model: a cache of keys and values, filled with the prompt in one pass, then one token a step."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from consyn_jax.config import UserError
from consyn_jax.model.attention import attend, attention_mask
from consyn_jax.model.transformer import rms_norm, rope_table

if TYPE_CHECKING:
    from consyn_jax.model.causal_lm import ConsynLMHeadModel


class Cache(NamedTuple):
    """Keys and values of all positions so far, and how many positions that is."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    length: Int[Array, ""]


def empty_cache(model: ConsynLMHeadModel, batch: int, size: int, dtype: Any = jnp.float32) -> Cache:
    """A cache for `size` positions."""
    c = model.config
    zeros = jnp.zeros((c.num_layers, batch, size, c.num_kv_heads, c.head_dim), dtype)
    return Cache(zeros, zeros, jnp.zeros((), jnp.int32))


def extend(model: ConsynLMHeadModel, input_ids: Int[Array, "B T"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
    """Run the next T tokens through the model: logits after the last of them, and the longer cache."""
    c = model.config
    B, T = input_ids.shape
    positions_T = cache.length + jnp.arange(T)
    rope = rope_table(jnp.broadcast_to(positions_T, (B, T)), cache.k.shape[2], c.head_dim, c.rope_theta)
    mask = attention_mask(positions_T, jnp.arange(cache.k.shape[2]), sliding_window=c.sliding_window)
    graphdef, stacked = nnx.split(model.layers)

    def body(x_BTD: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        layer, k_BSKH, v_BSKH = xs
        written: list[jax.Array] = []

        def attend_to_cache(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            at = (0, cache.length, 0, 0)
            written.extend((jax.lax.dynamic_update_slice(k_BSKH, k, at), jax.lax.dynamic_update_slice(v_BSKH, v, at)))
            return attend(q, written[0], written[1], mask)

        return nnx.merge(graphdef, layer)(x_BTD, rope, attend_to_cache), tuple(written)

    x_BTD, (k, v) = jax.lax.scan(body, model.embed(input_ids, cache.k.dtype), (stacked, cache.k, cache.v))
    last_BD = rms_norm(x_BTD[:, -1], model.norm[...], c.norm_eps)
    logits_BV = jnp.einsum("BD,VD->BV", last_BD, model.head_VD.astype(last_BD.dtype), preferred_element_type=jnp.float32)
    return logits_BV[:, : c.vocab_size], Cache(k, v, cache.length + T)


def choose(logits_BV: Float[Array, "B V"], key: jax.Array, temperature: float, top_k: int | None, top_p: float | None) -> Int[Array, " B"]:
    """One token a row: the likeliest at temperature 0, else drawn from the `top_k` likeliest or the fewest that hold `top_p`."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        logits_BV = jnp.where(logits_BV < jax.lax.top_k(logits_BV, top_k)[0][:, -1:], -jnp.inf, logits_BV)
    if top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1) - jax.nn.softmax(sorted_BV)
        least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 3, 4, 5, 6, 7))
def _decode(
    graphdef: Any, params: Any, prompt: jax.Array, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, eos: int, key: jax.Array
):
    model = nnx.merge(graphdef, params)
    B, T = prompt.shape
    logits, cache = extend(model, prompt, empty_cache(model, B, T + max_new_tokens))
    tokens = jnp.full((B, max_new_tokens), max(eos, 0), jnp.int32)

    def unfinished(carry: Any) -> jax.Array:
        i, _, _, _, done = carry
        return (i < max_new_tokens) & ~jnp.all(done)

    def body(carry: Any) -> Any:
        i, tokens, logits, cache, done = carry
        token = choose(logits, jax.random.fold_in(key, i), temperature, top_k, top_p)
        token = jnp.where(done, max(eos, 0), token)
        logits, cache = extend(model, token[:, None], cache)
        return i + 1, tokens.at[:, i].set(token), logits, cache, done | (token == eos)

    count, tokens, *_ = jax.lax.while_loop(unfinished, body, (jnp.int32(0), tokens, logits, cache, jnp.zeros(B, bool)))
    return tokens, count


def generate(
    model: ConsynLMHeadModel,
    input_ids: Int[Array, "B T"],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_at_eos: bool = True,
) -> Int[Array, "B S"]:
    """The prompt and its continuation, [B, T + n]: n is `max_new_tokens`, or fewer when every row has ended. Ended rows repeat EOS.

    Raises:
        UserError: an empty prompt, or more positions than the model's context.
    """
    T = input_ids.shape[1]
    if T < 1:
        raise UserError("The prompt is empty: start it with the BOS token.")
    if T + max_new_tokens > model.config.context:
        raise UserError(
            f"A prompt of {T} and {max_new_tokens} new tokens are above the model's context of {model.config.context}. "
            f"Ask for {max(model.config.context - T, 0)} at most."
        )
    graphdef, state = nnx.split(model)
    eos = model.config.eos_token_id if stop_at_eos and model.config.eos_token_id is not None else -1
    top_k = None if top_k is None else min(top_k, model.config.vocab_size)
    tokens, count = _decode(
        graphdef, nnx.to_pure_dict(state), jnp.asarray(input_ids, jnp.int32), max_new_tokens, temperature, top_k, top_p, eos, jax.random.key(seed)
    )
    return jnp.concatenate([jnp.asarray(input_ids, jnp.int32), tokens[:, : int(count)]], axis=1)
