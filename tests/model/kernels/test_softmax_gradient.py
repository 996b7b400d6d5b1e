"""The kernel of softmax and gradient, interpreted, against the plain operations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.model.kernels import softmax_gradient
from consyn_jax.training.loss import Chunks, head_objective
from consyn_jax.training.program_arguments import Extras

B, T, D = 4, 24, 16


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpret the kernel, with rows of several blocks."""
    monkeypatch.setattr(pallas, "pallas_call", partial(pallas.pallas_call, interpret=True))
    monkeypatch.setattr(softmax_gradient, "WIDTH", 64)


def inputs(words: int) -> tuple[jax.Array, ...]:
    """Hidden states, a head with large logits, labels (invalid where masked), and the mask."""
    rng = np.random.default_rng(words)
    mask = rng.random((B, T)) < 0.7
    labels = np.where(mask, rng.integers(0, min(words, 90), (B, T)), -100)
    return tuple(
        map(
            jnp.asarray,
            (
                rng.normal(size=(B, T, D)).astype(np.float32),
                3 * rng.normal(size=(words, D)).astype(np.float32),
                labels,
                mask,
            ),
        )
    )


def gradients(
    given: tuple[jax.Array, ...],
    vocab_size: int,
    extras: Extras,
    chunks: Chunks,
    dtype: str = "float32",
):
    x, head, labels, mask = given
    objective = partial(
        head_objective,
        labels_BT=labels,
        mask_BT=mask,
        vocab_size=vocab_size,
        extras=extras,
        chunks=chunks,
    )
    return jax.jit(jax.value_and_grad(lambda x, head: objective(x, head), (0, 1), has_aux=True))(
        x.astype(dtype), head
    )


@pytest.mark.slow
@pytest.mark.parametrize("extras", [Extras(), Extras(0.1, 1e-3)], ids=["plain", "smoothed"])
@pytest.mark.parametrize(
    ("words", "vocab_size", "chunk"), [(128, 128, B * T), (128, 100, 32), (300, 299, 32)]
)
def test_it_equals_the_plain_operations(
    words: int, vocab_size: int, extras: Extras, chunk: int
) -> None:
    given = inputs(words)
    (expected, sums), theirs = gradients(given, vocab_size, extras, Chunks(chunk * words))
    (objective, own), ours = gradients(
        given, vocab_size, extras, Chunks(chunk * words, kernel=True)
    )
    np.testing.assert_allclose(objective, expected, rtol=1e-6)
    np.testing.assert_allclose(own, sums, rtol=1e-6)
    for got, wanted in zip(ours, theirs, strict=True):
        assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("names", [("label_smoothing", "z_loss"), ("z_loss",)], ids=str)
def test_weights_may_be_arguments(names: tuple[str, ...]) -> None:
    given, constants, chunks = inputs(128), Extras(0.1, 1e-3), Chunks(32 * 128, kernel=True)
    (expected, _), theirs = gradients(given, 100, constants, chunks)
    own = {name: jnp.float32(getattr(constants, name)) for name in names}
    (objective, _), ours = gradients(given, 100, constants._replace(**own), chunks)
    np.testing.assert_allclose(objective, expected, rtol=1e-6)
    for got, wanted in zip(ours, theirs, strict=True):
        assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_equal_logits_predict_nothing() -> None:
    x, head, labels, mask = inputs(128)
    (_, sums), _ = gradients(
        (x, jnp.zeros_like(head), labels, mask), 100, Extras(), Chunks(32 * 128, kernel=True)
    )
    assert sums.correct == 0


@pytest.mark.parametrize("extras", [Extras(), Extras(0.1, 1e-3)], ids=["plain", "smoothed"])
@pytest.mark.parametrize(("words", "vocab_size"), [(128, 128), (300, 299)])
def test_rounded_logits_give_what_the_plain_operations_give(
    words: int, vocab_size: int, extras: Extras
) -> None:
    """Logits and their gradients have one array; the statistics are those of the rounded logits."""
    given, chunks = inputs(words), Chunks(32 * words, logits_dtype=jnp.bfloat16)
    (expected, sums), theirs = gradients(given, vocab_size, extras, chunks, "bfloat16")
    kernel = chunks._replace(kernel=True)
    (objective, own), ours = gradients(given, vocab_size, extras, kernel, "bfloat16")
    np.testing.assert_allclose(objective, expected, rtol=1e-6)
    np.testing.assert_allclose(own, sums, rtol=1e-6)
    for got, wanted in zip(ours, theirs, strict=True):
        assert norm(got, wanted) <= 2e-3 * norm(wanted)


def norm(x: jax.Array, minus: jax.Array | float = 0.0) -> float:
    return float(np.linalg.norm(np.float64(x) - np.float64(minus)))


def test_trials_side_by_side_round_their_logits() -> None:
    """As `consyn-tune --vectorize` maps the step."""
    x, head, labels, mask = inputs(128)
    chunks = Chunks(32 * 128, kernel=True, logits_dtype=jnp.bfloat16)

    def one(head: jax.Array) -> jax.Array:
        (objective, _), _ = gradients((x, head, labels, mask), 100, Extras(), chunks, "bfloat16")
        return objective

    heads = jnp.stack([head, 0.5 * head])
    np.testing.assert_allclose(jax.vmap(one)(heads), [one(h) for h in heads], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-3), ("float16", 1e-3)])
def test_narrow_types_are_as_exact_as_the_plain_operations(dtype: str, tolerance: float) -> None:
    given = inputs(128)
    (_, _), theirs = gradients(given, 100, Extras(), Chunks(32 * 128), dtype)
    (_, _), ours = gradients(given, 100, Extras(), Chunks(32 * 128, kernel=True), dtype)
    for got, wanted in zip(ours, theirs, strict=True):
        assert np.linalg.norm(np.float64(got) - np.float64(wanted)) <= tolerance * np.linalg.norm(
            np.float64(wanted)
        )


def test_only_devices_with_the_whole_vocabulary_use_it() -> None:
    given = inputs(128)
    (expected, _), theirs = gradients(given, 100, Extras(), Chunks(32 * 128))
    for sizes in ({"data": 2, "fsdp": 2}, {"tensor": 2}):
        mesh = build_mesh(
            dict.fromkeys(AXES, 1) | sizes, jax.devices()[: np.prod(list(sizes.values()))]
        )
        with jax.set_mesh(mesh):
            (objective, _), ours = gradients(given, 100, Extras(), Chunks(32 * 128, kernel=True))
        np.testing.assert_allclose(objective, expected, rtol=1e-6)
        for got, wanted in zip(ours, theirs, strict=True):
            assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)
