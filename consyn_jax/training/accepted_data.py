"""Convert data of every kind that `ConsynTrainer` accepts to batches for the train step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from consyn_jax.data.loader import Dataset, Shuffled
from consyn_jax.data.packing import PackedSequences
from consyn_jax.data.pairs import PairDataset
from consyn_jax.data.streaming import FirstWindows, Streamed
from consyn_jax.errors import UserError, listed
from consyn_jax.training.dataset import ConsynDataset, MixedDataset
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.inputs.content import fingerprint_of
from consyn_jax.training.inputs.given import Begun, Rows, TokenLists, recognise
from consyn_jax.training.inputs.given_batches import GivenBatches
from consyn_jax.training.inputs.indexed_batches import IndexedBatches
from consyn_jax.training.inputs.items import ItemDataset, pack_token_lists


def as_source(
    data: Any,
    *,
    batch_size: int,
    block_size: int,
    seed: int,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    vocab_size: int,
    name: str = "train_dataloader",
) -> BatchSource:
    """Convert data of any accepted kind to a `BatchSource`.

    The data may be a dataset of `get_dataset`, a mixture of such datasets, a corpus that is still
    being prepared, or any kind that `inputs.given.recognise` accepts.

    Args:
        vocab_size: Size of the vocabulary; all ids must be below it.
        name: Name of the data in messages. If it is "eval_dataloader", batches may have any size.

    Raises:
        UserError: The data is of no accepted kind, an id is outside the vocabulary, no token is a
            target, sequences or batches have the wrong size, or there is no EOS id for token lists.
    """
    data = recognise(data, name)
    _check_block_size(getattr(getattr(data, "packed", data), "block_size", block_size), block_size)
    if isinstance(data, ConsynDataset):
        source: BatchSource = _indexed(data.packed, data.seed, data.fingerprint)
    elif isinstance(data, MixedDataset):
        source = IndexedBatches(data.order, data, data.fingerprint)
    elif isinstance(data, Streamed):
        return IndexedBatches(data, None, f"stream:{data.corpus.key}", data.corpus.close)
    elif isinstance(data, FirstWindows):
        return IndexedBatches(None, data, f"stream:{data.corpus.key}")
    elif isinstance(data, TokenLists):
        ids = (bos_id, eos_id, pad_id)
        packed, digest = pack_token_lists(data.documents, block_size, ids, vocab_size, name)
        source = _indexed(packed, seed, digest)
    elif isinstance(data, Rows):
        source = _rows(data, block_size, seed, vocab_size, name)
    elif isinstance(data, Begun):
        source = GivenBatches(data, batch_size, block_size, vocab_size)
        if name != "eval_dataloader":
            source.check_batch_size()
            return source
    else:
        source = _packed(data, seed)
    _check_targets(source, batch_size, name)
    return source


def check_pairs(data: Sequence[Any], wants_pairs: bool) -> None:
    """Check that the data has pairs of answers if, and only if, the objective is DPO.

    Args:
        data: Training and evaluation data, as `recognise` returns them; None for missing data.
        wants_pairs: Whether the objective is DPO.

    Raises:
        UserError: The data does not suit the objective.
    """
    parts = [part for given in data if given is not None for part in _parts(given)]
    are_pairs = [isinstance(getattr(part, "packed", part), PairDataset) for part in parts]
    if wants_pairs and not all(are_pairs):
        raise UserError(
            "objective='dpo' trains on pairs of answers, but the data has none. Pass "
            "get_dataset(PATH, row_format='preference')."
        )
    if not wants_pairs and any(are_pairs):
        raise UserError("The data has pairs of answers. Pass objective='dpo' to train on them.")


def _parts(given: Any) -> Sequence[Any]:
    return list(given.sources.values()) if isinstance(given, MixedDataset) else [given]


def check_held_out(training: Any, evaluation: Any) -> None:
    """Check that evaluation data of `get_dataset` was held out from the training data.

    A call of `get_dataset` holds out a fraction of the documents. If two calls with the same files
    have different fractions, a document can be in the training data and in the evaluation data.

    Raises:
        UserError: Training and evaluation data share a source, but have different options.
    """
    for train, held_out in itertools.product(_parts(training), _parts(evaluation)):
        both = isinstance(train, ConsynDataset) and isinstance(held_out, ConsynDataset)
        if not both or train.fingerprint == held_out.fingerprint:
            continue
        if shared := sorted(train.read & held_out.read):
            raise UserError(
                f"eval_dataloader is made from {listed(shared)} with other options than "
                "train_dataloader, so it can contain documents that are trained on. Pass the same "
                "validation_fraction and the same other options to both calls of get_dataset."
            )


def _rows(data: Rows, block_size: int, seed: int, vocab_size: int, name: str) -> BatchSource:
    items = ItemDataset(data, block_size, vocab_size, name)
    source = _indexed(items, seed, items.fingerprint or f"{len(data)} items")
    source.content_is_known = items.fingerprint is not None
    items.warn = lambda text: source.warn(text)
    source.description = data.describe(block_size)
    return source


def _packed(data: PackedSequences, seed: int) -> BatchSource:
    found = fingerprint_of(data)
    source = _indexed(data, seed, found or f"{data.num_tokens} tokens")
    source.content_is_known = found is not None
    return source


def _indexed(dataset: Dataset, seed: int, fingerprint: str) -> IndexedBatches:
    return IndexedBatches(Shuffled(dataset, seed) if len(dataset) else None, dataset, fingerprint)


def _check_targets(source: BatchSource, batch_size: int, name: str) -> None:
    """Check that the data has at least one target token; otherwise the mean loss would be 0 / 0."""
    dataset = source.dataset if isinstance(source, IndexedBatches) else None
    known = getattr(dataset, "num_targets", None)
    if known is None:
        batches = source.evaluation(batch_size, np.arange(batch_size))
        known = any(batch["loss_mask"].any() for batch in batches)
    if not known:
        kind = "evaluation" if name == "eval_dataloader" else "training"
        raise UserError(
            f"No token of the {kind} data counts in the loss: all are masked, or have no token "
            "after them. Correct labels and masks, or raise max_tokens if it cuts the targets "
            "off."
        )


def _check_block_size(tokens: int, block_size: int) -> None:
    """Check that the sequences of a packed dataset have `block_size` tokens.

    Shorter sequences are not padded, because padding would waste compute.
    """
    if tokens != block_size:
        raise UserError(
            f"The dataset has sequences of {tokens} tokens, and max_tokens is {block_size}. Leave "
            f"max_tokens out, or make the dataset with block_size={block_size}."
        )
