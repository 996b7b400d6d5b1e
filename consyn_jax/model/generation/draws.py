"""Choice of the next token: filter the logits, then sample.

The filters and their order are the same as in transformers: repetition penalty, temperature, top_k,
top_p, min_p (transformers 5.23, generation/logits_process.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from consyn_jax.errors import UserError
from consyn_jax.integers import is_whole

MAX_SEED = 2**32 - 1


class Filters(NamedTuple):
    """The set of active filters.

    A program is compiled for one set of active filters and one `top_k`. The values of the other
    filters are its arguments (`FilterValues`), so changing them needs no new compilation.

    Attributes:
        draws: Whether the token is sampled; otherwise the likeliest one is chosen.
        top_k: Value of the filter; None if it is off.
        penalises: Whether the repetition penalty is active.
    """

    draws: bool
    top_k: int | None
    top_p: bool
    min_p: bool
    penalises: bool


class FilterValues(NamedTuple):
    """Temperature, top_p, min_p and repetition penalty, as arguments of a compiled program."""

    temperature: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any


@dataclass(frozen=True)
class Sampling:
    """Settings for the choice of the next token.

    Attributes:
        temperature: Divisor of the logits; 0 chooses the likeliest token.
        top_k: Number of likeliest tokens to sample from. Tokens that tie with the last of these are
            included.
        top_p: Sample from the smallest set of likeliest tokens whose probabilities sum to at least
            this value.
        min_p: Sample from tokens whose probability is at least this fraction of the highest one.
        repetition_penalty: Penalty for tokens that already occur in the prompt or in the new text.
            Their positive logits are divided by the penalty, and their negative logits are
            multiplied by it (Keskar et al., 2019).
        seed: Random seed. A draw depends only on the seed, the index of the prompt, the index of
            the continuation among those of the prompt, and the index of the token.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", "at least 0", lambda x: x >= 0),
            ("top_k", "at least 1", lambda x: x >= 1),
            ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
            ("min_p", "from 0 to 1", lambda x: 0 <= x <= 1),
            ("repetition_penalty", "above 0", lambda x: x > 0),
            ("seed", f"from 0 to {MAX_SEED}", lambda x: 0 <= x <= MAX_SEED),
        )
        for name, range_, holds in checks:
            value = getattr(self, name)
            if value is None:
                continue
            if name in ("top_k", "seed") and not is_whole(value):
                raise UserError(f"{name} must be a whole number, not {value!r}.")
            is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not is_number:
                raise UserError(f"{name} must be a number, not {value!r}.")
            if not (math.isfinite(value) and holds(value)):
                raise UserError(f"{name} must be {range_}, not {value!r}.")

    def filters(self, vocab_size: int) -> Filters:
        """Determine which filters have an effect, for a vocabulary of this size."""
        draws = self.temperature > 0
        top_k = self.top_k if draws and self.top_k is not None else vocab_size
        return Filters(
            draws,
            top_k if top_k < vocab_size else None,
            draws and self.top_p is not None and self.top_p < 1,
            draws and bool(self.min_p),
            self.repetition_penalty != 1,
        )

    def values(self) -> FilterValues:
        """The values of the filters as float32; 1 for filters that are not set."""
        numbers = (self.temperature, self.top_p, self.min_p, self.repetition_penalty)
        return FilterValues(*(np.float32(1 if number is None else number) for number in numbers))


def filtered(
    logits_BV: Float[Array, "B V"],
    filters: Filters,
    values: FilterValues,
    seen_BV: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """Apply the filters to the logits; excluded tokens get -inf.

    Args:
        seen_BV: True for tokens that occur in the row so far; required if `filters.penalises`.
    """
    if filters.penalises:
        assert seen_BV is not None
        penalty = values.repetition_penalty
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if not filters.draws:
        return logits_BV
    logits_BV = logits_BV / values.temperature
    kept_BV = jnp.ones_like(logits_BV, bool)
    if filters.top_k is not None or filters.top_p:
        best_BM, ids_BM = jax.lax.top_k(logits_BV, filters.top_k or logits_BV.shape[-1])
        kept_BV = logits_BV >= best_BM[:, -1:]
        if filters.top_p:
            kept_BV &= _likeliest(logits_BV, kept_BV, best_BM, ids_BM, values.top_p)
    if filters.min_p:
        most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        kept_BV &= logits_BV >= most_B1 + jnp.log(values.min_p)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _likeliest(
    logits_BV: jax.Array, kept_BV: jax.Array, best_BM: jax.Array, ids_BM: jax.Array, top_p: Any
) -> jax.Array:
    """Mask the smallest set of likeliest tokens whose probabilities sum to at least `top_p`.

    The mask is True for the tokens of the set. Among equal logits, lower ids come first.

    Args:
        kept_BV: Tokens that earlier filters kept; their probabilities are normalised to 1.
        best_BM, ids_BM: Logits and ids of the likeliest tokens, in descending order.
    """
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True, where=kept_BV)
    shares_BM = jnp.exp(best_BM - total_B1)
    before_BM = jnp.cumsum(shares_BM, axis=-1) - shares_BM
    last_B1 = jnp.maximum(jnp.sum(before_BM < top_p, axis=-1, keepdims=True), 1) - 1
    least_B1 = jnp.take_along_axis(best_BM, last_B1, axis=-1)
    id_B1 = jnp.take_along_axis(ids_BM, last_B1, axis=-1)
    ties_BV = (logits_BV == least_B1) & (jnp.arange(logits_BV.shape[-1]) <= id_B1)
    return (logits_BV > least_B1) | ties_BV


def row_keys(
    base: UInt32[Array, "2"], prompt_B: Int[Array, " B"], sequence_B: Int[Array, " B"]
) -> UInt32[Array, "B 2"]:
    """Derive the random key of each row.

    Args:
        base: Key of the seed (`seed_key`).
        prompt_B: Index of the row's prompt.
        sequence_B: Index of the row's continuation among the continuations of its prompt.
    """

    def one(prompt: jax.Array, sequence: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(base)
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, prompt), sequence))

    return jax.vmap(one)(prompt_B, sequence_B)


def seed_key(seed: int) -> np.ndarray:
    """The raw key data of a seed, for `row_keys`."""
    return np.asarray(jax.random.key_data(jax.random.key(np.uint32(seed))))


def draw(
    logits_BV: Float[Array, "B V"],
    keys_B2: UInt32[Array, "B 2"],
    index_B: Int[Array, " B"],
    filters: Filters,
) -> Int[Array, " B"]:
    """Sample one token per row from filtered logits; without `filters.draws`, take the likeliest.

    Args:
        index_B: Index of the token among the row's new tokens; it is folded into the key.
    """
    if not filters.draws:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def one(logits_V: jax.Array, key: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.categorical(
            jax.random.fold_in(jax.random.wrap_key_data(key), index), logits_V
        )

    return jax.vmap(one)(logits_BV, keys_B2, index_B).astype(jnp.int32)
