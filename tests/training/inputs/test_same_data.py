"""What counts as the same run: the content of the caller's data, and the initial weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.accepted_data import as_source
from consyn_jax.training.inputs.arrays import complete
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.inputs.initial_model import weights_of

RNG = np.random.default_rng(4)
ROWS = [{"input_ids": RNG.integers(5, 250, 9).tolist()} for _ in range(24)]
LISTS = [row["input_ids"] for row in ROWS]
BATCHES = [{"input_ids": np.array(LISTS[i : i + 4])} for i in range(0, 24, 4)]
CONFIG = ModelConfig(
    vocab_size=260,
    hidden_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=32,
    context=8,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=258,
)


def source(data: Any, **changes: Any) -> BatchSource:
    settings = {"batch_size": 4, "block_size": 8, "seed": 1, "bos_id": 256, "eos_id": 257}
    return as_source(data, **{**settings, "pad_id": 258, "vocab_size": 260, **changes})


def loader(rows: list[dict[str, Any]], **options: Any) -> Any:
    from torch.utils.data import DataLoader

    collate = lambda group: {"input_ids": np.array([row["input_ids"] for row in group])}  # noqa: E731
    return DataLoader(rows, batch_size=4, collate_fn=collate, **options)  # type: ignore[arg-type]


def changed(rows: list[Any], i: int = 17) -> list[Any]:
    """The same rows but for one id in the middle of one of them."""
    other = [dict(row) if isinstance(row, dict) else list(row) for row in rows]
    ids = other[i]["input_ids"] if isinstance(other[i], dict) else other[i]
    new = list(ids)
    new[4] += 1
    other[i] = {"input_ids": new} if isinstance(other[i], dict) else new
    return other


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def as_batches(rows: list[dict[str, Any]]) -> Any:
    ids = [row["input_ids"] for row in rows]
    return [{"input_ids": np.array(ids[i : i + 4])} for i in range(0, 24, 4)]


@pytest.mark.torch
@pytest.mark.parametrize(
    "make",
    [
        lambda rows: rows,
        lambda rows: [row["input_ids"] for row in rows],
        lambda rows: np.array([row["input_ids"] for row in rows]),
        lambda rows: {"input_ids": [row["input_ids"] for row in rows]},
        as_batches,
        as_dataset,
        loader,
        lambda rows: loader(rows, shuffle=True),
    ],
)
def test_one_other_id_is_other_data(make: Any) -> None:
    mine, again, other = source(make(ROWS)), source(make(ROWS)), source(make(changed(ROWS)))
    assert mine.content_is_known
    assert mine.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.torch
def test_another_sampler_or_collator_is_other_data() -> None:
    from torch.utils.data import (
        DataLoader,
        RandomSampler,
        Sampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
    )

    def plain(group: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": np.array([row["input_ids"] for row in group])}

    def masked(group: list[dict[str, Any]]) -> dict[str, Any]:
        labels = plain(group)["input_ids"].copy()
        labels[:, :3] = -100
        return {**plain(group), "labels": labels}

    class Backwards(Sampler):
        def __init__(self) -> None:
            self.count = len(ROWS)

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.count - 1, -1, -1))

        def __len__(self) -> int:
            return self.count

    def made(collate: Any = plain, **options: Any) -> BatchSource:
        return source(DataLoader(ROWS, batch_size=4, collate_fn=collate, **options))  # type: ignore[arg-type]

    loaders = [
        {},
        {"collate": masked},
        {"shuffle": True},
        {"sampler": SubsetRandomSampler(range(8))},
        {"sampler": SubsetRandomSampler(range(8, 16))},
        {"sampler": WeightedRandomSampler([1.0] * 24, 24)},
        {"sampler": WeightedRandomSampler([1.0] * 12 + [2.0] * 12, 24)},
        {"sampler": RandomSampler(ROWS, replacement=True, num_samples=12)},  # type: ignore[arg-type]
        {"sampler": Backwards()},
    ]
    found = [made(**options) for options in loaders]
    assert all(one.content_is_known for one in found)
    assert [one.fingerprint for one in found] == [made(**o).fingerprint for o in loaders]
    assert len({one.fingerprint for one in found}) == len(loaders)
    rng = np.random.default_rng(0)
    drawn = made(lambda group: {"input_ids": rng.integers(5, 250, (len(group), 9))})
    assert not drawn.content_is_known
    by_object = SubsetRandomSampler(range(8))
    by_object.curriculum = object()  # type: ignore[attr-defined]
    assert not made(sampler=by_object).content_is_known


def test_what_cannot_be_read_beforehand_is_not_known() -> None:
    assert not source(iter(BATCHES)).content_is_known

    class Passes:
        def __iter__(self) -> Iterator[Any]:
            return iter(BATCHES)

    assert not source(Passes()).content_is_known


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 5000, 3, 4, 5, 6, 7, 8, 9]}, r"Row 3 .* token id 5,000 in input_ids"),
        ({"input_ids": [1, -1, 3, 4, 5, 6, 7, 8, 9]}, r"Row 3 .* token id -1 in input_ids"),
    ],
)
def test_wrong_ids_are_refused_before_the_first_step(row: dict[str, Any], message: str) -> None:
    rows = [*ROWS[:3], row, *ROWS[3:]]
    with pytest.raises(UserError, match=message):
        source(rows)
    with pytest.raises(UserError, match=message.replace("Row 3 ", "Document 3 ")):
        source([r["input_ids"] for r in rows])
    with pytest.raises(UserError, match=message.replace("Row 3 ", "Batch 0 of .*, row 3,")):
        source(as_batches(rows[:24]))
    generated = source(iter(BATCHES + as_batches(rows[:24])))
    place = f"Batch {len(BATCHES)} of .*, row 3,"
    with pytest.raises(UserError, match=message.replace("Row 3 ", place)):
        list(generated.training(0, 4, 1, np.arange(4)))
    with pytest.raises(UserError, match=message):
        source(rows, name="eval_dataloader")


def test_labels_of_minus_one_are_no_targets() -> None:
    ids = np.arange(10, 18)[None]
    for ignored in (-100, -1):
        labels = np.where(np.arange(8) < 3, ignored, ids + 1)
        batch = complete({"input_ids": ids, "labels": labels})
        assert batch["loss_mask"].tolist() == [[False] * 3 + [True] * 5]
        assert (batch["labels"] >= 0).all()
    with pytest.raises(UserError, match=r"Row 0 of .* has label -2 at position"):
        source([{"input_ids": ids[0], "labels": np.where(np.arange(8) < 3, -2, ids[0] + 1)}])


def test_positions_that_restart_part_a_row_like_segment_ids() -> None:
    ids = np.arange(10, 18)[None]
    by_positions = complete({"input_ids": ids, "position_ids": [[0, 1, 2, 0, 1, 2, 3, 4]]})
    by_segments = complete({"input_ids": ids, "segment_ids": [[1, 1, 1, 2, 2, 2, 2, 2]]})
    for name, values in by_segments.items():
        np.testing.assert_array_equal(by_positions[name], values)
    with pytest.raises(UserError, match="neither count up by one nor restart"):
        source([{"input_ids": ids[0], "position_ids": ids[0] * 2}])


def model(seed: int) -> ConsynLMHeadModel:
    return ConsynLMHeadModel(CONFIG, rngs=nnx.Rngs(seed))


@pytest.mark.slow
def test_initial_weights_belong_to_a_run(tmp_path: Path) -> None:
    one, same, other = model(0), model(0), model(1)
    assert weights_of(one) == weights_of(same) != weights_of(other)
    almost = jax.tree.map(lambda leaf: leaf, one.parameters)
    leaves, tree = jax.tree.flatten(almost)
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].add(1e-3)
    changed_model = ConsynLMHeadModel.from_parameters(CONFIG, jax.tree.unflatten(tree, leaves))
    assert weights_of(changed_model) != weights_of(one)

    def trainer(data: Any, begins: ConsynLMHeadModel, **more: Any) -> ConsynTrainer:
        settings = {"max_steps": 2, "batch_size": 4, "logging_backend": "none", "quiet": True}
        return ConsynTrainer(begins, data, output_dir=tmp_path / "run", **settings, **more)

    trainer(ROWS, one).train()
    with pytest.raises(UserError, match="the initial weights changed"):
        trainer(ROWS, other).train()
    with pytest.raises(UserError, match="the training data changed"):
        trainer(changed(ROWS), same).train()
    trainer(ROWS, model(0)).train()  # complete

    def generated(output: str) -> ConsynTrainer:
        settings = {"max_steps": 2, "batch_size": 4, "logging_backend": "none", "quiet": True}
        return ConsynTrainer(model(0), iter(BATCHES), output_dir=tmp_path / output, **settings)

    generated("iterator").train()
    said = (
        r"is complete, and an iterator or random data cannot be compared with the data of that run"
    )
    with pytest.raises(UserError, match=said):
        generated("iterator").train()
