"""Data as other libraries hold it gives the batches of the same data as plain lists."""

from collections.abc import Callable
from typing import Any

import datasets
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.accepted_data import as_source

ALL = np.arange(4)
RNG = np.random.default_rng(5)
ARRAY = RNG.integers(5, 250, (13, 12))
ROWS = [RNG.integers(5, 250, n).tolist() for n in RNG.integers(4, 13, 14)]
LABELS = [[-100, *row[2:], 2] for row in ROWS]  # the first is a prompt
ITEMS = [{"input_ids": row} for row in ROWS]
LABELLED = [{"input_ids": row, "labels": labels} for row, labels in zip(ROWS, LABELS, strict=True)]
FIXED = [{"input_ids": row.tolist()} for row in ARRAY]


def batches(data: Any, steps: int = 6, **changes: Any) -> list[dict[str, np.ndarray]]:
    """Training batches of some epochs, then those of an evaluation."""
    settings = {
        "batch_size": 4,
        "block_size": 12,
        "seed": 1,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 0,
        "vocab_size": 260,
    }
    train = as_source(data() if callable(data) else data, **settings | changes)
    evaluation = as_source(
        data() if callable(data) else data, **settings | changes, name="eval_dataloader"
    )
    steps_of = train.training(0, 4, 1, ALL)
    return [next(steps_of) for _ in range(steps)] + list(evaluation.evaluation(4, ALL))


def same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
    "array", [np.asarray, torch.tensor, jnp.asarray, lambda rows: np.asarray(rows, np.uint16)]
)
def test_an_array_is_a_list_of_token_lists(array: Callable[[Any], Any]) -> None:
    same(batches(array(ARRAY)), batches(ARRAY.tolist()))


@pytest.mark.parametrize(
    "kind",
    [
        lambda: datasets.Dataset.from_list(LABELLED),
        lambda: datasets.Dataset.from_list(LABELLED).with_format("torch"),
        lambda: datasets.Dataset.from_list(LABELLED).with_format("numpy"),
        lambda: {name: [row[name] for row in LABELLED] for name in LABELLED[0]},
        lambda: BatchEncoding({name: [row[name] for row in LABELLED] for name in LABELLED[0]}),
        lambda: [BatchEncoding(row) for row in LABELLED],
        lambda: [{name: torch.tensor(ids) for name, ids in row.items()} for row in LABELLED],
        lambda: [tuple(torch.tensor(ids) for ids in row.values()) for row in LABELLED],
    ],
)
def test_rows_of_any_library_are_a_list_of_rows(kind: Callable[[], Any]) -> None:
    same(batches(kind), batches(LABELLED))


def test_a_tokenizer_of_transformers_pads_as_we_do(tmp_path: Any) -> None:
    BPETokenizer.bytes().save(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [f"{n} is {'even' if n % 2 else 'odd'}"[: 6 + n] for n in range(9)]
    unpadded = tokenizer(texts)
    plain = [{"input_ids": ids} for ids in unpadded["input_ids"]]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    assert isinstance(padded, BatchEncoding)
    assert not padded["attention_mask"].all()
    settings = {"block_size": max(map(len, unpadded["input_ids"]))}
    for data in (unpadded, padded, tokenizer(texts, padding=True, return_tensors="np")):
        for a, b in zip(batches(data, **settings), batches(plain, **settings), strict=True):
            np.testing.assert_array_equal(a["loss_mask"], b["loss_mask"])
            np.testing.assert_array_equal(a["labels"][a["loss_mask"]], b["labels"][b["loss_mask"]])
            seen = b["segment_ids"] > 0
            np.testing.assert_array_equal(a["input_ids"][seen], b["input_ids"][seen])
            np.testing.assert_array_equal(a["segment_ids"][seen], b["segment_ids"][seen])


def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize(
    "kind",
    [
        lambda: DataLoader(FIXED, batch_size=4, collate_fn=collated),
        lambda: DataLoader(datasets.Dataset.from_list(FIXED).with_format("torch"), batch_size=4),
        lambda: DataLoader(TensorDataset(torch.tensor(ARRAY)), batch_size=4),
        lambda: [ARRAY[i : i + 4] for i in range(0, 13, 4)],
        lambda: [torch.tensor(ARRAY[i : i + 4]) for i in range(0, 13, 4)],
        lambda: [BatchEncoding({"input_ids": ARRAY[i : i + 4]}) for i in range(0, 13, 4)],
    ],
)
def test_batches_of_any_library_are_a_list_of_batches(kind: Callable[[], Any]) -> None:
    plain = [{"input_ids": ARRAY[i : i + 4].tolist()} for i in range(0, 13, 4)]
    same(batches(kind), batches(plain))


def test_a_collator_of_transformers_masks_and_shifts_as_its_models_do(tmp_path: Any) -> None:
    """Its labels are the ids, -100 where padded; the models of transformers shift them."""
    BPETokenizer.bytes().save(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, pad_token="<pad>")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = DataLoader(datasets.Dataset.from_list(ITEMS), batch_size=4, collate_fn=collator)
    first = next(iter(loader))
    assert isinstance(first, BatchEncoding)
    assert (first["labels"] == -100).any()
    plain = [collated(ITEMS[i : i + 4]) for i in range(0, len(ITEMS), 4)]
    for a, b in zip(batches(loader), batches(plain), strict=True):
        np.testing.assert_array_equal(a["loss_mask"], b["loss_mask"])
        np.testing.assert_array_equal(a["labels"][a["loss_mask"]], b["labels"][b["loss_mask"]])
        seen = b["segment_ids"] > 0
        np.testing.assert_array_equal(a["input_ids"][seen], b["input_ids"][seen])


class Streaming(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(FIXED)

    def __len__(self) -> int:
        return len(FIXED)


@pytest.mark.parametrize(
    "kind",
    [
        Streaming,
        lambda: datasets.Dataset.from_list(FIXED).to_iterable_dataset(),
        lambda: DataLoader(Streaming(), batch_size=4, collate_fn=collated),
    ],
)
def test_rows_that_can_only_be_iterated_over_come_in_their_order(kind: Callable[[], Any]) -> None:
    plain = [{"input_ids": ARRAY[i : i + 4].tolist()} for i in range(0, 13, 4)]
    same(batches(kind), batches(plain))


def test_a_shuffled_loader_gives_its_first_batches_first() -> None:
    """To know the first batch before the run must not skip it."""
    loaders = [
        DataLoader(
            TensorDataset(torch.tensor(ARRAY)),
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
        )
        for _ in range(2)
    ]
    source = as_source(
        loaders[0],
        batch_size=4,
        block_size=12,
        seed=1,
        bos_id=1,
        eos_id=2,
        pad_id=0,
        vocab_size=260,
    )
    found = source.training(0, 4, 1, ALL)
    for _ in range(2):
        for (ids,) in loaders[1]:
            rows = next(found)["input_ids"][0, : len(ids), :11]
            np.testing.assert_array_equal(rows, ids[:, :11])
