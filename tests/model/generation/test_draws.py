"""Draws against the exact distribution, and filters against transformers' logits processors."""

from itertools import combinations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from consyn_jax.errors import UserError
from consyn_jax.model.generation.draws import Sampling, draw, filtered, row_keys, seed_key

V, DRAWS = 24, 20_000
LOGITS = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)
SEEN = np.random.default_rng(2).random(V) < 0.3
SETTINGS = {
    "temperature": 0.7,
    "top_k": 7,
    "top_p": 0.8,
    "min_p": 0.08,
    "repetition_penalty": 1.7,
}
CHOICES = [
    {},
    *({name: SETTINGS[name]} for name in SETTINGS),
    *({name: SETTINGS[name] for name in pair} for pair in combinations(SETTINGS, 2)),
    SETTINGS,
]


def sampling(given: dict) -> Sampling:
    return Sampling(**{"temperature": 1.0, **given})


def shares(given: dict) -> np.ndarray:
    """The distribution by its definition, in float64."""
    logits = LOGITS.astype(np.float64)
    penalty = given.get("repetition_penalty", 1.0)
    logits = np.where(SEEN, np.where(logits < 0, logits * penalty, logits / penalty), logits)
    logits = logits / given.get("temperature", 1.0)
    order = np.argsort(-logits)
    kept = list(order[: given.get("top_k", V)])
    p = np.exp(logits - logits.max())
    if "top_p" in given:
        inside, total, likeliest = [], 0.0, p[kept].sum()
        for token in kept:
            if total < given["top_p"]:
                inside.append(token)
            total += p[token] / likeliest
        kept = inside
    if "min_p" in given:
        kept = [token for token in kept if p[token] >= given["min_p"] * p.max()]
    found = np.zeros(V)
    found[kept] = p[kept] / p[kept].sum()
    return found


def drawn(given: dict) -> np.ndarray:
    """How often each token is drawn, each time by another prompt."""
    chosen = sampling(given)
    filters = chosen.filters(V)
    seen = jnp.asarray(SEEN)[None]
    logits = filtered(jnp.asarray(LOGITS)[None], filters, chosen.values(), seen)
    numbers = jnp.arange(DRAWS)
    keys = row_keys(jnp.asarray(seed_key(5)), numbers // 4, numbers % 4)
    tokens = draw(jnp.broadcast_to(logits, (DRAWS, V)), keys, numbers % 3, filters)
    return np.bincount(np.asarray(tokens), minlength=V)


@pytest.mark.slow
@pytest.mark.parametrize("given", CHOICES, ids=lambda given: "-".join(given) or "plain")
def test_draws_follow_the_exact_distribution(given: dict) -> None:
    expected, found = shares(given), drawn(given)
    assert found[expected == 0].sum() == 0
    inside = expected > 0
    assert chisquare(found[inside], expected[inside] * DRAWS).pvalue > 1e-4


@pytest.mark.torch
@pytest.mark.parametrize("given", CHOICES, ids=lambda given: "-".join(given) or "plain")
def test_filters_are_those_of_transformers(given: dict) -> None:
    import torch
    from transformers.generation import logits_process as hf

    scores, ids = torch.tensor(LOGITS)[None], torch.tensor(np.flatnonzero(SEEN))[None]
    for name, kind in (
        ("repetition_penalty", hf.RepetitionPenaltyLogitsProcessor),
        ("temperature", hf.TemperatureLogitsWarper),
        ("top_k", hf.TopKLogitsWarper),
        ("top_p", hf.TopPLogitsWarper),
        ("min_p", hf.MinPLogitsWarper),
    ):
        if name in given:
            scores = kind(given[name])(ids, scores)
    chosen = sampling(given)
    ours = filtered(
        jnp.asarray(LOGITS)[None], chosen.filters(V), chosen.values(), jnp.asarray(SEEN)[None]
    )
    np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-6)


def test_tokens_that_tie_stay_in_top_k_and_are_counted_in_top_p() -> None:
    logits = jnp.zeros((1, 10))

    def kept(**given: float) -> int:
        chosen = sampling(given)
        return int(np.isfinite(filtered(logits, chosen.filters(10), chosen.values())).sum())

    assert kept(top_k=3) == 10
    assert kept(top_p=0.35) == 4


def test_a_draw_depends_on_the_numbers_and_not_on_the_row() -> None:
    chosen = sampling({})
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, V)), jnp.float32)

    def tokens(prompts: list[int], sequence: int = 0, index: int = 0) -> list[int]:
        numbers = jnp.array(prompts)
        keys = row_keys(jnp.asarray(seed_key(1)), numbers, jnp.full_like(numbers, sequence))
        rows = jnp.broadcast_to(logits, (len(prompts), V))
        return draw(rows, keys, jnp.full_like(numbers, index), chosen.filters(V)).tolist()

    some = list(range(40))
    assert tokens(some) == tokens(some[::-1])[::-1]
    assert tokens([7]) == tokens(some)[7:8]
    assert tokens(some) != tokens(some, sequence=1)
    assert tokens(some) != tokens(some, index=1)


def test_values_out_of_range_are_refused() -> None:
    for given in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 1.5}):
        name = next(iter(given))
        with pytest.raises(UserError, match=f"^{name} must be"):
            Sampling(**given)


def test_a_filter_that_keeps_everything_is_off() -> None:
    assert Sampling(1.0, top_k=99, top_p=1.0, min_p=0.0).filters(50) == (True, None, *[False] * 3)
    assert not Sampling(0.0, top_k=5).filters(50).draws
