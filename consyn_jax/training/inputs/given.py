"""Classify the caller's data, before the settings of the run are known."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from consyn_jax.data.packing import PackedSequences
from consyn_jax.data.streaming import FirstWindows, Streamed
from consyn_jax.errors import UserError, listed
from consyn_jax.integers import round_up
from consyn_jax.tokenization.token_ids import MASKED, as_array, check_fields, is_batch
from consyn_jax.training.dataset import ConsynDataset, MixedDataset
from consyn_jax.training.inputs.arrays import (
    UNPADDED,
    USED,
    complete,
    described_labels,
    fields_of,
    one_row,
    shown_labels,
)

LENGTH_MULTIPLE = 8  # tokens; lengths that follow from the data are rounded up to a multiple
SCANNED = 1000  # rows that are read before the run; rows in memory are all read
OWN = ConsynDataset | MixedDataset | PackedSequences | Streamed | FirstWindows
HARMLESS = (
    "token_type_ids",
    "special_tokens_mask",
)  # columns that tokenizers add and training does not need


class TokenLists:
    """Documents as lists of token ids, which are packed into sequences later."""

    def __init__(self, documents: Sequence[Any]) -> None:
        self.documents = documents


class Rows(Sequence[Mapping[str, Any]]):
    """Rows of a list, a mapping of columns or a dataset; each row is a sequence of any length.

    Args:
        rows: The data.
        name: Name of the data in messages.

    Attributes:
        longest: Length in tokens of the longest row that was read.
        longest_row: Index of the longest row that was read.
        empty: Number of rows without tokens among those that were read.
        labels_are_ids: Whether the labels equal the input_ids, as transformers' models expect; None
            if unknown.
        unused: Names of columns that are not used.

    Raises:
        UserError: Labels or masks of a row do not match its ids.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self._rows, self._name = rows, name
        count = len(self) if isinstance(rows, list | tuple | Mapping) else min(len(self), SCANNED)
        self.longest = self.longest_row = self.empty = 0
        self.labels_are_ids: bool | None = None
        seen = {str(key) for key in rows} if isinstance(rows, Mapping) else set()
        for i, row in enumerate(map(self.__getitem__, range(count))):
            where = f"Row {i} of {name}"
            check_fields(row, None, where, UNPADDED)
            self.empty += not len(row["input_ids"])
            if self.labels_are_ids is None and row.get("labels") is not None:
                self.labels_are_ids = shown_labels(one_row(row))
            is_shifted = row.get("labels") is not None and not self.labels_are_ids
            length = len(row["input_ids"]) - (not is_shifted)
            if length > self.longest:
                self.longest, self.longest_row = length, i
            seen |= set(map(str, row))
        self.unused = sorted(seen - {*USED, *HARMLESS})
        if self.empty == count:
            raise UserError(f"All rows of {name} are empty. Give at least one row with tokens.")

    def __len__(self) -> int:
        if isinstance(self._rows, Mapping):
            return len(self._rows["input_ids"])
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        """Return the columns of row i by name."""
        if isinstance(self._rows, Mapping):
            return {name: self._rows[name][i] for name in USED if name in self._rows}
        return fields_of(self._rows[i], f"Row {i} of {self._name}")

    @property
    def natural_length(self) -> int:
        """Length of the longest row, rounded up to a multiple of `LENGTH_MULTIPLE`."""
        return round_up(self.longest, LENGTH_MULTIPLE)

    def describe(self, block_size: int) -> str:
        """Describe the rows in a line for the header that a run prints."""
        labels = described_labels(complete(one_row(self[0])), self.labels_are_ids)
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        empty = f"; {self.empty:,} without tokens" if self.empty else ""
        return f"{len(self):,} rows, padded to {block_size:,} tokens{empty}{labels}{unused}"


class Begun(Iterable[Any]):
    """An iterable of batches or rows whose first item has been read already.

    The first pass begins with that item.

    Args:
        data: The iterable.
        name: Name of the data in messages.

    Attributes:
        first: The first item.
        name: Name of the data in messages.
        is_iterator: Whether the data can be read only once, as from a generator.
        are_rows: Whether each item is one sequence, and not a batch.

    Raises:
        UserError: The iterable is empty, or is read a second time although it can be read only
            once.
    """

    def __init__(self, data: Iterable[Any], name: str) -> None:
        self._data, self.name = data, name
        begun = iter(data)
        self._begun: Iterator[Any] | None = begun
        self.is_iterator = begun is data
        try:
            self.first = next(begun)
        except StopIteration:
            raise UserError(
                f"{name} is empty. Pass data, or an iterable that has not been read before."
            ) from None
        if _is_token_list(self.first):
            raise UserError(f"{name} yields token lists, one by one. Pass list({name}).")
        self._check_collation()
        fields = fields_of(self.first, f"The first item of {name}")
        self.are_rows = not is_batch(fields)
        self.check(fields, None, 0)
        if not self.are_rows and not any(map(len, fields["input_ids"])):
            raise UserError(f"Batch 0 of {name} is empty. Give batches with tokens.")
        self.unused = sorted({*map(str, fields)} - {*USED, *HARMLESS})

    def place(self, i: int) -> str:
        """Name of item `i` in messages."""
        return f"{'Row' if self.are_rows else 'Batch'} {i} of {self.name}"

    def check(self, fields: Mapping[str, Any], vocab_size: int | None, i: int) -> None:
        """Run `check_fields` on item `i`."""
        masked = UNPADDED if self.are_rows else MASKED
        check_fields(fields, vocab_size, self.place(i), masked)

    def _check_collation(self) -> None:
        """Refuse torch's default collate_fn, which turns rows of lists into a list per position."""
        if getattr(self.collate, "__name__", "") != "default_collate":
            return
        try:
            row = self.rows[0]
        except (NotImplementedError, TypeError, KeyError, IndexError):  # it cannot be indexed
            row = self.first
        values = row.get("input_ids") if isinstance(row, Mapping) else row
        if isinstance(values, list | tuple) and not any(hasattr(v, "ndim") for v in values):
            raise UserError(
                f"{self.name} has torch's default collate_fn, which turns rows of lists into one "
                "list per position. Pass the rows themselves, or convert their lists to tensors."
            )

    def __iter__(self) -> Iterator[Any]:
        begun, self._begun = self._begun, None
        if begun is not None:
            return itertools.chain([self.first], begun)
        if self.is_iterator:
            raise UserError(
                f"{self.name} is an iterator that has been read already. Give a list, a dataset "
                "or a DataLoader, which can be read again."
            )
        return iter(self._data)

    @property
    def length(self) -> int | None:
        """Number of items; None if unknown."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except TypeError:
            return None

    @property
    def in_memory(self) -> Sequence[Any]:
        """All items, if the data is a list; otherwise an empty list."""
        return self._data if isinstance(self._data, list | tuple) else []

    @property
    def rows(self) -> Any:
        """The dataset of a DataLoader; None for other iterables."""
        return getattr(self._data, "dataset", None)

    @property
    def collate(self) -> Any:
        """The function that makes batches of a DataLoader's rows; None for other iterables."""
        return getattr(self._data, "collate_fn", None)

    @property
    def sampler(self) -> Any:
        """The sampler that orders a DataLoader's rows; None for other iterables."""
        batches = getattr(self._data, "batch_sampler", None)
        return batches if batches is not None else getattr(self._data, "sampler", None)

    @property
    def batch_size(self) -> int | None:
        """Sequences per batch, from a DataLoader or the first batch; None if items are rows."""
        if self.are_rows:
            return None
        declared = getattr(self._data, "batch_size", None)
        return declared if isinstance(declared, int) else len(fields_of(self.first)["input_ids"])

    @property
    def natural_length(self) -> int:
        """Length of the longest known sequence, rounded up to a multiple of `LENGTH_MULTIPLE`.

        The known sequences are the first batch and, for a DataLoader, the rows of its dataset.
        """
        fields = fields_of(self.first)
        if self.are_rows:
            fields = one_row(fields)
        length = complete(fields)["labels"].shape[1]
        rows = self.rows
        if isinstance(rows, Sequence) and len(rows) and isinstance(rows[0], Mapping):
            length = max(length, Rows(rows, self.name).longest)
        return round_up(length, LENGTH_MULTIPLE)


Given = TokenLists | Rows | Begun


def recognise(data: Any, name: str) -> Any:
    """Classify the caller's data.

    None, datasets of this package and `Given` objects are returned unchanged.

    Args:
        name: Name of the data in messages.

    Raises:
        UserError: The data is empty, or is of a kind that cannot be trained on.
    """
    if data is None or isinstance(data, OWN | Given):
        return data
    if isinstance(data, str | PathLike):
        raise UserError(f"{name} is a path. Pass get_dataset({str(data)!r}) instead.")
    if hasattr(data, "to_pydict"):
        raise UserError(f"{name} is a table. Pass its columns as lists: table.to_pydict().")
    if isinstance(data, Mapping):
        return _columns(data, name)
    if hasattr(data, "ndim") and not isinstance(data, Iterator):
        return _array(data, name)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if not len(data):
            raise UserError(f"{name} is empty. Give data that has at least one sequence.")
        try:
            return _indexable(data, name)
        except NotImplementedError:  # a dataset of torch that can only be iterated over
            return Begun(data, name)
    if isinstance(data, Iterable):
        return Begun(data, name)
    raise UserError(
        f"{name} of type {type(data).__name__} is not supported. Give a dataset of get_dataset, a "
        "list of token lists, or an iterable of batches."
    )


def _columns(data: Mapping[str, Any], name: str) -> Given:
    """Classify a mapping of columns, such as the result of a transformers tokenizer."""
    if not data:
        raise UserError(f"{name} is an empty dict. Give data that has at least one sequence.")
    if "input_ids" not in data:
        splits = [key for key, value in data.items() if not isinstance(value, str)]
        raise UserError(
            f"{name} has no 'input_ids'; its keys are {listed(sorted(map(repr, data)))}. Pass "
            "tokenised data, or one split, such as "
            f"{name}=data[{splits[0] if splits else 'train'!r}]."
        )
    columns = {key: values for key, values in data.items() if values is not None}
    if not len(columns.get("input_ids", [])):
        raise UserError(f"{name} is empty. Give data that has at least one sequence.")
    if not is_batch(columns):
        return Rows(one_row(columns), name)
    count = len(columns["input_ids"])
    for key, values in columns.items():
        if key in USED and (np.ndim(values[0]) == 0 or len(values) != count):
            raise UserError(
                f"{name} has {count:,} rows of input_ids, but {key} has {len(values):,} "
                f"{'numbers' if np.ndim(values[0]) == 0 else 'rows'}. Give {key} for each row."
            )
    return Rows(columns, name)


def _array(data: Any, name: str) -> Given:
    """Classify an array of token ids of any library; each row is a document."""
    if 0 in data.shape:
        raise UserError(f"{name} is empty. Give data that has at least one sequence.")
    if hasattr(data, "columns"):
        raise UserError(
            f"{name} is a table. Pass table.to_dict('list'), where the column input_ids must have "
            "a list of ids in each row."
        )
    if data.dtype == object:
        change = "list(array)" if data.ndim == 1 else "array.astype('int32')"
        raise UserError(f"{name} is an array of objects, not of numbers. Pass {change}.")
    if data.ndim != 2:
        hint = "Pass [ids] to train on one document" if data.ndim == 1 else "Reshape it"
        raise UserError(
            f"{name} is an array of shape {tuple(data.shape)}, but must be [documents, tokens]. "
            f"{hint}."
        )
    return TokenLists(list(as_array(data)))


def _indexable(data: Any, name: str) -> Given:
    first = data[0]
    if isinstance(first, Mapping) or _is_pair(first):
        is_of_batches = is_batch(fields_of(first, f"Row 0 of {name}"))
        return Begun(data, name) if is_of_batches else Rows(data, name)
    if getattr(first, "ndim", 1) == 2 or (isinstance(first, list) and _is_pair(tuple(first))):
        return Begun(data, name)
    if isinstance(first, str):
        raise UserError(
            f"{name} holds texts. Pass tokenizer.encode_batch(texts), or get_dataset for files."
        )
    if isinstance(first, int | np.integer) or getattr(first, "ndim", None) == 0:
        raise UserError(
            f"{name} is one list of ids, but must hold one for each document. Pass [ids] to train "
            "on one document."
        )
    if not isinstance(first, list | tuple) and not hasattr(first, "ndim"):
        fields_of(first, f"Row 0 of {name}")  # raises an error
    if isinstance(first, list | tuple) and any(isinstance(each, list | tuple) for each in first):
        raise UserError(
            f"{name} holds lists of lists of lists. Give one list of ids for each document."
        )
    return TokenLists(data if isinstance(data, Sequence) else [data[i] for i in range(len(data))])


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and 0 < len(item) < 3 and hasattr(item[0], "ndim")


def _is_token_list(item: Any) -> bool:
    if isinstance(item, list | tuple):
        return bool(item) and np.ndim(item[0]) == 0 and not isinstance(item[0], str | Mapping)
    return getattr(item, "ndim", None) == 1
