import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from consyn_jax.data.packing import PackedDataset
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.data.streaming import FirstWindows, Streamed
from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.accepted_data import as_source
from consyn_jax.training.dataset import MixedDataset, get_dataset
from consyn_jax.training.inputs import given_batches
from consyn_jax.training.inputs.arrays import complete
from consyn_jax.training.inputs.batch_source import BatchSource

IDS = np.arange(20).reshape(2, 10) + 30
ALL = np.arange(4)


def source_of(data: Any, **changes: Any) -> BatchSource:
    return as_source(
        data,
        **(
            {
                "batch_size": 4,
                "block_size": 8,
                "seed": 1,
                "bos_id": 1,
                "eos_id": 2,
                "pad_id": 0,
                "vocab_size": 260,
            }
            | changes
        ),
    )


# ---------------------------------------------------------------------------------------- one batch


def test_ids_alone_are_shifted() -> None:
    batch = complete({"input_ids": IDS})
    np.testing.assert_array_equal(batch["input_ids"], IDS[:, :-1])
    np.testing.assert_array_equal(batch["labels"], IDS[:, 1:])
    assert batch["loss_mask"].all()
    assert (batch["segment_ids"] == 1).all()
    assert {name: values.dtype for name, values in batch.items()} == {
        "input_ids": np.int32,
        "labels": np.int32,
        "segment_ids": np.int32,
        "loss_mask": np.bool_,
    }


def test_padding_and_document_boundaries_are_no_targets() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 0], [1] * 10])
    batch = complete({"input_ids": IDS, "segment_ids": segments})
    np.testing.assert_array_equal(batch["loss_mask"][0], [1, 1, 0, 1, 1, 1, 0, 0, 0])
    assert batch["loss_mask"][1].all()
    attended = complete({"input_ids": IDS, "attention_mask": segments > 0})
    np.testing.assert_array_equal(attended["loss_mask"][0], [1, 1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(attended["segment_ids"][0], [1, 1, 1, 1, 1, 1, 1, 0, 0])


def test_a_mask_over_ids_is_shifted_with_them() -> None:
    mask = np.ones((2, 10), bool)
    mask[0, :4] = False  # a prompt of four tokens
    batch = complete({"input_ids": IDS, "loss_mask": mask})
    np.testing.assert_array_equal(batch["loss_mask"][0], [0, 0, 0, 1, 1, 1, 1, 1, 1])


def test_labels_of_torch_are_not_shifted() -> None:
    labels = IDS + 1
    labels[0, :3] = -100
    batch = complete({"input_ids": torch.tensor(IDS), "labels": torch.tensor(labels)})
    np.testing.assert_array_equal(batch["loss_mask"], labels != -100)
    np.testing.assert_array_equal(batch["labels"], np.where(labels == -100, 0, labels))
    masked = complete(
        {"input_ids": IDS, "labels": labels, "loss_mask": np.arange(10) < [[5], [10]]}
    )
    np.testing.assert_array_equal(masked["loss_mask"][0], [0, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    padded = complete(
        {"input_ids": IDS, "labels": IDS + 1, "attention_mask": np.arange(10) < [[5], [10]]}
    )
    np.testing.assert_array_equal(padded["loss_mask"][0], [1] * 5 + [0] * 5)


def test_a_complete_batch_is_not_changed() -> None:
    batch = {
        "input_ids": IDS,
        "labels": IDS + 1,
        "segment_ids": np.full_like(IDS, 3),
        "loss_mask": IDS % 2 == 0,
    }
    for name, values in complete({**batch, "anything": "else"}).items():
        np.testing.assert_array_equal(values, batch[name])


def test_labels_that_are_the_ids_are_shifted_as_transformers_models_do() -> None:
    labels = IDS.copy()
    labels[:, :2] = -100
    for given, first in ((IDS, 1), (labels, 2)):
        batch = complete({"input_ids": IDS, "labels": given})
        np.testing.assert_array_equal(batch["input_ids"], IDS[:, :-1])
        np.testing.assert_array_equal(batch["labels"], IDS[:, 1:])
        np.testing.assert_array_equal(batch["loss_mask"], np.arange(1, 10)[None] >= [[first]] * 2)
    ones = np.ones((2, 10), int)
    assert complete({"input_ids": ones, "labels": ones})["loss_mask"].shape == (2, 10), (
        "one token over and over follows itself"
    )
    assert complete({"input_ids": ones, "labels": ones}, True)["loss_mask"].shape == (2, 9)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([1, 2], "is of type list, but must be a dict with 'input_ids'"),
        ({"ids": IDS}, "has no input_ids, but 'ids'. Give the ids of its tokens."),
        (None, "is None, but must be a dict with 'input_ids'"),
        ({"text": "a"}, "Tokenise 'text', or write the rows to a file for get_dataset"),
        ({"input_ids": IDS[0]}, "must be [sequences, tokens], not of shape (10,)"),
        ({"input_ids": [1, 2]}, "must be [sequences, tokens], not of shape (2,)"),
        (
            {"input_ids": IDS, "labels": np.array([0, 1])},
            "labels must have the shape of its input_ids, (2, 10), not (2,)",
        ),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, "not (2, 9)"),
    ],
)
def test_batches_of_another_form_are_refused(raw: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        complete(raw)
    assert words in str(caught.value)


# ------------------------------------------------------------------------------------ kinds of data


class Indexed(torch.utils.data.Dataset):
    """Rows by number, as those of a user's own dataset."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def in_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def in_batches(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in in_columns(rows).items()}


WAYS = {
    "dicts": lambda rows: rows,
    "columns": in_columns,
    "arrays": in_batches,
    "a torch dataset": Indexed,
    "rows one by one": lambda rows: iter(rows),
    "a batch": lambda rows: [in_batches(rows)],
    "batches one by one": lambda rows: iter([in_batches(rows)]),
    "a DataLoader": lambda rows: DataLoader(
        Indexed([{name: torch.tensor(v) for name, v in row.items()} for row in rows]), batch_size=4
    ),
}
TOKENS = [3, 4, 5, 6]
# Columns of the second of four rows, and the message's end; a batch of arrays has no uneven rows.
WRONG = {
    "negative": (
        {"input_ids": [3, -1, 5, 6]},
        "token id -1 in input_ids at position 1, .* (leave it out|attention_mask with 0)",
    ),
    "ignored": ({"input_ids": [-100, 4, 5, 6]}, "-100 in input_ids at position 0, .* only labels"),
    "beyond": (
        {"input_ids": [3, 4, 5, 260]},
        "token id 260 in input_ids at position 3, .* tokeniz",
    ),
    "label": ({"labels": [3, 4, 5, -3]}, "label -3 at position 3, .* not a target with -100"),
    "label beyond": (
        {"labels": [999, 4, 5, 6]},
        "token id 999 in labels at position 0, .* tokeniz",
    ),
    "mask": ({"loss_mask": [0, 0.5, 1, 1]}, "0.5 in loss_mask at position 1. Give 1 for each"),
    "few labels": ({"labels": [3, 4, 5]}, r"labels of shape \(3,\) for 4 input_ids. Give one lab"),
    "long mask": ({"loss_mask": [1] * 5}, r"loss_mask of shape \(5,\) for 4 input_ids. Give 1 for"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", WRONG)
def test_rows_that_cannot_be_are_answered_with_their_place_and_a_remedy(
    way: str, kind: str
) -> None:
    wrong, message = WRONG[kind]
    rows: list[dict[str, Any]] = [
        {"input_ids": TOKENS, "labels": TOKENS, "loss_mask": [0, 1, 1, 1]} for _ in range(4)
    ]
    rows[1] = {**rows[1], **wrong}
    is_uneven = any(len(values) != 4 for values in wrong.values())
    if is_uneven and way not in ("dicts", "columns", "a torch dataset", "rows one by one"):
        rows = [{**row, **wrong} for row in rows]
    with pytest.raises(UserError) as caught:
        list(source_of(WAYS[way](rows)).training(0, 4, 1, ALL))
    assert re.search(rf"of train_dataloader.* has .*{message}", str(caught.value))
    assert is_uneven or "Row 1 of" in str(caught.value) or "row 1," in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", ["input_ids", "labels"])
@pytest.mark.parametrize("way", ["arrays", "a batch", "batches one by one"])
def test_ids_that_may_be_rounded_are_refused(way: str, name: str, dtype: Any) -> None:
    rows = [{"input_ids": TOKENS, "labels": TOKENS}] * 4
    data = in_batches(rows) | {name: np.array([TOKENS] * 4, dtype)}
    given: Any = {"arrays": data, "a batch": [data], "batches one by one": iter([data])}[way]
    found = "labels of float" if name == "labels" else "3.0 in input_ids at position 0"
    with pytest.raises(UserError, match=rf"of train_dataloader.* has {found}.* int32"):
        source_of(given)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            [3, -1],
            "Document 1 of train_dataloader has token id -1 in .* at position 1.*leave it out",
        ),
        ([-100], "Document 1 of .* has -100 in input_ids at position 0"),
        ([3, 300], "Document 1 of .* token id 300 .* Use the tokenizer"),
        ([3.0, 1.5], "Document 1 of .* has 1.5 in input_ids at position 1, but ids are whole"),
        ([[3], [4]], r"Document 1 of .* input_ids of shape \(2, 1\)"),
        (
            [[3], [4, 5]],
            "Document 1 of .* has a list instead of a number in input_ids at position 0",
        ),
        (["a"], "Document 1 of .* has a str instead of a number in input_ids at position 0"),
    ],
)
def test_documents_that_cannot_be_are_answered_the_same_way(
    document: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        source_of([[5, 6], document])
    with pytest.raises(UserError, match=r"Document 1 of train_dataloader has token id -1"):
        source_of(np.array([[5, 6], [7, -1]]))
    with pytest.raises(UserError, match=r"Document 0 of train_dataloader has 1.0 in input_ids"):
        source_of(np.ones((2, 3), np.float32))


@pytest.mark.parametrize("way", ["dicts", "a torch dataset", "rows one by one"])
@pytest.mark.parametrize("of_first", [True, False])
def test_labels_of_some_rows_only_are_refused(way: str, of_first: bool) -> None:
    with_labels, without = {"input_ids": TOKENS, "labels": TOKENS}, {"input_ids": TOKENS}
    rows = [with_labels, without] if of_first else [without, with_labels]
    with pytest.raises(
        UserError, match=r"Row 1 of .* labels, and the first one has .*labels\. Give"
    ):
        list(source_of(WAYS[way](rows)).training(0, 4, 1, ALL))


def test_a_dataset_has_its_order_and_counts() -> None:
    dataset = get_dataset("sample", BPETokenizer.bytes(), block_size=64, seed=5)
    source = source_of(dataset, seed=1, block_size=64)
    assert (source.sequences, source.tokens, source.num_bytes) == (
        len(dataset),
        dataset.num_tokens,
        dataset.num_bytes,
    )
    assert (source.fingerprint, source.packing) == (dataset.fingerprint, "cut")
    whole = get_dataset("sample", BPETokenizer.bytes(), block_size=64, packing="whole")
    assert source_of(whole, block_size=64).packing == "whole"
    assert source_of([{"input_ids": [5, 6, 7]}] * 4).packing is None
    first = next(source.training(0, 4, 1, ALL))
    np.testing.assert_array_equal(first["labels"][0], [dataset[i]["labels"] for i in range(4)])


def test_a_mixture_has_an_order_for_training_and_is_evaluated_as_a_whole() -> None:
    dataset = get_dataset("sample", BPETokenizer.bytes(), block_size=64)
    mixed = MixedDataset({"a": dataset, "b": dataset}, [1, 2], seed=3)
    source = source_of(mixed, block_size=64)
    assert (source.sequences, source.tokens, source.num_bytes) == (
        2 * len(dataset),
        2 * dataset.num_tokens,
        2 * dataset.num_bytes,
    )
    assert (source.fingerprint, source.packing) == (mixed.fingerprint, "cut")
    np.testing.assert_array_equal(
        next(source.training(2, 4, 3, ALL))["labels"].reshape(12, 64),
        mixed.order.at(np.arange(24, 36))["labels"],
    )
    assert (
        sum(int(batch["loss_mask"].sum()) for batch in source.evaluation(4, ALL))
        == mixed.num_tokens
    )


class Growing:
    """A corpus that is complete."""

    tokenizer, key, closed = BPETokenizer.bytes(), "content", False

    def split(self, name: str, tokens: int | None) -> tuple[StoreSplit, bool]:
        return StoreSplit([MemoryShard([np.arange(3, 100)], 2)]) if name == "train" else StoreSplit(
            []
        ), True

    def close(self) -> None:
        self.closed = True


def test_a_growing_corpus_has_an_order_and_no_length() -> None:
    corpus = Growing()
    source, held_out = source_of(Streamed(corpus, 8, seed=1)), source_of(FirstWindows(corpus, 8))
    assert (source.sequences, source.tokens, source.num_bytes) == (None, None, None)
    assert source.fingerprint == held_out.fingerprint == "stream:content"
    assert source.packing == "cut"
    assert next(source.training(1, 4, 2, ALL))["labels"].shape == (2, 4, 8)
    assert held_out.sequences == 0
    assert list(held_out.evaluation(4, ALL)) == []
    with pytest.raises(UserError, match=r"Pass consyn_jax\.data\.streaming\.FirstWindows\("):
        source.evaluation(4, ALL)
    with pytest.raises(UserError, match=r"is the validation data of a corpus \(FirstWindows\)"):
        held_out.training(0, 4, 1, ALL)
    held_out.close()
    assert not corpus.closed
    source.close()
    assert corpus.closed


def test_token_lists_are_documents() -> None:
    source = source_of([[5, 6, 7], [8], [9] * 20])
    assert source.tokens == 4 + 2 + 21, "each with its EOS"
    assert source.sequences == 4
    (batch,) = source.evaluation(4, ALL)
    np.testing.assert_array_equal(batch["input_ids"][0], [1, 5, 6, 7, 1, 8, 1, 9])
    np.testing.assert_array_equal(batch["labels"][0], [5, 6, 7, 2, 8, 2, 9, 9])
    np.testing.assert_array_equal(batch["segment_ids"][0], [1, 1, 1, 1, 2, 2, 3, 3])
    assert source.fingerprint == source_of([[5, 6, 7], [8], [9] * 20]).fingerprint
    assert source.fingerprint != source_of([[5, 6, 7, 8], [9] * 20]).fingerprint


def test_packed_windows_and_items_are_read_in_a_seeded_order() -> None:
    packed = PackedDataset(StoreSplit([MemoryShard([np.arange(3, 100)], 2)]), 8, 1, 0)
    items = [packed[i] for i in range(len(packed))]
    for data in (packed, items):
        source = source_of(data)
        assert source.sequences == len(packed)
        whole = [next(source.training(step, 4, 2, ALL)) for step in range(3)]
        resumed = source.training(1, 4, 2, ALL)
        for batch in whole[1:]:
            assert batch["labels"].shape == (2, 4, 8)
            np.testing.assert_array_equal(next(resumed)["labels"], batch["labels"])
        np.testing.assert_array_equal(
            next(source.training(0, 4, 2, np.array([1, 3])))["labels"],
            whole[0]["labels"][:, [1, 3]],
        )


class TorchDataset(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(9) + i}


def test_a_dataset_of_torch_is_read_item_by_item() -> None:
    source = source_of(TorchDataset())
    assert source.sequences == 10
    (first, *_, last) = source.evaluation(4, ALL)
    np.testing.assert_array_equal(first["labels"], np.arange(1, 9) + np.arange(4)[:, None])
    np.testing.assert_array_equal(last["loss_mask"].any(1), [True, True, False, False])


def test_a_torch_data_loader_is_repeated_and_a_resume_skips() -> None:
    source = source_of(DataLoader(TorchDataset(), batch_size=4, drop_last=True))
    assert source.sequences == 8
    batches = source.training(0, 4, 1, ALL)
    found = [next(batches)["input_ids"][0, :, 0].tolist() for _ in range(5)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    resumed = source.training(1, 4, 2, ALL)
    assert next(resumed)["input_ids"][:, :, 0].tolist() == found[2:4]


def test_a_short_last_batch_is_filled_up_with_masked_rows() -> None:
    source = source_of(DataLoader(TorchDataset(), batch_size=4))
    assert source.sequences == 12
    *_, last = source.evaluation(4, ALL)
    np.testing.assert_array_equal(last["loss_mask"].any(1), [True, True, False, False])
    steps = source.training(0, 4, 3, ALL)
    for _ in range(2):
        batch = next(steps)
        assert batch["labels"].shape == (3, 4, 8)
        assert batch["loss_mask"].any(2).sum(1).tolist() == [4, 4, 2]


def test_evaluation_batches_may_have_any_size() -> None:
    whole = list(source_of(TorchDataset(), name="eval_dataloader").evaluation(4, ALL))
    for size in (1, 3, 7, 10):
        loader = DataLoader(TorchDataset(), batch_size=size)
        source = source_of(loader, name="eval_dataloader")
        batches = list(source.evaluation(4, ALL))
        assert {batch["labels"].shape for batch in batches} == {(4, 8)}
        assert targets_of(batches) == targets_of(whole)


def test_training_batches_of_another_size_are_refused_before_they_are_read() -> None:
    for loader in (
        DataLoader(TorchDataset(), batch_size=2),
        DataLoader(TorchDataset(), batch_size=5),
        [{"input_ids": IDS[:, :9]}] * 12,
        iter([{"input_ids": IDS[:, :9]}] * 12),
    ):
        with pytest.raises(
            UserError, match=r"batches have \d sequences, and batch_size is 4\. Pass batch_size=\d"
        ):
            source_of(loader)


def test_batches_that_turn_out_to_be_larger_become_several() -> None:
    batches = [{"input_ids": np.arange(9) + np.arange(n)[:, None]} for n in (4, 6, 1)]
    source = source_of(iter(batches))
    found = list(source.training(0, 4, 1, ALL))
    assert [batch["loss_mask"].any(2).sum() for batch in found] == [4, 4, 2, 1]
    assert {batch["labels"].shape for batch in found} == {(1, 4, 8)}


def test_halved_batches_give_the_same_steps_and_evaluation() -> None:
    """`--auto_batch` halves batches."""
    source, both = source_of(DataLoader(TorchDataset(), batch_size=4, drop_last=True)), np.arange(2)
    whole, halves = source.training(1, 4, 2, ALL), source.training(1, 2, 4, both)
    for _ in range(3):
        one, other = next(whole), next(halves)
        assert other["labels"].shape == (4, 2, 8)
        np.testing.assert_array_equal(one["labels"].reshape(8, 8), other["labels"].reshape(8, 8))
    short = source_of(DataLoader(TorchDataset(), batch_size=4))
    found = [
        np.concatenate([batch["labels"] for batch in batches])
        for batches in (short.evaluation(4, ALL), short.evaluation(2, both))
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TorchDataset(), batch_size=4),
        TorchDataset(),
        [{"input_ids": IDS[0, :8], "labels": IDS[0, :8] + 1}],
        [{"input_ids": IDS[0, :n]} for n in (5, 9)],
        [{"input_ids": np.arange(n)[None].repeat(4, 0)} for n in (5, 5, 9)],
    ],
    ids=["batches", "items", "items with labels", "an item among others", "a batch among others"],
)
def test_longer_sequences_are_refused_and_shorter_ones_are_padded(data: Any) -> None:
    with pytest.raises(
        UserError, match=r"needs max_tokens=8, but max_tokens is 7\. Shorten the sequence"
    ):
        source_of(data, block_size=7)
    source = source_of(data, block_size=11)
    for batch in (next(source.training(0, 4, 1, ALL)), next(source.evaluation(4, ALL))):
        assert batch["labels"].shape[-2:] == (4, 11)
        assert not batch["loss_mask"][..., 8:].any()
        assert not batch["segment_ids"][..., 8:].any()


@pytest.mark.parametrize(
    "data",
    [
        PackedDataset(StoreSplit([MemoryShard([np.arange(3, 100)], 2)]), 8, 1, 0),
        get_dataset("sample", BPETokenizer.bytes(), block_size=8),
    ],
    ids=["windows", "dataset"],
)
def test_a_packed_dataset_of_another_length_is_refused(data: Any) -> None:
    with pytest.raises(
        UserError, match=r"has sequences of 8 tokens, and max_tokens is 9\. Leave max_tokens out"
    ):
        source_of(data, block_size=9)


class LateLongRows(TorchDataset):
    def __len__(self) -> int:
        return 1200

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(9 + (i >= 1100))}


def test_rows_that_turn_out_to_be_longer_are_cut_and_said_once() -> None:
    """They are not seen before the run, and must not end it at a late step."""
    late = DataLoader(LateLongRows(), batch_size=4, collate_fn=lambda rows: ragged(rows))
    for data in (late, LateLongRows()):
        source, said = source_of(data), []
        source.warn = said.append
        batches = list(source.evaluation(4, ALL))
        assert {batch["labels"].shape for batch in batches} == {(4, 8)}
        assert len(said) == 1
        assert said[0].startswith("A row of the data has 9 tokens; rows are cut to max_tokens")


def ragged(rows: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def targets_of(batches: list[dict[str, np.ndarray]]) -> list[list[int]]:
    """The labels that count in the loss, row by row."""
    rows = [
        labels[mask].tolist()
        for batch in batches
        for labels, mask in zip(batch["labels"], batch["loss_mask"], strict=True)
    ]
    return [row for row in rows if row]


def three() -> Iterator[dict[str, np.ndarray]]:
    for n in range(3):
        yield {"input_ids": IDS + n}


def test_a_generator_ends_and_is_not_read_again() -> None:
    source = source_of(three(), batch_size=2, block_size=9)
    assert len(list(source.training(0, 2, 2, np.arange(2)))) == 1, "half a step is not taken"
    with pytest.raises(UserError, match="train_dataloader is an iterator that has been read"):
        next(source.training(0, 2, 2, np.arange(2)))


def test_an_evaluation_from_a_generator_is_read_once_and_kept() -> None:
    source = source_of(three(), batch_size=4, block_size=9, name="eval_dataloader")
    passes = [list(source.evaluation(4, ALL)) for _ in range(3)]
    assert targets_of(passes[0]) == [(row + n)[1:].tolist() for n in range(3) for row in IDS]
    for again in passes[1:]:
        assert targets_of(again) == targets_of(passes[0])


def test_an_evaluation_from_a_generator_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_batches, "KEPT_TOKENS", 1000)
    endless = ({"input_ids": IDS} for _ in itertools.count())
    with pytest.raises(UserError, match="an iterator of more than 1,000 tokens, too many to keep"):
        source_of(endless, block_size=9, name="eval_dataloader")


@pytest.mark.parametrize("kind", ["documents", "items", "batches", "generator"])
def test_data_without_a_token_to_learn_is_refused_before_the_run(kind: str) -> None:
    row = {"input_ids": IDS[0], "labels": np.full(10, -100)}
    batch = {"input_ids": IDS, "labels": np.full((2, 10), -100)}
    data = {
        "documents": PackedDataset(
            StoreSplit([MemoryShard([np.arange(30)], 2, [np.zeros(31, np.uint8)])]), 10, 1, 0
        ),
        "items": [row] * 3,
        "batches": [batch] * 3,
        "generator": (batch for _ in range(3)),
    }[kind]
    with pytest.raises(UserError, match="No token of the evaluation data counts in the loss"):
        source_of(data, block_size=10, batch_size=2, name="eval_dataloader")
    if kind == "batches":  # only one of several is needed
        source_of(
            [*data, {"input_ids": IDS, "labels": IDS + 1}],
            block_size=10,
            batch_size=2,
            name="eval_dataloader",
        )


@pytest.mark.parametrize(
    ("data", "changes", "words"),
    [
        (3, {}, "type int is not supported"),
        ([], {}, "train_dataloader is empty"),
        (iter([]), {}, "train_dataloader is empty"),
        (np.zeros((0, 4), int), {}, "train_dataloader is empty"),
        ({"input_ids": []}, {}, "train_dataloader is empty"),
        ("corpus.txt", {}, r"is a path\. Pass get_dataset\('corpus.txt'\) instead"),
        (["a text"], {}, r"holds texts\. Pass tokenizer.encode_batch"),
        ([{"text": "a text"}], {}, "Tokenise 'text', or write the rows to a file for get_dataset"),
        (
            {"train": [[1]], "test": [[2]]},
            {},
            r"one split, such as train_dataloader=data\['train'\]",
        ),
        (np.arange(9), {}, r"array of shape \(9,\).* Pass \[ids\] to train on one document"),
        ([1, 2, 3], {}, r"one list of ids, .* document\. Pass \[ids\]"),
        (iter([[1, 2], [3]]), {}, r"yields token lists.* Pass list\(train_dataloader\)"),
        ([[1, 2], [3]], {"eos_id": None}, "needs the id of EOS"),
        ([[[1, 2]], [[3, 4]]], {}, "holds lists of lists of lists"),
    ],
)
def test_data_of_unknown_kinds_is_refused(data: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        source_of(data, **changes)
