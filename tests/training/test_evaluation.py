import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from consyn_jax.config import ModelConfig
from consyn_jax.data.loader import evaluation_batches
from consyn_jax.data.packing import PackedDataset, memory_split
from consyn_jax.distributed.mesh import AXES, build_mesh
from consyn_jax.model.parameters import layout
from consyn_jax.model.transformer import Compute
from consyn_jax.training.evaluation import evaluate
from consyn_jax.training.loss import LossSums
from consyn_jax.training.program import Program

CONFIG = ModelConfig(vocab_size=50, hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, context=64)


def sums(nll: float, tokens: float, correct: float) -> LossSums:
    return LossSums(jnp.float32(nll), jnp.float32(tokens), jnp.float32(correct))


def test_metrics_are_sums_over_sums() -> None:
    metrics = evaluate(lambda batch: batch, [sums(30, 10, 4), sums(2, 2, 2), sums(0, 0, 0)], num_bytes=20)
    assert metrics == {
        "eval/loss": pytest.approx(32 / 12),
        "eval/perplexity": pytest.approx(math.exp(32 / 12)),
        "eval/accuracy": pytest.approx(0.5),
        "eval/tokens": 12,
        "eval/bits_per_byte": pytest.approx(32 / math.log(2) / 20),
    }


def test_totals_are_float64() -> None:
    """In float32 a sum of 2**24 does not grow by one."""
    metrics = evaluate(lambda batch: batch, [sums(2**24, 2**24, 0)] + [sums(1, 1, 1)] * 1000)
    assert metrics["eval/tokens"] == 2**24 + 1000
    assert metrics["eval/accuracy"] == 1000 / (2**24 + 1000)
    assert "eval/bits_per_byte" not in metrics


def test_nothing_to_evaluate_is_no_number() -> None:
    for batches in ([], [sums(0, 0, 0)]):
        metrics = evaluate(lambda batch: batch, batches)
        assert math.isnan(metrics["eval/loss"])
        assert metrics["eval/tokens"] == 0
    assert evaluate(lambda batch: batch, [sums(1e4, 1, 0)])["eval/perplexity"] == math.inf


def test_the_next_batch_is_dispatched_before_the_last_is_read() -> None:
    order: list[str] = []

    class Pending(float):
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            order.append(f"read {float(self)}")
            return np.array(float(self))

    def dispatch(batch: float) -> Any:
        order.append(f"dispatch {batch}")
        return (Pending(batch), 1.0, 1.0)

    evaluate(dispatch, [1.0, 2.0])
    assert order.index("dispatch 2.0") < order.index("read 1.0")


def test_batch_size_and_padding_do_not_count() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 49, n) for n in (40, 3, 1, 77, 20)]
    dataset = PackedDataset(memory_split(documents, 49), 16, bos_id=48, pad_id=0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), layout(CONFIG).shapes)
    program = Program(CONFIG, Compute(), optax.sgd(1.0), 0.0, build_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1]))
    step = jax.jit(program.loss)

    def metrics(batch_size: int) -> dict[str, float]:
        batches = evaluation_batches(dataset, batch_size)
        return evaluate(lambda batch: step(params, jax.tree.map(jnp.asarray, batch)), batches, num_bytes=300)

    alone = metrics(1)
    assert alone["eval/tokens"] == dataset.num_tokens == 146
    assert alone["eval/tokens"] % 16, "the last row is padded"
    for batch_size in (7, 16):
        assert metrics(batch_size) == pytest.approx(alone, rel=1e-6)
