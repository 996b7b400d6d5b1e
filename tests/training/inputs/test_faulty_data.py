"""Data from Python that a new user gave wrongly: answered by place and remedy, never in silence."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from consyn_jax.errors import UserError
from consyn_jax.training.accepted_data import as_source
from consyn_jax.training.dataset import MixedDataset
from consyn_jax.training.inputs.initial_model import checked
from consyn_jax.training.run.keywords import given_once

ROW = {"input_ids": [1, 5, 6, 2]}


class Table:
    """As a DataFrame of pandas."""

    columns, ndim, shape = ("text", "input_ids"), 2, (3, 2)


class Series(Table):
    """As a column of one."""

    ndim, shape, dtype, columns = 1, (3,), np.dtype(object), ()

    def __getattribute__(self, name: str) -> Any:
        if name == "columns":
            raise AttributeError(name)
        return object.__getattribute__(self, name)


def source_of(data: Any, block_size: int = 8) -> Any:
    numbers = {"bos_id": 1, "eos_id": 2, "pad_id": 0, "vocab_size": 64}
    return as_source(data, batch_size=2, block_size=block_size, seed=0, **numbers)


def once(*items: Any) -> Iterator[Any]:
    yield from items


RAGGED = np.empty(2, object)
RAGGED[:] = [[1, 5, 6], [1, 2]]
EMPTY = np.zeros((2, 0), int)
FAULTY: dict[str, tuple[Any, str]] = {
    "lists in a DataLoader": (DataLoader([ROW, ROW], batch_size=2), "turns rows of lists into"),  # type: ignore[arg-type]
    "two kinds of labels": (
        [{**ROW, "labels": [1, 5, 6, 2]}, {**ROW, "labels": [5, 6, 2, -100]}],
        "Row 1 of train_dataloader has labels that differ from the input_ids, but earlier "
        "labels equal them. Give labels of one kind",
    ),
    "two kinds, the other way": (
        [{**ROW, "labels": [5, 6, 2, -100]}, {**ROW, "labels": [1, 5, 6, 2]}],
        "Row 1 of .* that equal the input_ids, but earlier labels differ from them",
    ),
    "two kinds in batches": (
        [
            {"input_ids": np.array([[1, 5, 6]] * 2), "labels": np.array([[1, 5, 6]] * 2)},
            {"input_ids": np.array([[1, 5, 6]] * 2), "labels": np.array([[5, 6, 2]] * 2)},
        ],
        "Batch 1 of .* labels that differ from",
    ),
    "two kinds in a batch": (
        [{"input_ids": np.array([[1, 5, 6]] * 2), "labels": np.array([[1, 5, 6], [5, 6, 2]])}],
        "Batch 0 of train_dataloader, row 1, has labels that differ from",
    ),
    "two kinds from a DataLoader": (
        DataLoader(
            TensorDataset(torch.tensor([[1, 5, 6]] * 2), torch.tensor([[1, 5, 6], [5, 6, 2]])),
            batch_size=2,
        ),
        "Batch 0 of .*, row 1, has labels that differ",
    ),
    "lists as rows of a DataLoader": (DataLoader([[1, 5], [1, 6]], batch_size=2), "turns rows of"),  # type: ignore[arg-type]
    "a batch among rows": (
        [ROW, {"input_ids": [[1, 5], [1, 6]]}],
        "Row 1 of .* holds several rows",
    ),
    "a second batch without tokens": (
        [{"input_ids": np.array([[1, 5, 6]] * 2)}, {"input_ids": EMPTY}],
        "Batch 1 of train_dataloader is empty. Leave it out",
    ),
    "documents without tokens": ([[], []], "All documents of .* are empty"),
    "an array without tokens": (np.zeros((4, 0), int), "train_dataloader is empty"),
    "rows without tokens": ([{"input_ids": []}] * 2, "All rows of .* are empty"),
    "a batch without tokens": ([{"input_ids": EMPTY}], "Batch 0 of .* is empty"),
    "a mask of 2": ([{**ROW, "attention_mask": [1, 1, 2, 2]}], "Row 0 .* 2 in attention_mask"),
    "positions below 0": (
        [{**ROW, "position_ids": [-1, 0, 1, 2]}],
        "Row 0 .* first at position 0",
    ),
    "positions with a gap": (
        [{**ROW, "position_ids": [0, 1, 2, 3]}, {**ROW, "position_ids": [0, 1, 3, 4]}],
        "Row 1 of train_dataloader has position_ids .* first at position 2",
    ),
    "one mask too many": (
        {"input_ids": [[1, 5], [1, 6]], "attention_mask": [[1, 1]] * 3},
        "2 rows of input_ids, but attention_mask has 3 rows. Give attention_mask for each row",
    ),
    "one mask too few": (
        {"input_ids": [[1, 5], [1, 6]], "attention_mask": [[1, 1]]},
        "attention_mask has 1 rows",
    ),
    "one mask for all": (
        {"input_ids": [[1, 5], [1, 6]], "attention_mask": [1, 1]},
        "attention_mask has 2 numbers",
    ),
    "no ids in a row": ([ROW, {"input_ids": None}], "Row 1 of train_dataloader has no input_ids."),
    "no ids at first": ([{"input_ids": None}, ROW], "Row 0 of .* has no input_ids"),
    "no ids in a dict": ({"input_ids": None}, "is empty"),
    "no row": ([ROW, None], "Row 1 of train_dataloader is None, but must be a dict with"),
    "a text as a row": ([ROW, "abc"], "Row 1 of .* is of type str, but must be"),
    "a list among dicts": ([ROW, [1, 5, 6]], "Row 1 of .* is of type list"),
    "a generator's None": (once(None, ROW), "The first item of train_dataloader is None"),
    "other columns": ([ROW, {"labels": [1, 5]}], "Row 1 of .* has no input_ids, but 'labels'"),
    "an empty dict as a row": ([{}], "Row 0 of .* has no input_ids. Give the ids of its tokens"),
    "an empty dict": ({}, "train_dataloader is an empty dict"),
    "an array of lists": (RAGGED, r"array of objects, .* Pass list\(array\)\."),
    "an array of objects": (np.ones((2, 3), object), r"Pass array\.astype\('int32'\)"),
    "a series": (Series(), "array of objects"),
    "a table": (Table(), r"is a table. .* table\.to_dict\('list'\)"),
    "three levels": ([[[1, 5], [6, 2]]] * 2, "lists of lists of lists"),
    "one list": ([1, 5, 6], r"is one list of ids, .* Pass \[ids\]"),
    "bytes": (b"abc", "one list of ids"),
    "long rows": ([ROW, {"input_ids": [1] * 20}], "Row 1 of .* needs max_tokens=19, but .* is 8"),
    "labels shifted backwards": (
        [{**ROW, "labels": [-100, 1, 5, 6]}],
        "Row 0 of train_dataloader has labels that are shifted the wrong way",
    ),
    "two masks that differ": (
        [{**ROW, "segment_ids": [1, 1, 2, 2], "attention_mask": [1, 1, 1, 0]}],
        "Row 0 .* has segment_ids and attention_mask that disagree about padding at position 3",
    ),
    "one token a row": ([{"input_ids": [1]}] * 2, "or have no token after them. Correct labels"),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_faulty_data_is_answered_by_place_and_remedy(kind: str) -> None:
    data, message = FAULTY[kind]
    with pytest.raises(UserError) as caught:
        list(source_of(data).training(0, 2, 1, np.arange(2)))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert len(re.findall(r"[.!?](\s|$)", str(caught.value))) <= 2


def test_what_the_messages_advise_works() -> None:
    tensors = {name: torch.tensor(values) for name, values in ROW.items()}
    loader = DataLoader([tensors, tensors], batch_size=2)  # type: ignore[arg-type]
    batch = next(iter(source_of(loader).training(0, 2, 1, np.arange(2))))
    assert batch["input_ids"][0, :, :3].tolist() == [[1, 5, 6]] * 2
    assert source_of([ROW, ROW]).description.startswith("2 rows")
    assert len(source_of(list(RAGGED)).dataset) == 1


def test_what_is_left_out_is_said() -> None:
    assert "1 without tokens" in source_of([ROW, {"input_ids": []}]).description
    named = {"input_ids": [[1, 5, 6], [1, 6, 2]], "score": [1.0, 2.0], "about": "a text"}
    assert source_of(named).description.endswith("not used: about, score")
    pairs = TensorDataset(torch.tensor([[1, 5, 6]] * 2), torch.tensor([[1, 5, 6]] * 2))
    assert "labels shifted by one" in source_of(pairs).description
    masked = {"input_ids": [1, 9, 6, 9, 7, 9, 2], "labels": [-100, 5, -100, 8, -100, 7, -100]}
    batch = {name: np.array([values] * 2) for name, values in masked.items()}
    for data in ([masked] * 2, [batch] * 2, DataLoader([masked], collate_fn=lambda _: batch)):  # type: ignore[arg-type]
        assert "labels that are not the next tokens" in source_of(data).description
    ends = {"input_ids": [1, 5, 6, 1, 7, 1, 8, 1], "labels": [5, 6, 2, 7, 2, 8, 2, 9]}
    assert "labels" not in source_of([ends] * 2).description


@pytest.mark.parametrize("labels", [[5, 5, 5, 5], [5, 6, 5, 6], [-100] * 3 + [9], [6, 5, 6, 5]])
def test_labels_that_may_be_of_more_than_one_kind_are_taken(labels: list[int]) -> None:
    assert source_of([{"input_ids": [5, 6, 5, 6], "labels": labels}]).description


def test_padding_is_no_target_whatever_the_loss_mask_says() -> None:
    padded = {"input_ids": [1, 5, 6, 0], "labels": [5, 6, 2, 0], "attention_mask": [1, 1, 1, 0]}
    source = source_of([{**padded, "loss_mask": [1, 1, 1, 1]}] * 2)
    batch = next(iter(source.training(0, 2, 1, np.arange(2))))
    assert batch["loss_mask"][0, :, :5].tolist() == [[True, True, True, False, False]] * 2


class ArrowTable:
    """As a table of pyarrow."""

    def to_pydict(self) -> dict[str, list[Any]]:
        return {"input_ids": [[1, 5, 6]]}


def test_a_table_of_arrow_is_answered_with_its_columns() -> None:
    with pytest.raises(UserError, match=r"is a table. Pass its columns as lists: table.to_pydict"):
        source_of(ArrowTable())
    assert source_of(ArrowTable().to_pydict()).description


@pytest.mark.parametrize("place", [None, 3, ["a"]])
def test_a_directory_of_another_type_is_named(place: Any) -> None:
    with pytest.raises(UserError, match="output_dir must be the path of a directory, not of type"):
        given_once({"output": place}, {})


def test_what_is_no_model_is_answered_by_what_it_is() -> None:
    with pytest.raises(UserError, match=r"model is a NoneType.* Pass ConsynLMHeadModel.from_pre"):
        checked(None, None)
    with pytest.raises(UserError, match=r"model is a Linear.* Pass ConsynLMHeadModel.from_pretr"):
        checked(torch.nn.Linear(1, 1), None)


def test_a_mixture_of_a_list_is_answered_with_an_example() -> None:
    with pytest.raises(UserError, match=r"MixedDataset\(\{"):
        MixedDataset.__init__.__wrapped__(object.__new__(MixedDataset), ["a"], [1], 0)  # type: ignore[attr-defined]
