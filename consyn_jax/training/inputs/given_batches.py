"""Batches from the caller, such as those of a torch DataLoader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from consyn_jax.data.loader import Batch
from consyn_jax.errors import UserError
from consyn_jax.training.inputs.arrays import (
    CutRows,
    check_columns,
    check_labels_agree,
    check_length,
    complete,
    described_labels,
    each_row,
    fields_of,
    fit,
    one_row,
    shown_labels,
)
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.inputs.content import Fingerprint, fingerprint_of
from consyn_jax.training.inputs.given import Begun

COLLATED_ROWS = 8  # number of rows that are collated for the fingerprint of a collator
# Attributes of torch's samplers that are left out of fingerprints: rows, other samplers, and state.
ELSEWHERE = ("data_source", "dataset", "sampler", "batch_sampler", "generator", "epoch")
# Limit for evaluation data that can be read only once and is therefore kept in memory: 1.3 GB.
KEPT_TOKENS = 100_000_000


class GivenBatches(BatchSource):
    """Batches from an iterable of batches or of rows; rows are combined into batches.

    The data has no positions, so a resumed run reads and skips the batches of earlier steps. A
    batch with fewer than `batch_size` sequences is filled up with masked rows; a batch with more is
    split. Shorter rows are filled up with masked tokens.

    Args:
        batch_size: Sequences per batch. Micro-batches may be smaller if their size divides
            `batch_size`, as with `--auto_batch`.
        block_size: Tokens per sequence.
        vocab_size: Size of the vocabulary; all ids must be below it.

    Raises:
        UserError: A sequence that has been read is too long, or has an id outside the vocabulary.
    """

    def __init__(self, batches: Begun, batch_size: int, block_size: int, vocab_size: int) -> None:
        self.batches, self.batch_size, self.block_size = batches, batch_size, block_size
        self.order, self._vocab_size = None, vocab_size
        content = fingerprint_of_batches(batches)
        self.fingerprint, self.content_is_known = content or "batches", content is not None
        self._labels_are_ids: bool | None = None
        self._cut = CutRows(block_size)
        self._kept: list[Batch] | None = None
        for i, raw in enumerate(batches.in_memory or [batches.first]):
            self._check(i, raw)
            check_length(self._complete(raw)["labels"].shape[1], block_size, batches.place(i))
        unused = f"; not used: {', '.join(batches.unused)}" if batches.unused else ""
        labels = described_labels(self._complete(batches.first), self._labels_are_ids)
        self.description = f"{'rows' if batches.are_rows else 'batches'} of ids{labels}{unused}"

    @property
    def sequences(self) -> int | None:
        """Sequences in a pass over a DataLoader or list; a short last batch counts as full."""
        items = self.batches.length
        if items is None:
            return None
        return items if self.batches.are_rows else items * self.batch_size

    def check_batch_size(self) -> None:
        """Check that the caller's batches have `batch_size` sequences.

        Raises:
            UserError: The batches have another size.
        """
        size = self.batches.batch_size
        is_only_batch = self.batches.length == 1
        if size is None or size == self.batch_size or (is_only_batch and size < self.batch_size):
            return
        raise UserError(
            f"The training batches have {size} sequences, and batch_size is {self.batch_size}. "
            f"Pass batch_size={size}, or make batches of {self.batch_size}."
        )

    def training(
        self, start_step: int, batch_size: int, accumulation: int, rows: np.ndarray
    ) -> Iterator[Batch]:
        """Skip the batches of earlier steps, and yield the batches from `start_step` on."""
        micro = itertools.islice(self._endless(batch_size), start_step * accumulation, None)
        while len(group := list(itertools.islice(micro, accumulation))) == accumulation:
            yield {name: np.stack([batch[name][rows] for batch in group]) for name in group[0]}

    def evaluation(self, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
        """Yield one pass over the iterable; data that can be read only once is kept in memory."""
        for batch in self._kept_batches() if self.batches.is_iterator else self._whole_batches():
            for piece in self._pieces(batch, batch_size):
                yield {name: values[rows] for name, values in piece.items()}

    def close(self) -> None:
        """Do nothing; the caller owns the iterable."""

    def _endless(self, batch_size: int) -> Iterator[Batch]:
        """Yield the batches of endless passes; stop after one pass if the data is an iterator."""
        for _ in itertools.count():
            empty = True
            for batch in self._whole_batches():
                empty = False
                yield from self._pieces(batch, batch_size)
            if empty or self.batches.is_iterator:
                return

    def _kept_batches(self) -> list[Batch]:
        if self._kept is None:
            self._kept = []
            for batch in self._whole_batches():
                self._kept.append(batch)
                if sum(kept["labels"].size for kept in self._kept) > KEPT_TOKENS:
                    raise UserError(
                        f"The evaluation data is an iterator of more than {KEPT_TOKENS:,} tokens, "
                        "too many to keep. Give a list, a dataset or a DataLoader."
                    )
        return self._kept

    def _whole_batches(self) -> Iterator[Batch]:
        """Yield the batches of one pass, [batch_size, block_size]."""
        size = self.batch_size
        items = map(self._check, itertools.count(), self.batches)
        for raw in self._rows_in_batches(items) if self.batches.are_rows else items:
            batch = self._complete(raw)
            self._cut.look(batch, self.warn)
            for i in range(0, len(batch["labels"]), size):
                part = {name: values[i : i + size] for name, values in batch.items()}
                yield fit(part, self.block_size, size)

    def _rows_in_batches(self, items: Iterator[Any]) -> Iterator[Any]:
        while group := list(itertools.islice(items, self.batch_size)):
            yield {
                name: [row[name] for row in group]
                for name in group[0]
                if all(row.get(name) is not None for row in group)
            }

    def _check(self, i: int, raw: Any) -> Mapping[str, Any]:
        """Check that item `i` has the same columns as the first, and return its arrays."""
        where = self.batches.place(i)
        fields = fields_of(raw, where)
        self.batches.check(fields, self._vocab_size, i)
        check_columns(fields, fields_of(self.batches.first), where)
        if fields.get("labels") is not None:
            rows = [one_row(fields)] if self.batches.are_rows else each_row(fields)
            for number, row in enumerate(rows):
                place = where if self.batches.are_rows else f"{where}, row {number},"
                shown = shown_labels(row)
                self._labels_are_ids = check_labels_agree(shown, self._labels_are_ids, place)
        return fields

    def _complete(self, raw: Any) -> Batch:
        fields = fields_of(raw)
        if self.batches.are_rows and np.ndim(fields["input_ids"]) == 1:
            fields = one_row(fields)
        return complete(fields, self._labels_are_ids)

    def _pieces(self, batch: Batch, batch_size: int) -> Iterator[Batch]:
        return (
            {name: values[i : i + batch_size] for name, values in batch.items()}
            for i in range(0, self.batch_size, batch_size)
        )


def fingerprint_of_batches(batches: Begun) -> str | None:
    """Fingerprint a list of batches, or a DataLoader; None for other iterables.

    The fingerprint of a DataLoader covers the rows, the output of the collator for the first rows,
    and the class and public numbers of the sampler, such as indices and weights. It does not cover
    the order of a shuffled DataLoader. If the collator draws random numbers, or the sampler has
    other state, there is no fingerprint, and the result is None.
    """
    if batches.in_memory:
        return fingerprint_of(batches.in_memory)
    rows = batches.rows
    if rows is None:
        return None
    try:
        found = fingerprint_of(rows)
    except (NotImplementedError, TypeError):  # the dataset can only be iterated over
        return None
    made = _collated(batches, rows) if found else None
    drawn = _sampler(batches.sampler)
    if found is None or made is None or drawn is None:
        return None
    return f"{found} in batches of {batches.batch_size}, as {made}, by {drawn}"


def _collated(batches: Begun, rows: Any) -> str | None:
    """Fingerprint the collator's output for the first rows; None if the output varies."""
    if batches.collate is None:
        return ""
    first = [rows[i] for i in range(min(len(rows), COLLATED_ROWS))]
    found = Fingerprint(), Fingerprint()
    for fingerprint in found:
        fingerprint.add(batches.collate(first))
    return found[0].value if found[0].value == found[1].value else None


def _sampler(sampler: Any) -> str | None:
    """Describe the order of a DataLoader: its samplers' classes, and a hash of their attributes."""
    names, held = [], Fingerprint()
    while sampler is not None:
        names.append(f"{type(sampler).__module__}.{type(sampler).__qualname__}")
        inner = getattr(sampler, "sampler", None) or getattr(sampler, "batch_sampler", None)
        for name, value in sorted(vars(sampler).items()):
            if name not in ELSEWHERE and not name.startswith("__"):
                held.add(name)
                held.add(value)
        sampler = inner
    return held.value and f"{' of '.join(names)} {held.value}"
