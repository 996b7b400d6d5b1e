import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from consyn_jax.config import RegularisationOptions
from consyn_jax.data.loader import evaluation_batches
from consyn_jax.data.packing import PackedDataset
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.distributed.mesh import AXES, build_mesh, mesh_sizes, sharding
from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.evaluation import evaluate
from consyn_jax.training.loss import LossSums
from consyn_jax.training.program import EVAL_AXES, Program

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=64,
)


def sums(nll: float, tokens: float, correct: float) -> LossSums:
    return LossSums(jnp.float32(nll), jnp.float32(tokens), jnp.float32(correct))


def test_metrics_are_ratios_of_sums() -> None:
    metrics = evaluate(
        lambda batch: batch, [sums(30, 10, 4), sums(2, 2, 2), sums(0, 0, 0)], num_bytes=20
    )
    assert metrics == {
        "eval/loss": pytest.approx(32 / 12),
        "eval/perplexity": pytest.approx(math.exp(32 / 12)),
        "eval/accuracy": pytest.approx(0.5),
        "eval/tokens": 12,
        "eval/bits_per_byte": pytest.approx(32 / math.log(2) / 20),
    }


def test_totals_are_float64() -> None:
    """In float32, adding one to 2**24 changes nothing."""
    metrics = evaluate(lambda batch: batch, [sums(2**24, 2**24, 0)] + [sums(1, 1, 1)] * 1000)
    assert metrics["eval/tokens"] == 2**24 + 1000
    assert metrics["eval/accuracy"] == 1000 / (2**24 + 1000)
    assert "eval/bits_per_byte" not in metrics


def test_no_tokens_are_an_error_and_no_nan() -> None:
    for batches in ([], [sums(0, 0, 0)]):
        with pytest.raises(UserError, match="No token of the evaluation data counts in the loss"):
            evaluate(lambda batch: batch, batches)


def test_the_next_batch_is_dispatched_before_the_last_is_read() -> None:
    order: list[str] = []

    class Pending(float):
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            order.append(f"read {float(self)}")
            return np.array(float(self))

    def dispatch(batch: float) -> Any:
        order.append(f"dispatch {batch}")
        return LossSums(Pending(batch), 1.0, 1.0)  # type: ignore[arg-type]

    evaluate(dispatch, [1.0, 2.0])
    assert order.index("dispatch 2.0") < order.index("read 1.0")


DOCUMENTS = [np.random.default_rng(0).integers(0, 49, n) for n in (40, 3, 1, 77, 20)]
MESHES = [
    {"data": 2},
    {"fsdp": 2},
    {"tensor": 2},
    {"context": 4},
    {"data": 2, "fsdp": 2},
    {"fsdp": 8},
    {"fsdp": 2, "context": 2, "tensor": 2},
]


def metrics(
    batch_size: int,
    padding: int = 0,
    axes: dict[str, int] | None = None,
    in_front: int = 0,
    **regularisation: float,
) -> dict[str, float]:
    """Metrics of a fixed random model over the documents, in rows of 16 tokens.

    Each row has `padding` more columns without text, `in_front` of them first.
    """
    dataset = PackedDataset(StoreSplit([MemoryShard(DOCUMENTS, 49)]), 16, bos_id=48, pad_id=0)
    sizes = dict.fromkeys(AXES, 1) | (axes or {})
    mesh = build_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    program = Program(
        CONFIG, Compute(), optax.sgd(1.0), 0.0, mesh, RegularisationOptions(**regularisation)
    )
    rng = np.random.default_rng(1)
    random = jax.tree.map(
        lambda leaf: np.asarray(0.3 * rng.normal(size=leaf.shape), np.float32),
        layout(CONFIG).shapes,
    )
    params = jax.tree.map(jax.device_put, random, layout(CONFIG).shardings(mesh))
    step = program.lower_eval_step(batch_size, 16 + padding).compile()

    def placed(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        more = {"input_ids": 7, "labels": 7, "segment_ids": 0, "loss_mask": False}
        wide = {
            name: np.pad(
                values, ((0, 0), (in_front, padding - in_front)), constant_values=more[name]
            )
            for name, values in batch.items()
        }
        return {
            name: jax.device_put(values, sharding(mesh, EVAL_AXES)) for name, values in wide.items()
        }

    return evaluate(
        lambda batch: step(params, batch),
        map(placed, evaluation_batches(dataset, batch_size)),
        num_bytes=300,
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, float]:
    found = metrics(1)
    assert found["eval/tokens"] == 146
    assert found["eval/tokens"] % 16, "the last row is padded"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [*range(2, 17)])
def test_the_batch_size_has_no_effect(batch_size: int, alone: dict[str, float]) -> None:
    assert metrics(batch_size) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("padding", [1, 8, 48])
def test_padding_has_no_effect(padding: int, alone: dict[str, float]) -> None:
    assert metrics(4, padding) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("in_front", [5, 48])
def test_padding_in_front_has_no_effect(in_front: int, alone: dict[str, float]) -> None:
    assert metrics(4, 48, in_front=in_front) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("devices", [3, 5, 6, 7])
def test_the_number_of_devices_has_no_effect(devices: int, alone: dict[str, float]) -> None:
    """Powers of two are among the meshes of the next test."""
    assert metrics(devices, 4, {"data": devices}) == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_the_mesh_has_no_effect(axes: dict[str, int], alone: dict[str, float]) -> None:
    assert metrics(8, axes=axes) == pytest.approx(alone, rel=1e-6)
    assert metrics(16, 16, axes) == pytest.approx(alone, rel=1e-6)


def test_evaluation_has_no_regularisation(alone: dict[str, float]) -> None:
    assert metrics(1, dropout=0.5, label_smoothing=0.1, z_loss=0.1) == alone


def test_evaluation_is_compiled_for_the_mesh_of_training() -> None:
    """Without it, activations are not sharded, and each device computes whole kernels and rows."""
    sizes = dict.fromkeys(AXES, 1) | {"fsdp": 2, "context": 2, "tensor": 2}
    mesh = build_mesh(sizes, jax.devices()[:8])
    program = Program(CONFIG, Compute(), optax.sgd(1.0), 0.0, mesh, RegularisationOptions())
    seen = []

    def forward(params: Params, batch: Any) -> jax.Array:
        seen.append(mesh_sizes())
        return jnp.zeros(())

    program.lower_forward(forward, program.batch_like((4, 16), EVAL_AXES))
    assert seen == [sizes]
