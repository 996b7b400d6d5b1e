"""The two compiled programs of generation: prefill and decode.

Prefill puts prompts into slots; decode adds tokens to all slots. Each slot has its own position,
and its queries attend to the cache up to this position. Both programs choose the next token on the
device, so one call of decode can add many tokens.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from consyn_jax.distributed.mesh import RULES
from consyn_jax.model.attention import causal_attention
from consyn_jax.model.block_matmuls import PlainMatmuls
from consyn_jax.model.embedding import lookup
from consyn_jax.model.generation.draws import Filters, FilterValues, draw, filtered, row_keys
from consyn_jax.model.generation.runtime_weights import Weights, product
from consyn_jax.model.norms import rms_norm
from consyn_jax.model.rope import Rope, rope_of, rotated_where, spans_until
from consyn_jax.model.transformer import Attend, Block
from consyn_jax.model_config import ModelConfig

CHUNK = 64  # tokens that one call of `decode` adds to each slot at most
UNROLLED_ROWS = 16  # up to this many rows, each row is written to the cache separately


class Plan(NamedTuple):
    """Static arguments of the compiled programs, which are compiled anew for each plan."""

    config: ModelConfig
    filters: Filters
    ends: tuple[int, ...]
    attention: str  # backend of prefill, a key of `attention.BACKENDS`
    mesh: Mesh | None


class Slots(NamedTuple):
    """The state of all slots, on the device.

    Attributes:
        k, v: The KV cache, one array [B, K, S, H] per layer.
        token_B: The newest token of each text. Its keys and values are not in the cache yet.
        position_B: Position of `token_B` in the text.
        active_B: Whether the slot adds tokens; False if it is empty or its text has ended.
        index_B: Number of new tokens so far.
        limit_B: Number of new tokens at which the slot stops.
        long_B: Row of the tables of `rotations`: 1 for texts longer than `spans_until(config)`,
            otherwise 0.
        keys_B2: Random key from which the slot's tokens are drawn.
        seen_BV: True for tokens that occur in the text; None unless repetition is penalised.
    """

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]
    token_B: Int[Array, " B"]
    position_B: Int[Array, " B"]
    active_B: Bool[Array, " B"]
    index_B: Int[Array, " B"]
    limit_B: Int[Array, " B"]
    long_B: Int[Array, " B"]
    keys_B2: UInt32[Array, "B 2"]
    seen_BV: Bool[Array, "B V"] | None


class Prompts(NamedTuple):
    """Prompts for `prefill`, one per row.

    In a padding row, `slot_P` equals the number of slots. No slot has this index, so the results of
    the row are dropped.

    Attributes:
        ids_PT: Token ids, padded at the end.
        length_P: Number of ids without padding.
        slot_P: Index of the slot to fill.
        index_P, limit_P, long_P: As in `Slots`.
        prompt_P: Index of the prompt, for the row's random key.
        sequence_P: Index of this continuation of the prompt, for the row's random key.
    """

    ids_PT: Any
    length_P: Any
    slot_P: Any
    index_P: Any
    limit_P: Any
    long_P: Any
    prompt_P: Any
    sequence_P: Any


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_slots(plan: Plan, count: int, size: int, dtype: Any) -> Slots:
    """Create `count` empty slots, each with a KV cache for `size` positions."""
    c = plan.config

    def zeros(kind: Any, *shape: int) -> jax.Array:
        return jnp.zeros((count, *shape), kind)

    def caches() -> tuple[jax.Array, ...]:
        return tuple(
            spread(plan.mesh, zeros(dtype, c.num_kv_heads, size, c.head_dim), "batch", "kv_heads")
            for _ in range(c.num_layers)
        )

    seen = zeros(bool, c.vocab_size) if plan.filters.penalises else None
    zero, no = zeros(jnp.int32), zeros(bool)
    return Slots(caches(), caches(), zero, zero, no, zero, zero, zero, zeros(jnp.uint32, 2), seen)


def spread(mesh: Mesh | None, x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Shard an array over the mesh along dimensions that divide evenly, and replicate the rest."""
    if mesh is None:
        return x
    names = []
    for logical, size in zip(logical_axes, x.shape, strict=False):
        axes = RULES[logical]
        parts = 1
        for axis in axes:
            parts *= mesh.shape[axis]
        names.append(axes if axes and size % parts == 0 else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*names)))


@partial(jax.jit, static_argnums=(0, 1))
def rotations(config: ModelConfig, size: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding, each [X, S, h].

    X is 2 if texts longer than `spans_until(config)` have other angles, otherwise 1. Row 1 has the
    angles of these longer texts.
    """
    limit, positions = spans_until(config), jnp.arange(size)[None]
    spans = [size] if limit is None or size <= limit else [limit, limit + 1]
    tables = [rope_of(config, positions, size, span) for span in spans]
    cosines, sines = (jnp.stack([table[i][0, :, 0] for table in tables]) for i in (0, 1))
    return cosines, sines


@cache
def _block(config: ModelConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))[0]


def _logits(config: ModelConfig, weights: Weights, x_BD: jax.Array) -> jax.Array:
    """Float32 logits [B, V] over the vocabulary without its padding."""
    x_BD = rms_norm(x_BD, weights["norm"], config.norm_eps)
    head_VD = weights.get("output", weights["embedding"])
    logits_BV = jnp.einsum("BD,VD->BV", x_BD, head_VD, preferred_element_type=jnp.float32)
    return logits_BV[:, : config.vocab_size]


def _hidden(
    config: ModelConfig, weights: Weights, ids_BT: jax.Array, rope: Rope, attends: list[Attend]
) -> jax.Array:
    """Hidden states [B, T, D] before the final norm.

    Args:
        attends: The attention function of each layer.
    """
    x_BTD = lookup(weights["embedding"], ids_BT, weights["embedding"].dtype)
    rotates = config.rotary_layers or (True,) * config.num_layers
    still, matmuls = rotated_where(rope, jnp.array(False)), PlainMatmuls(product)
    for layer, attend, turns in zip(weights["layers"], attends, rotates, strict=True):
        block: Block = nnx.merge(_block(config), layer)
        x_BTD = block.parts(x_BTD, rope if turns else still, attend, None, matmuls)[0][-1]
    return x_BTD


# ------------------------------------------------------------------------------------------ prefill


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def prefill(
    plan: Plan,
    weights: Weights,
    tables: Any,
    slots: Slots,
    prompts: Prompts,
    base: Any,
    values: Any,
) -> tuple[Slots, Int[Array, " P"]]:
    """Run the prompts through the model, fill their slots, and choose a first token for each.

    Returns:
        The updated slots, and the first new token of each row.
    """
    c, p = plan.config, prompts
    P, T = p.ids_PT.shape
    rope = tuple(table[p.long_P, :T, None] for table in tables)
    written: list[tuple[jax.Array, jax.Array]] = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        written.append((k, v))
        return causal_attention(q, k, v, None, backend=plan.attention, sliding_window=window)

    attends: Any = [partial(attend, window=window) for window in c.windows]
    x_PTD = _hidden(c, weights, p.ids_PT, rope, attends)
    logits_PV = _logits(c, weights, x_PTD[jnp.arange(P), p.length_P - 1])
    keys_P2, seen_PV = row_keys(base, p.prompt_P, p.sequence_P), None
    if plan.filters.penalises:
        real_PT = jnp.arange(T) < p.length_P[:, None]
        seen_PV = jnp.zeros((P, c.vocab_size), bool)
        seen_PV = seen_PV.at[jnp.arange(P)[:, None], p.ids_PT].max(real_PT)
    token_P, seen_PV = _next(plan, logits_PV, keys_P2, p.index_P, values, seen_PV)
    active_P = ~_ends(plan, token_P) & (p.index_P + 1 < p.limit_P)
    new = (token_P, p.length_P, active_P, p.index_P + 1, p.limit_P, p.long_P, keys_P2, seen_PV)
    kept: Any = [
        old if old is None else _whole(plan, old.at[p.slot_P].set(part, mode="drop"))
        for old, part in zip(slots[2:], new, strict=True)
    ]

    def put(old_BKSH: jax.Array, new_PTKH: jax.Array) -> jax.Array:
        new_PKTH = jnp.swapaxes(new_PTKH, 1, 2)
        put_BKSH = old_BKSH.at[p.slot_P, :, :T].set(new_PKTH, mode="drop")
        return spread(plan.mesh, put_BKSH, "batch", "kv_heads")

    k = tuple(put(old, new) for old, (new, _) in zip(slots.k, written, strict=True))
    v = tuple(put(old, new) for old, (_, new) in zip(slots.v, written, strict=True))
    return Slots(k, v, *kept), _whole(plan, token_P)


def _next(
    plan: Plan, logits: jax.Array, keys: jax.Array, index: jax.Array, values: Any, seen: Any
) -> tuple[jax.Array, Any]:
    """Choose each row's next token; return it, and `seen` with that token added."""
    token_B = draw(filtered(logits, plan.filters, values, seen), keys, index, plan.filters)
    if seen is not None:
        seen = seen.at[jnp.arange(token_B.size), token_B].set(True)
    return token_B, seen


def _ends(plan: Plan, token_B: jax.Array) -> jax.Array:
    found = jnp.zeros(token_B.shape, bool)
    for end in plan.ends:
        found |= token_B == end
    return found


def _whole(plan: Plan, x: jax.Array) -> jax.Array:
    """Replicate `x` on all devices of the mesh, so that every process can read it."""
    return spread(plan.mesh, x)


# ------------------------------------------------------------------------------------------- decode


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(
    plan: Plan,
    weights: Weights,
    tables: Any,
    slots: Slots,
    running_B: Any,
    steps: Any,
    enough: Any,
    values: FilterValues,
) -> tuple[Slots, Int[Array, "C B"], Int[Array, ""]]:
    """Add up to `steps` tokens to each active slot; stop when fewer than `enough` are active.

    Args:
        tables: Rotation tables (`rotations`).
        running_B: True for slots to continue; the others become inactive.
        steps: Number of decoding steps, at most `CHUNK`.
        enough: Number of active slots that are needed for another step.
        values: The values of the active filters.

    Returns:
        The updated slots; the token of each step and slot, or -1 where the slot was inactive; and
        the number of steps that were run.
    """
    slots = slots._replace(active_B=slots.active_B & running_B)
    tokens_CB = jnp.full((CHUNK, slots.token_B.size), -1, jnp.int32)

    def goes_on(carry: Any) -> jax.Array:
        step, slots, _ = carry
        return (step < steps) & (jnp.sum(slots.active_B) >= enough)

    def body(carry: Any) -> Any:
        step, slots, tokens_CB = carry
        active_B = slots.active_B
        slots = _step(plan, weights, tables, slots, values)
        new_B = jnp.where(active_B, slots.token_B, -1)
        tokens_CB = jax.lax.dynamic_update_slice(tokens_CB, new_B[None], (step, 0))
        return step + 1, slots, tokens_CB

    count, slots, tokens_CB = jax.lax.while_loop(goes_on, body, (jnp.int32(0), slots, tokens_CB))
    return slots, _whole(plan, tokens_CB), _whole(plan, count)


def _step(plan: Plan, weights: Weights, tables: Any, slots: Slots, values: Any) -> Slots:
    """Run one decoding step, which adds a token to each active slot."""
    c, s = plan.config, slots
    rope = tuple(table[s.long_B, s.position_B][:, None, None] for table in tables)
    written: list[tuple[jax.Array, jax.Array]] = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, number: int) -> jax.Array:
        k_BKSH = write_token(plan, s.k[number], k[:, 0], s.position_B)
        v_BKSH = write_token(plan, s.v[number], v[:, 0], s.position_B)
        written.append((k_BKSH, v_BKSH))
        return attend_to_cache(q, k_BKSH, v_BKSH, s.position_B, c.windows[number])

    attends: Any = [partial(attend, number=number) for number in range(c.num_layers)]
    x_B1D = _hidden(c, weights, s.token_B[:, None], rope, attends)
    logits_BV = _logits(c, weights, x_B1D[:, 0])
    token_B, seen_BV = _next(plan, logits_BV, s.keys_B2, s.index_B, values, s.seen_BV)
    token_B = jnp.where(s.active_B, token_B, s.token_B)
    index_B = s.index_B + s.active_B
    return s._replace(
        k=tuple(k for k, _ in written),
        v=tuple(v for _, v in written),
        token_B=_whole(plan, token_B),
        position_B=s.position_B + s.active_B,
        active_B=s.active_B & ~_ends(plan, token_B) & (index_B < s.limit_B),
        index_B=index_B,
        seen_BV=seen_BV,
    )


def write_token(
    plan: Plan, cache_BKSH: jax.Array, new_BKH: jax.Array, position_B: jax.Array
) -> jax.Array:
    """Write the new key or value vectors of each row into the cache at the row's position."""
    B = position_B.size
    if plan.mesh is None and B <= UNROLLED_ROWS:  # a scatter is slower on CPUs
        for row in range(B):
            at = (row, 0, position_B[row], 0)
            cache_BKSH = jax.lax.dynamic_update_slice(cache_BKSH, new_BKH[row, None, :, None], at)
        return cache_BKSH
    new_BK1H = new_BKH[:, :, None]
    updated = jax.vmap(lambda c, n, at: jax.lax.dynamic_update_slice(c, n, (0, at, 0)))(
        cache_BKSH, new_BK1H, position_B
    )
    return spread(plan.mesh, updated, "batch", "kv_heads")


def attend_to_cache(
    q_B1NH: Float[Array, "B 1 N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    position_B: Int[Array, " B"],
    window: int | None,
) -> Float[Array, "B 1 N H"]:
    """Attention of one query per row to the cached keys, up to the query's position.

    It computes the same as `attention.attend`, but reads the cache in its layout, with heads before
    positions, so that no array has to be transposed.
    """
    B, _, N, H = q_B1NH.shape
    K, S = k_BKSH.shape[1:3]
    distance_BS = position_B[:, None] - jnp.arange(S)
    mask_BS = distance_BS >= 0
    if window is not None:
        mask_BS &= distance_BS < window
    q_BKGH = q_B1NH.reshape(B, K, N // K, H) * H**-0.5
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGS = jnp.where(mask_BS[:, None, None], scores_BKGS, -1e30)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS, v_BKSH).reshape(B, 1, N, H)
