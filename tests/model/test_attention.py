import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.model import attention
from consyn_jax.model.arithmetic import query_blocks
from consyn_jax.model.attention import CHOSEN, causal_attention, choose_attention
from consyn_jax.model.dropout import Dropout
from consyn_jax.model.kernels.reference_attention import attend, attention_mask, documents

T = 16
SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 10, [1] * 9 + [2] * 4 + [0] * 3], np.int32)


def visible(segments: np.ndarray | None, window: int | None) -> np.ndarray:
    """[B, T, S]: the keys that each query sees, by the definition."""
    seen = np.zeros((2, T, T), bool)
    for b in range(2):
        for t in range(T):
            for s in range(t + 1):
                same = segments is None or segments[b, s] == segments[b, t]
                seen[b, t, s] = same and (window is None or t - s < window)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", CHOSEN)
@pytest.mark.usefixtures("interpreted")
def test_each_backend_sees_exactly_the_visible_keys(
    backend: str, packed: bool, window: int | None, context: int
) -> None:
    """With equal scores and one-hot values, output (t, s) is 1 / (visible keys), or 0 if hidden."""
    q, k = jnp.zeros((2, T, 4, T)), jnp.zeros((2, T, 2, T))
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None, :], (2, T, 2, T))
    inside = documents(jnp.asarray(SEGMENTS)) if packed else None

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_attention(q, k, v, inside, backend=backend, sliding_window=window)

    if context == 1:
        out = jax.jit(run)(q, k, v)
    else:
        mesh = build_mesh(
            dict.fromkeys(AXES, 1) | {"context": context, "tensor": 2}, jax.devices()[: 2 * context]
        )
        with jax.set_mesh(mesh):
            out = jax.jit(run)(q, k, v)
    expected = visible(SEGMENTS if packed else None, window)
    for head in range(4):
        np.testing.assert_array_equal(out[:, :, head] > 0, expected)
    np.testing.assert_allclose(out[:, :, 0], expected / expected.sum(-1, keepdims=True), rtol=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12))
def test_documents_begin_and_end_where_the_id_changes(runs: list[tuple[int, int]]) -> None:
    segments = np.concatenate([np.full(n, segment) for segment, n in runs])
    segments = np.pad(segments, (0, 12 * 9 - len(segments)), constant_values=9).astype(
        np.int32
    )  # one shape, compiled once
    changes = np.flatnonzero(np.diff(segments))
    first, last = np.array([0, *(changes + 1)]), np.array([*changes, len(segments) - 1])
    which = np.searchsorted(last, np.arange(len(segments)))
    found = documents(jnp.asarray(segments)[None])
    np.testing.assert_array_equal(found.first_BT[0], first[which])
    np.testing.assert_array_equal(found.last_BT[0], last[which])


@pytest.mark.parametrize(
    ("packed", "window", "rate"), [(True, None, 0.0), (False, 100, 0.0), (True, None, 0.25)]
)
def test_blocks_of_queries_equal_the_whole(packed: bool, window: int | None, rate: float) -> None:
    rng, length = np.random.default_rng(0), 256
    q, k, v, dout = (
        jnp.asarray(rng.normal(size=(2, length, n, 8)), jnp.float32) for n in (4, 2, 2, 4)
    )
    segments = jnp.asarray(np.sort(rng.integers(0, 5, (2, length))), jnp.int32)
    inside = documents(segments) if packed else None
    positions = jnp.arange(length)
    mask = attention_mask(positions, positions, inside and inside.first_BT, window)
    dropout = Dropout(jax.random.key(0), rate) if rate else None
    drop = None
    if dropout is not None:
        kept = dropout.kept((2, 4, length, length), ("batch", "heads", "sequence", None))
        drop = lambda weights: dropout.apply(weights, kept.reshape(weights.shape))  # noqa: E731
    assert query_blocks(length) == 4
    blocks = partial(causal_attention, inside=inside, backend="xla", sliding_window=window)
    found, expected = (
        jax.vjp(f, q, k, v)
        for f in (partial(blocks, dropout=dropout), partial(attend, mask=mask, drop=drop))
    )
    for got, want in zip(
        (found[0], *found[1](dout)), (expected[0], *expected[1](dout)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.users_compiler
def test_grouped_attention_equals_torch() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, T, heads, 8)).astype(np.float32) for heads in (6, 2, 2))
    mask = visible(SEGMENTS, 4)[:, None]
    ours = attend(*map(jnp.asarray, (q, k, v, mask)))
    heads_first = [torch.tensor(a).transpose(1, 2) for a in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=torch.tensor(mask), enable_gqa=True
    )
    np.testing.assert_allclose(ours, theirs.transpose(1, 2), atol=1e-6)


def test_with_dropout_tpus_get_the_plain_backend() -> None:
    choice = choose_attention("tpu", jnp.bfloat16, 64, dropout=0.1)
    assert choice.backend == "xla"
    assert "splash attention has no dropout" in choice.reason


def test_scores_are_scaled_by_the_root_of_the_head_dim() -> None:
    q = jnp.zeros((1, 2, 1, 16)).at[0, 1, 0, 0].set(8.0)
    k = jnp.zeros((1, 2, 1, 16)).at[0, 1, 0, 0].set(1.0)
    v = jnp.zeros((1, 2, 1, 16)).at[0, 1, 0, 0].set(1.0)
    out = causal_attention(q, k, v, None, backend="xla")
    assert float(out[0, 1, 0, 0]) == pytest.approx(1 / (1 + math.exp(-8 / 4)), rel=1e-6)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "capability", "backend", "words"),
    [
        ("cpu", jnp.bfloat16, 64, "", "xla", "the cpu has no fused kernel"),
        ("tpu", jnp.bfloat16, 64, "", "splash", "JAX's splash attention"),
        ("rocm", jnp.bfloat16, 64, "", "xla", "the rocm has no fused kernel"),
        ("gpu", jnp.bfloat16, 64, "9.0", "fused", "this package's kernel"),
        ("cuda", jnp.float16, 128, "8.0", "fused", "tiles chosen on Hopper and not on this GPU"),
        ("gpu", jnp.bfloat16, 128, "10.0", "fused", "tiles chosen on Hopper and not on this GPU"),
        (
            "gpu",
            jnp.float32,
            64,
            "9.0",
            "xla",
            "needs bf16 or fp16, and the run computes in float32",
        ),
        (
            "gpu",
            jnp.bfloat16,
            64,
            "7.5",
            "xla",
            "needs compute capability 8.0, and this GPU has 7.5",
        ),
        ("gpu", jnp.bfloat16, 256, "9.0", "xla", "a multiple of 8 and at most 128, not 256"),
        ("gpu", jnp.bfloat16, 20, "9.0", "xla", "not 20"),
    ],
)
def test_the_backend_is_chosen_with_a_reason(
    platform: str, dtype: Any, head_dim: int, capability: str, backend: str, words: str
) -> None:
    choice = choose_attention(platform, dtype, head_dim, capability)
    assert choice.backend == backend
    assert words in choice.reason
    assert ("tiles" in choice.reason) == ("tiles" in words)


@pytest.mark.parametrize(
    ("capability", "dtype", "backend", "reason"),
    [
        ("9.0", jnp.bfloat16, "hopper", "this package's kernel for Hopper"),
        ("8.0", jnp.bfloat16, "fused", "tiles chosen on Hopper and not on this GPU"),
        ("9.0", jnp.float32, "xla", "needs bf16 or fp16"),
    ],
)
def test_a_backend_for_one_kind_of_gpu_changes_nothing_for_others(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: Any, backend: str, reason: str
) -> None:
    monkeypatch.setattr(attention, "CHOSEN", ("hopper", *CHOSEN))
    choice = choose_attention("gpu", dtype, 64, capability)
    assert (choice.backend, choice.reason.count(reason)) == (backend, 1)
    assert ("Hopper" in choice.reason) == ("Hopper" in reason)
