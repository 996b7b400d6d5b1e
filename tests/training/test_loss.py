from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.training.loss import (
    Chunks,
    LossSums,
    cross_entropy,
    head_loss,
    head_objective,
)
from consyn_jax.training.program_arguments import Extras

B, T, D, V = 4, 18, 16, 128
WHOLE = 2**26


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, ...]:
    """Hidden states, head, labels below 60, and a mask with a different number of tokens by row."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < np.array([[T], [7], [1], [0]])
    x, head = (
        rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(V, D)).astype(np.float32),
    )
    return tuple(map(jnp.asarray, (x, head, rng.integers(0, 60, (B, T)).astype(np.int32), mask)))


def with_gradients(
    loss: Callable[..., LossSums],
) -> Callable[..., tuple[LossSums, tuple[jax.Array, jax.Array]]]:
    def nll(
        x: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, LossSums]:
        sums = loss(x, head, labels, mask)
        return sums.nll, sums

    def run(*arguments: jax.Array) -> tuple[LossSums, tuple[jax.Array, jax.Array]]:
        (_, sums), gradients = jax.value_and_grad(nll, argnums=(0, 1), has_aux=True)(*arguments)
        return sums, gradients

    return jax.jit(run)


@partial(jax.jit, static_argnames="vocab_size")
def reference(
    x: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array, vocab_size: int
) -> LossSums:
    return cross_entropy(jnp.einsum("BTD,VD->BTV", x, head)[..., :vocab_size], labels, mask)


@cache
def exact(vocab_size: int) -> Callable[..., tuple[LossSums, tuple[jax.Array, jax.Array]]]:
    """The reference with gradients, compiled once."""
    return with_gradients(partial(reference, vocab_size=vocab_size))


def compare(got: Any, expected: Any, tolerance: float) -> None:
    sums, gradients = got
    np.testing.assert_allclose(sums.nll, expected[0].nll, rtol=tolerance)
    assert (sums.tokens, sums.correct) == (expected[0].tokens, expected[0].correct)
    for ours, theirs in zip(gradients, expected[1], strict=True):
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.users_compiler
@pytest.mark.parametrize("vocab_size", [V, 100])
def test_the_reference_equals_torch(inputs: tuple[jax.Array, ...], vocab_size: int) -> None:
    x, head, labels, mask = inputs
    sums, (dx, dhead) = exact(vocab_size)(*inputs)
    tx, thead = (torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (x, head))
    logits = (tx @ thead.T)[..., :vocab_size]
    targets = torch.tensor(np.where(mask, labels, -100), dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, vocab_size), targets.reshape(-1), reduction="sum"
    )
    loss.backward()
    assert float(sums.nll) == pytest.approx(loss.item(), rel=1e-6)
    assert int(sums.tokens) == 26
    assert int(sums.correct) == int((logits.argmax(-1) == targets).sum())
    for ours, theirs in ((dx, tx.grad.numpy()), (dhead, thead.grad.numpy())):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("elements", "chunks"), [(WHOLE, 1), (B * T * V // 2, 2), (B * T * V // 4, 4), (1, T)]
)
@pytest.mark.parametrize("vocab_size", [V, 100])
@pytest.mark.parametrize("vocab_first", [False, True])
def test_the_fused_loss_equals_the_reference(
    inputs: tuple[jax.Array, ...], vocab_first: bool, vocab_size: int, elements: int, chunks: int
) -> None:
    assert chunks != 4 or T % chunks, "one case does not divide the sequence"
    fused = with_gradients(lambda *a: head_loss(*a, vocab_size, Chunks(elements, vocab_first)))
    compare(fused(*inputs), exact(vocab_size)(*inputs), 1e-6)


MESHES: dict[str, tuple[dict[str, int], int]] = {
    "fsdp": ({"fsdp": 4}, 100),
    "context": ({"data": 2, "context": 2}, V),
    "tensor": ({"tensor": 4}, 100),
    "tensor with a device that has only padding": ({"tensor": 8}, 60),
    "mixed": ({"fsdp": 2, "context": 2, "tensor": 2}, 100),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("vocab_first", [False, True])
def test_the_fused_loss_equals_the_reference_on_a_mesh(
    inputs: tuple[jax.Array, ...], vocab_first: bool, name: str
) -> None:
    axes, vocab_size = MESHES[name]
    sizes = dict.fromkeys(AXES, 1) | axes
    mesh = build_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    logical = (
        ("batch", "sequence", None),
        ("vocab", "embed"),
        ("batch", "sequence"),
        ("batch", "sequence"),
    )
    placed = [
        jax.device_put(value, sharding(mesh, names))
        for value, names in zip(inputs, logical, strict=True)
    ]
    with jax.set_mesh(mesh):
        got = with_gradients(lambda *a: head_loss(*a, vocab_size, Chunks(600, vocab_first)))(
            *placed
        )
    compare(got, exact(vocab_size)(*inputs), 1e-6)


def test_without_gradients_the_sums_are_the_same(inputs: tuple[jax.Array, ...]) -> None:
    sums = jax.jit(lambda *a: head_loss(*a, 100, Chunks(1000)))(*inputs)
    expected = reference(*inputs, 100)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)


def test_without_tokens_sums_and_gradients_are_zero(inputs: tuple[jax.Array, ...]) -> None:
    x, head, labels, mask = inputs
    sums, (dx, dhead) = with_gradients(lambda *a: head_loss(*a, 100, Chunks(1000)))(
        x, head, labels, jnp.zeros_like(mask)
    )
    assert sums == (0, 0, 0)
    assert not dx.any()
    assert not dhead.any()


@pytest.mark.parametrize("chunks", [Chunks(1000), Chunks(1000, vocab_first=True)])
@pytest.mark.parametrize("vocab_size", [V, 100])
def test_equal_logits_predict_nothing(
    inputs: tuple[jax.Array, ...], vocab_size: int, chunks: Chunks
) -> None:
    x, head, labels, mask = inputs
    sums = jax.jit(lambda *a: head_loss(*a, vocab_size, chunks))(
        x, jnp.zeros_like(head), labels + 1, mask
    )
    assert (
        sums.correct
        == reference(x, jnp.zeros_like(head), labels + 1, mask, vocab_size).correct
        == 0
    )
    hint = jnp.zeros_like(head).at[labels[0, 0], :].set(1e-3 * x[0, 0])
    one_token = mask & (jnp.arange(T) == 0) & (jnp.arange(B) == 0)[:, None]
    assert (
        jax.jit(lambda *a: head_loss(*a, vocab_size, chunks))(x, hint, labels, one_token).correct
        == 1
    )


def test_gradients_scale_with_the_cotangent(inputs: tuple[jax.Array, ...]) -> None:
    """As those of float16's loss scale do, before they reach the layers below the head."""
    x, head, labels, mask = inputs

    @jax.jit
    def gradients(factor: float) -> tuple[jax.Array, jax.Array]:
        def loss(x: jax.Array, head: jax.Array) -> jax.Array:
            return factor * head_loss(x, head, labels, mask, V, Chunks(1000)).nll

        return jax.grad(loss, argnums=(0, 1))(x, head)

    for once, thrice in zip(gradients(1.0), gradients(3.0), strict=True):
        assert np.any(once)
        np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_bf16_keeps_the_loss_in_float32(inputs: tuple[jax.Array, ...]) -> None:
    x, head, labels, mask = inputs
    half = x.astype(jnp.bfloat16)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    sums, (dx, dhead) = with_gradients(lambda *a: head_loss(*a, V, Chunks(1000)))(
        half, head, labels, mask
    )
    expected, (dx32, dhead32) = exact(V)(half.astype(jnp.float32), rounded, labels, mask)
    assert (sums.nll.dtype, dx.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert np.linalg.norm(dx.astype(jnp.float32) - dx32) <= 0.01 * np.linalg.norm(dx32)
    assert np.linalg.norm(dhead - dhead32) <= 0.01 * np.linalg.norm(dhead32)


ROUNDED, WIDE = Chunks(1000, logits_dtype=jnp.bfloat16), Chunks(1000)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_logits_in_bf16_are_rounded_once_and_then_float32(
    inputs: tuple[jax.Array, ...], sizes: dict[str, int]
) -> None:
    """Statistics, loss and gradients are those of the rounded logits, in float32."""
    x, head, labels, mask = inputs
    half = x.astype(jnp.bfloat16)

    def rounded(x: jax.Array, head: jax.Array) -> jax.Array:
        # The gradient passes through the rounding as if it were not there.
        logits = jnp.einsum("BTD,VD->BTV", x, head)
        narrow = logits.astype(jnp.bfloat16).astype(jnp.float32)
        logits += jax.lax.stop_gradient(narrow - logits)
        return cross_entropy(logits[..., :100], labels, mask).nll

    exactly = half.astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32)
    nll, (dx, dhead) = jax.jit(jax.value_and_grad(rounded, (0, 1)))(*exactly)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(build_mesh(dict.fromkeys(AXES, 1) | sizes, devices)):
        sums, ours = with_gradients(lambda *a: head_loss(*a, 100, ROUNDED))(
            half, head, labels, mask
        )
        plain = with_gradients(lambda *a: head_loss(*a, 100, Chunks(1000)))(
            half, head, labels, mask
        )
    assert sums.nll.dtype == jnp.float32
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-6)
    assert abs(plain[0].nll - nll) > 1e-5 * nll
    for got, wanted in zip(ours, (dx, dhead), strict=True):
        error = np.float32(got) - wanted
        assert np.linalg.norm(error) <= 0.01 * np.linalg.norm(wanted)


def test_evaluation_does_not_round_logits(inputs: tuple[jax.Array, ...]) -> None:
    half = inputs[0].astype(jnp.bfloat16), *inputs[1:]
    found = [jax.jit(partial(head_loss, vocab_size=V, chunks=c))(*half) for c in (ROUNDED, WIDE)]
    assert found[0] == found[1]


def test_logits_of_any_size_give_a_finite_loss(inputs: tuple[jax.Array, ...]) -> None:
    x, head, labels, mask = inputs
    got = with_gradients(lambda *a: head_loss(*a, V, Chunks(1000)))(x * 1e4, head, labels, mask)
    compare(got, exact(V)(x * 1e4, head, labels, mask), 1e-5)
    assert np.isfinite(got[0].nll)


# ----------------------------------------------------------------------- label smoothing and z-loss

EXTRAS = [Extras(label_smoothing=0.1), Extras(z_loss=1e-2), Extras(0.2, 1e-3)]


def objective_with_gradients(extras: Extras, vocab_size: int, chunks: Chunks) -> Callable[..., Any]:
    """(objective, plain sums) and the gradients of x and the head."""

    def objective(
        x: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, LossSums]:
        return head_objective(x, head, labels, mask, vocab_size, extras, chunks)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))


def torch_objective(
    inputs: tuple[jax.Array, ...], extras: Extras, vocab_size: int
) -> tuple[float, list[np.ndarray]]:
    x, head, labels, mask = map(np.asarray, inputs)
    tx, thead = (torch.tensor(a.astype(np.float64), requires_grad=True) for a in (x, head))
    logits = (tx @ thead.T)[..., :vocab_size].reshape(-1, vocab_size)
    targets = torch.tensor(np.where(mask, labels, -100).reshape(-1), dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(
        logits, targets, reduction="sum", label_smoothing=extras.label_smoothing
    )
    loss = loss + extras.z_loss * (torch.logsumexp(logits, -1) ** 2)[targets >= 0].sum()
    loss.backward()
    return loss.item(), [t.grad.numpy() for t in (tx, thead)]


@pytest.mark.slow
@pytest.mark.users_compiler
@pytest.mark.parametrize(
    "chunks", [Chunks(WHOLE), Chunks(B * T * V // 4), Chunks(B * T * V // 4, vocab_first=True)]
)
@pytest.mark.parametrize("vocab_size", [V, 100])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_extras_equal_torch(
    inputs: tuple[jax.Array, ...], extras: Extras, vocab_size: int, chunks: Chunks
) -> None:
    (objective, sums), gradients = objective_with_gradients(extras, vocab_size, chunks)(*inputs)
    loss, expected = torch_objective(inputs, extras, vocab_size)
    assert float(objective) == pytest.approx(loss, rel=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)
    np.testing.assert_array_equal(
        gradients[1][vocab_size:], 0, "padding of the vocabulary is no target"
    )
    np.testing.assert_allclose(
        sums,
        reference(*inputs, vocab_size),
        rtol=1e-6,
        err_msg="the reported sums are those of the plain loss",
    )


@pytest.mark.parametrize("vocab_first", [False, True])
def test_extras_may_be_arguments_of_the_program(
    inputs: tuple[jax.Array, ...], vocab_first: bool
) -> None:
    """As in a study; on a mesh, tests/tuning/test_shared_programs.py."""
    chunks = Chunks(B * T * V // 4, vocab_first=vocab_first)
    constants = objective_with_gradients(EXTRAS[2], 100, chunks)(*inputs)

    @jax.jit
    def traced(extras: Extras) -> Any:
        return objective_with_gradients(extras, 100, chunks)(*inputs)

    found = traced(Extras(*map(jnp.float32, EXTRAS[2])))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(constants), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)
    assert traced(Extras(jnp.float32(0.5), jnp.float32(0)))[0][0] != found[0][0]


@pytest.mark.slow
@pytest.mark.users_compiler
@pytest.mark.parametrize("name", MESHES)
def test_extras_equal_torch_on_a_mesh(inputs: tuple[jax.Array, ...], name: str) -> None:
    axes, vocab_size = MESHES[name]
    sizes = dict.fromkeys(AXES, 1) | axes
    mesh = build_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    logical = (
        ("batch", "sequence", None),
        ("vocab", "embed"),
        ("batch", "sequence"),
        ("batch", "sequence"),
    )
    placed = [
        jax.device_put(value, sharding(mesh, names))
        for value, names in zip(inputs, logical, strict=True)
    ]
    with jax.set_mesh(mesh):
        (objective, sums), gradients = objective_with_gradients(EXTRAS[2], vocab_size, Chunks(600))(
            *placed
        )
    loss, expected = torch_objective(inputs, EXTRAS[2], vocab_size)
    assert float(objective) == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(sums, reference(*inputs, vocab_size), rtol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


def test_without_extras_the_objective_is_the_loss(inputs: tuple[jax.Array, ...]) -> None:
    (objective, sums), gradients = objective_with_gradients(Extras(), 100, Chunks(1000))(*inputs)
    expected, theirs = with_gradients(lambda *a: head_loss(*a, 100, Chunks(1000)))(*inputs)
    jax.tree.map(
        np.testing.assert_array_equal,
        (objective, sums, gradients),
        (expected.nll, expected, theirs),
    )


def test_float16_keeps_the_probabilities_of_a_large_vocabulary() -> None:
    """If the label is nearly certain, the other words have 1e-7 each, below float16's range."""
    rng = np.random.default_rng(0)
    rows = 49_152
    x = rng.normal(size=(1, 4, D)).astype(np.float16)
    head = rng.normal(scale=0.02, size=(rows, D)).astype(np.float16).astype(np.float32)
    labels = np.array([[5, 6, 7, 8]], np.int32)
    for token, label in enumerate(labels[0]):
        head[label] = (
            x[0, token].astype(np.float32) * 16 / np.square(x[0, token].astype(np.float32)).sum()
        ).astype(np.float16)
    mask = jnp.ones((1, 4), bool)
    arguments = jnp.asarray(head), jnp.asarray(labels), mask
    _, (dx, dhead) = with_gradients(lambda *a: head_loss(*a, rows, Chunks(WHOLE)))(
        jnp.asarray(x), *arguments
    )
    _, (dx32, dhead32) = exact(rows)(jnp.asarray(x, jnp.float32), *arguments)
    assert (dx.dtype, dhead.dtype) == (jnp.float16, jnp.float32)
    others = np.setdiff1d(np.arange(rows), labels)
    assert 1e-9 < np.abs(dhead32[others]).mean() < 1e-6
    assert np.linalg.norm((dhead - dhead32)[others]) <= 0.05 * np.linalg.norm(dhead32[others])
    assert np.linalg.norm(dx.astype(jnp.float32) - dx32) <= 0.05 * np.linalg.norm(dx32)
