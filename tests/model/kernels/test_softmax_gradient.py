"""The kernel of softmax and gradient, interpreted, against the plain operations."""

from functools import partial
from typing import Any

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
    """Interpret the kernel with few threads, so that a part of a row is read twice."""
    monkeypatch.setattr(pallas, "pallas_call", partial(pallas.pallas_call, interpret=True))
    for name, number in {"THREADS": 4, "KEPT": 24, "KEPT_IN_FEWER": 16, "AT_ONCE": 8}.items():
        monkeypatch.setattr(softmax_gradient, name, number)


@pytest.fixture
def whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the threads keep whole rows."""
    for name in ("KEPT", "KEPT_IN_FEWER"):
        monkeypatch.setattr(softmax_gradient, name, 96)


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


def logits_like(kind: str, n: int, words: int, rng: np.random.Generator) -> np.ndarray:
    """Ordinary logits, and those at which a softmax may overflow or divide by zero."""
    logits = 3 * rng.normal(size=(n, words))
    if kind == "some at -inf":
        logits[:, : words // 2] = -np.inf  # whole units of every thread, and what it reads first
        logits[:, -1] = -np.inf
    elif kind == "all equal":
        logits[:] = 7.0
    elif kind == "all at -1e4":
        logits -= 1e4
    elif kind == "to 1e4":
        logits *= 3_000
    elif kind == "growing":
        logits.sort()
    return logits


def exact(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, smoothing: float, z_loss: float
) -> tuple[np.ndarray, ...]:
    """The gradient, the largest logit and log(Z), in float64."""
    top = logits.max(axis=1)
    powers = np.exp(logits - top[:, None])
    log_z = top + np.log(powers.sum(axis=1))
    share = powers / powers.sum(axis=1, keepdims=True)
    target = (1 - smoothing) * np.eye(logits.shape[1])[labels] + smoothing / logits.shape[1]
    gradient = share * (1 + 2 * z_loss * log_z)[:, None] - target
    return gradient * weights[:, None], top, log_z


@pytest.mark.parametrize("rows", ["read twice", "kept"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extras", [(0.0, 0.0), (0.1, 1e-3)], ids=["plain", "smoothed"])
@pytest.mark.parametrize(
    "kind", ["ordinary", "some at -inf", "all equal", "all at -1e4", "to 1e4", "growing"]
)
def test_it_is_exact(
    kind: str,
    extras: tuple[float, float],
    dtype: str,
    rows: str,
    request: pytest.FixtureRequest,
) -> None:
    """Against float64, with padding, and words that no unit divides."""
    if rows == "kept":
        request.getfixturevalue("whole_rows")
    n, words, vocab_size = 5, 301, 287
    rng = np.random.default_rng(0)
    logits = np.full((n, words), np.nan, np.float32)  # padding is never used
    logits[:, :vocab_size] = logits_like(kind, n, vocab_size, rng)
    given = jnp.asarray(logits, dtype)
    real = np.float64(given)[:, :vocab_size]
    labels = rng.integers(vocab_size // 2, vocab_size - 1, n)
    weights = np.asarray([1, 0, 1, 0.5, 2])
    found = softmax_gradient.softmax_gradient(
        given, jnp.asarray(labels), jnp.asarray(weights), vocab_size, *extras, jnp.dtype(dtype)
    )
    gradient, top, log_z, label_logit, mean = (np.float64(a) for a in found)
    wanted, wanted_top, wanted_log_z = exact(real, labels, weights, *extras)
    tolerance: dict[str, Any] = {"rtol": 4e-3 if dtype == "bfloat16" else 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(gradient[:, :vocab_size], wanted, **tolerance)
    assert not gradient[:, vocab_size:].any()
    np.testing.assert_array_equal(top, wanted_top)
    np.testing.assert_allclose(log_z, wanted_log_z, rtol=3e-7)
    np.testing.assert_array_equal(label_logit, real[np.arange(n), labels])
    if extras[0]:
        np.testing.assert_allclose(mean, real.mean(axis=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("words", [49_152, 50_304, 131_072, 151_936, 259, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_row_is_divided_without_gaps(words: int, itemsize: int, monkeypatch: Any) -> None:
    monkeypatch.undo()  # the sizes of a GPU
    kept = softmax_gradient.KEPT
    row = softmax_gradient.divided(words, words, itemsize, kept)
    assert (row.units - 1) * row.width < words <= row.units * row.width
    assert 0 <= row.streamed < row.units
    assert (row.units - row.streamed) * row.width <= kept * row.threads
    assert row.at_once * row.width <= softmax_gradient.AT_ONCE * row.threads
    assert (row.streamed == 0) == (words <= kept * softmax_gradient.THREADS)


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
