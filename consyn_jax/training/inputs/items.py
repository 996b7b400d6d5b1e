"""Datasets of sequences, read by index, from the caller's rows or documents."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from consyn_jax.data.packing import PackedDataset, Sequences
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError
from consyn_jax.tokenization.token_ids import check_fields, check_input_ids, is_batch
from consyn_jax.training.inputs.arrays import (
    UNPADDED,
    CutRows,
    check_columns,
    check_labels_agree,
    check_length,
    complete,
    fit,
    one_row,
    shown_labels,
)
from consyn_jax.training.inputs.content import fingerprint_of
from consyn_jax.training.inputs.given import Rows


class ItemDataset:
    """Rows that are read one by one, for example from a `Dataset` of torch or datasets.

    Args:
        block_size: Tokens per sequence; shorter rows are padded.
        vocab_size: Size of the vocabulary; all ids must be below it.
        name: Name of the rows in messages.

    Attributes:
        fingerprint: Hash of all rows; None if it cannot be computed.
        warn: Function that is called with a warning the first time that a row is cut. Only rows
            that are first read during the run are cut. A row that was read before the run, to check
            the data, raises an error if it is too long.

    Raises:
        UserError: A row that was read before the run is too long, or has an id outside the
            vocabulary.
    """

    def __init__(self, items: Rows, block_size: int, vocab_size: int, name: str) -> None:
        check_length(items.longest, block_size, f"Row {items.longest_row} of {name}")
        self.items, self.block_size = items, block_size
        self._vocab_size, self._name = vocab_size, name
        self._cut = CutRows(block_size)
        self.fingerprint = fingerprint_of(items, self._check)
        self.warn: Callable[[str], None] = warnings.warn

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, indices: Any) -> Sequences:
        """Return the items at n `indices`, as arrays [n, block_size]."""
        found = [self._row(int(i), self.items[int(i)]) for i in indices]
        return {name: np.concatenate([row[name] for row in found]) for name in found[0]}

    @cached_property
    def _first(self) -> Any:
        """The first row; it is cached, because some datasets are slow or random."""
        return self.items[0]

    def _check(self, i: int, item: Any) -> None:
        where = f"Row {i} of {self._name}"
        if is_batch(item):
            raise UserError(f"{where} holds several rows. Give each row separately.")
        check_fields(item, self._vocab_size, where, UNPADDED)
        check_columns(item, self._first, where)
        if item.get("labels") is not None:
            check_labels_agree(shown_labels(one_row(item)), self.items.labels_are_ids, where)

    def _row(self, i: int, item: Any) -> Sequences:
        self._check(i, item)
        row = complete(one_row(item), self.items.labels_are_ids)
        self._cut.look(row, self.warn)
        return fit(row, self.block_size, 1)


def pack_token_lists(
    data: Sequence[Any],
    block_size: int,
    special_ids: tuple[int | None, ...],
    vocab_size: int,
    name: str,
) -> tuple[PackedDataset, str]:
    """Pack documents, given as lists of ids, into sequences.

    Args:
        special_ids: Ids of BOS, EOS and padding.
        vocab_size: Size of the vocabulary; all ids must be below it.
        name: Name of the data in messages.

    Returns:
        The sequences, and a fingerprint of the documents.
    """
    bos_id, eos_id, pad_id = special_ids
    if eos_id is None:
        raise UserError(
            "A list of token lists needs the id of EOS: pass tokenizer=, or a model whose "
            "configuration has it."
        )
    documents = [
        check_input_ids(ids, vocab_size, f"Document {i} of {name}", UNPADDED)
        for i, ids in enumerate(data)
    ]
    if not any(map(len, documents)):
        raise UserError(
            f"All documents of {name} are empty. Give at least one document with tokens."
        )
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(document.tobytes() + b"|")
    split = StoreSplit([MemoryShard(documents, eos_id)])
    packed = PackedDataset(split, block_size, bos_id, eos_id if pad_id is None else pad_id)
    return packed, digest.hexdigest()
