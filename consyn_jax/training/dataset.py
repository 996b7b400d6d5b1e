"""Training data in one call: `get_dataset` takes raw data to a shuffled, indexable dataset. JAX is not imported here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.config import UserError
from consyn_jax.data.order import ids_at
from consyn_jax.data.packing import Batch, PackedDataset
from consyn_jax.data.prepare import Prepared, prepare
from consyn_jax.data.split import TRAIN, VALIDATION
from consyn_jax.tokenization import BPETokenizer


class ConsynDataset:
    """Packed windows of a token store in a seeded order: item i is window `order.sample_ids(seed, i, 1, len)` of `packed`.

    So item i depends on the data, `block_size` and (seed, i) alone, and a pass over all items has every token of the split as a
    label exactly once. The validation split keeps the store's order. `ConsynTrainer` takes `packed` and `seed`, and reshuffles
    every epoch; its first epoch has the order of the items here.

    Attributes:
        packed: the windows in store order, with `num_tokens`, `num_documents` and `num_bytes`.
        prepared: the token store, and what was read and left out.
    """

    def __init__(self, prepared: Prepared, packed: PackedDataset, seed: int, shuffle: bool) -> None:
        self.prepared, self.packed, self.seed, self.shuffle = prepared, packed, seed, shuffle

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, i: int) -> Batch:
        """{"input_ids", "labels", "segment_ids"}: int32 [block_size]; "loss_mask": bool [block_size]."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"Item {i} of {len(self)}.")
        return {name: values[0] for name, values in self.rows([i % len(self)]).items()}

    def rows(self, indices: Any) -> Batch:
        """The items `indices` (each in range(len)) at once, each array [n, block_size]."""
        return self.packed.rows(ids_at(self.seed, np.asarray(indices, np.int64), len(self), self.shuffle))

    @property
    def tokenizer(self) -> BPETokenizer:
        """The tokenizer that made the ids."""
        return self.prepared.store.tokenizer

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and their order in the store; a run goes on only with equal data."""
        return self.prepared.store.fingerprint

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, each a label once an epoch."""
        return self.packed.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return self.packed.num_documents

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the split's text in UTF-8, for bits per byte; None where a store does not know."""
        return self.packed.num_bytes


def get_dataset(
    data_path: str | Path | Sequence[str | Path],
    tokenizer: BPETokenizer | str | None = None,
    block_size: int = 1024,
    dataset_type: str = "auto",
    split: str = TRAIN,
    seed: int = 42,
    validation_fraction: float = 0.01,
    text_key: str = "text",
    on_bad_rows: str = "error",
) -> ConsynDataset:
    """Raw text, JSON rows or a token store as a dataset of packed sequences; raw data is tokenised once and kept in a cache.

    Args:
        data_path: a file, directory, glob, token store or "sample", or several.
        tokenizer: a tokenizer, or what `--tokenizer` takes; None is the default one, or a token store's own.
        block_size: tokens in a sequence.
        split: "train" or "validation".

    Returns:
        Items {"input_ids", "labels", "segment_ids"}, int32 [block_size], and "loss_mask", bool [block_size]; `labels[t]` is the
        token that follows `input_ids[t]`.

    Raises:
        UserError: as `data.prepare.prepare`, or the split is unknown or empty.
    """
    paths = [str(path) for path in ([data_path] if isinstance(data_path, str | Path) else data_path)]
    if block_size < 1:
        raise UserError(f"block_size must be at least 1, not {block_size}.")
    prepared = prepare(paths, tokenizer, dataset_type=dataset_type, text_key=text_key, validation_fraction=validation_fraction, on_bad_rows=on_bad_rows)
    names = sorted({TRAIN, VALIDATION, *prepared.store.splits})
    if split not in names:
        raise UserError(f"There is no split {split!r} in the data. Known: {', '.join(names)}.")
    if not prepared.store.split(split).num_tokens:
        raise UserError(f"The split {split!r} of {', '.join(paths)} has no documents. Give more data, or another validation_fraction.")
    _warn_of_what_is_left_out(prepared)
    made_by = prepared.store.tokenizer
    packed = PackedDataset(prepared.store.split(split), block_size, made_by.bos_token_id, made_by.pad_token_id)
    return ConsynDataset(prepared, packed, seed, shuffle=split == TRAIN)


def _warn_of_what_is_left_out(prepared: Prepared) -> None:
    for name, reason in prepared.left_out:
        warnings.warn(f"{name} is left out: it {reason}.", stacklevel=3)
    if prepared.report.bad_rows:
        warnings.warn(f"{prepared.report.bad_rows} bad rows were left out, the first: {prepared.report.bad_row_examples[0]}", stacklevel=3)
