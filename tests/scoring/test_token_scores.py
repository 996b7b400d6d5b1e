"""The scores in chunks and on a mesh against their readable form."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.inference.scoring.text_windows import windows
from consyn_jax.scoring import token_scores as module
from consyn_jax.scoring.scorer import Scorer, Wanted
from consyn_jax.scoring.token_scores import reference_scores, token_scores

VOCAB, PADDED = 37, 40


@pytest.mark.parametrize(
    "sizes", [{}, {"data": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}]
)
def test_chunks_and_mesh_agree_with_the_reference(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * PADDED)
    draws = np.random.default_rng(0)
    x = jnp.asarray(draws.normal(size=(4, 6, 8)), jnp.float32)
    head = np.array(draws.normal(size=(PADDED, 8)), np.float32)
    head[5] = head[30]  # equal logits on two devices: the first is the greedy one
    head[VOCAB:] *= 100  # padding must not count
    logits = jnp.einsum("BTD,VD->BTV", x, head[:VOCAB])
    labels = jnp.where(draws.random((4, 6)) < 0.6, jnp.argmax(logits, -1), 30)
    expected = reference_scores(logits, labels)
    mesh = build_mesh(
        {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes,
        jax.devices()[: int(np.prod(list(sizes.values()) or [1]))],
    )
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *a: token_scores(*a, VOCAB))(x, jnp.asarray(head), labels)
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, atol=1e-5)
    np.testing.assert_array_equal(found.is_greedy, expected.is_greedy)
    assert 0 < expected.is_greedy.sum() < labels.size


def test_every_token_but_the_first_is_scored_once_with_the_context_that_was_asked() -> None:
    for length, size, stride in ((100, 16, 5), (100, 16, 15), (7, 16, 8), (17, 16, 16)):
        scored = [t for w in windows(length, size, stride) for t in range(w.first, w.end)]
        lost = set(range(1, length)) - set(scored)
        assert len(scored) == len(set(scored))
        assert lost == (set(range(size, length, stride)) if stride == size else set())
        for w in windows(length, size, stride):
            assert w.end - w.begin <= size
            assert w.first - w.begin >= (size - stride if w.begin else 1) or stride == size


def test_lengths_are_few() -> None:
    small: Any = SimpleNamespace(
        config=SimpleNamespace(context=1000), mesh=SimpleNamespace(shape={"context": 2})
    )
    lengths = [Scorer.length_of(small, n) for n in range(1, 1001)]
    assert sorted(set(lengths)) == [32, 64, 128, 192, 256, 384, 512, 768, 1000]
    assert all(n <= length for n, length in enumerate(lengths, 1))


@pytest.mark.parametrize(("count", "rows"), [(1, 2), (3, 4), (9, 8)])
def test_a_batch_is_no_larger_than_what_there_is_to_score(count: int, rows: int) -> None:
    """And the mesh divides it."""
    small: Any = SimpleNamespace(
        rows=8, mesh=SimpleNamespace(shape={"data": 2, "fsdp": 1}), length_of=lambda tokens: 32
    )
    batches = [*Scorer._batches(small, [Wanted(np.arange(5), 1)] * count)]
    assert {arrays.shape for _, arrays in batches} == {(3, rows, 32)}
    assert sum(len(numbers) for numbers, _ in batches) == count
