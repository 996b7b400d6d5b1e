"""The loss of DPO against the formula of its paper, and its parts against plain JAX."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.data.pairs import CHOSEN_REFERENCE, REJECTED_REFERENCE
from consyn_jax.distributed.mesh import build_mesh, parse_mesh
from consyn_jax.training.loss import CPU_CHUNKS, Chunks
from consyn_jax.training.preference.pair_loss import (
    answer_log_probs,
    num_terms,
    pair_objective,
    token_log_probs,
)

B, T, D, V = 4, 8, 8, 30


def inputs() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(3), 4)
    return (
        jax.random.normal(keys[0], (B, T, D)),
        jax.random.normal(keys[1], (V + 2, D)),
        jax.random.randint(keys[2], (B, T), 0, V),
        jax.random.bernoulli(keys[3], 0.7, (B, T)),
    )


def plain(x: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", x, head[:V]))
    return jnp.take_along_axis(log_probs, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize(
    ("mesh", "chunks"),
    [(None, CPU_CHUNKS), (None, Chunks(100)), ("fsdp=2,context=2,tensor=2", Chunks(100))],
)
def test_log_probs_and_their_gradients_are_those_of_all_logits(
    mesh: str | None, chunks: Chunks
) -> None:
    x, head, labels, _ = inputs()
    weights = jnp.linspace(-2.0, 3.0, B * T).reshape(B, T)

    def total(x: jax.Array, head: jax.Array) -> jax.Array:
        return jnp.sum(weights * token_log_probs(x, head, labels, V, chunks))

    def expected(x: jax.Array, head: jax.Array) -> jax.Array:
        return jnp.sum(weights * plain(x, head, labels))

    here = jax.set_mesh(build_mesh(parse_mesh(mesh, 8))) if mesh else nullcontext()
    with here:
        value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(x, head)
    want, wanted = jax.value_and_grad(expected, (0, 1))(x, head)
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    for found, gradient in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-5)


def test_answers_are_the_halves_of_a_row() -> None:
    x, head, labels, mask = inputs()
    found = answer_log_probs(x, head, labels, mask, V, CPU_CHUNKS)
    each = np.where(mask, plain(x, head, labels), 0)
    np.testing.assert_allclose(found, each.reshape(B, 2, T // 2).sum(-1), rtol=1e-5)


def test_the_objective_is_that_of_the_paper_and_padding_counts_nothing() -> None:
    beta, log_probs = 0.3, np.array([[-3.0, -9.0], [-7.0, -4.0], [0.0, 0.0]], np.float32)
    reference = np.array([[-4.0, -8.0], [-6.5, -6.0], [5.0, 5.0]], np.float32)
    batch = {
        "loss_mask": jnp.array([[True] * 4, [True, False] * 2, [False] * 4]),
        CHOSEN_REFERENCE: jnp.array(reference[:, 0]),
        REJECTED_REFERENCE: jnp.array(reference[:, 1]),
    }
    loss, sums = pair_objective(jnp.array(log_probs), batch, beta)
    rewards = beta * (log_probs - reference)[:2]
    margins = rewards[:, 0] - rewards[:, 1]
    expected = np.log1p(np.exp(-margins))
    assert float(loss) == pytest.approx(expected.sum(), rel=1e-6)
    assert (float(sums.terms), float(sums.tokens), float(num_terms(batch))) == (2, 6, 2)
    assert sums.means(sums.terms) == pytest.approx(
        {
            "loss": expected.mean(),
            "rewards/chosen": rewards[:, 0].mean(),
            "rewards/rejected": rewards[:, 1].mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": 0.5,
            "logps/chosen": -5.0,
            "logps/rejected": -6.5,
        },
        rel=1e-5,
    )


def test_a_large_scale_of_the_loss_does_not_overflow_float16() -> None:
    x, head, labels, _ = inputs()
    half = x.astype(jnp.float16)

    def total(x: jax.Array, scale: float) -> jax.Array:
        return scale * jnp.sum(token_log_probs(x, head, labels, V, Chunks()))

    small, large = (jax.grad(total)(half, scale) for scale in (1.0, 2.0**12))
    np.testing.assert_allclose(large / 2.0**12, small, rtol=1e-2, atol=1e-3)
