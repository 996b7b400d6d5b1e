"""Whatever is given as data, as the batches that the step takes: {"input_ids", "labels", "segment_ids", "loss_mask"}, [A, b, T]."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from consyn_jax.config import UserError
from consyn_jax.data.loader import BatchLoader, Dataset, Order, Shuffled, evaluation_batches
from consyn_jax.data.packing import PackedDataset, PackedSequences
from consyn_jax.data.shards import MemoryShard, StoreSplit
from consyn_jax.data.streaming import FirstWindows, Streamed
from consyn_jax.training.dataset import ConsynDataset, MixedDataset

HostBatch = dict[str, np.ndarray]
IGNORED = -100  # torch's ignore_index: labels that are no targets


class Source(ABC):
    """Training or evaluation data.

    Attributes:
        order: what stands where when it is trained on; None where there are no positions.
        fingerprint: equal for equal data.
    """

    order: Order | None
    fingerprint: str

    @property
    def sequences(self) -> int | None:
        """Sequences in an epoch; None where nobody knows."""
        return None

    @property
    def tokens(self) -> int | None:
        """Real tokens in an epoch; None likewise."""
        return None

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the text behind them, for bits per byte; None likewise."""
        return None

    @abstractmethod
    def training(self, start_step: int, batch_size: int, accumulation: int, rows: np.ndarray) -> Iterator[HostBatch]:
        """Batches from step `start_step` on."""

    @abstractmethod
    def evaluation(self, batch_size: int, rows: np.ndarray) -> Iterator[HostBatch]:
        """Everything once, in batches [b, T]."""

    @abstractmethod
    def close(self) -> None:
        """Nothing more will be asked for. Whoever waits for data that is still to come gets an exception."""


class IndexedSource(Source):
    """Sequences in an order that is arithmetic, so that any position is reached at once.

    Args:
        order: how they are trained on; None where they are only evaluated on.
        dataset: what an evaluation, or an epoch, consists of; None where that is not known yet.
        close: called when no more is wanted.
    """

    def __init__(self, order: Order | None, dataset: Dataset | None, fingerprint: str, close: Callable[[], None] = lambda: None) -> None:
        self.order, self.dataset, self.fingerprint, self._close = order, dataset, fingerprint, close

    @property
    def sequences(self) -> int | None:
        return None if self.dataset is None else len(self.dataset)

    @property
    def tokens(self) -> int | None:
        return getattr(self.dataset, "num_tokens", None)

    @property
    def num_bytes(self) -> int | None:
        # Of a text of which a part is learned, nobody has counted the bytes of that part.
        if getattr(self.dataset, "num_targets", self.tokens) != self.tokens:
            return None
        return getattr(self.dataset, "num_bytes", None) or None

    def training(self, start_step: int, batch_size: int, accumulation: int, rows: np.ndarray) -> Iterator[HostBatch]:
        if self.order is None:
            raise UserError("The training data is empty, or there only to evaluate on.")
        return (batch for _, batch in BatchLoader(self.order, batch_size, accumulation, rows, start_step))

    def evaluation(self, batch_size: int, rows: np.ndarray) -> Iterator[HostBatch]:
        if self.dataset is None:
            raise UserError("A corpus that is still being prepared cannot be evaluated on as a whole. Give its FirstWindows.")
        return evaluation_batches(self.dataset, batch_size, rows)

    def close(self) -> None:
        self._close()


class BatchSource(Source):
    """Any iterable of batches, such as a torch DataLoader. A resume skips what was read before, since it has no positions.

    Args:
        batch_size: sequences in each. What is asked for may be smaller and divide it: with --auto_batch.
        block_size: tokens in a sequence.
    """

    def __init__(self, batches: Iterable[Any], batch_size: int, block_size: int) -> None:
        self.batches, self.batch_size, self.block_size = batches, batch_size, block_size
        self.fingerprint, self.order = "batches", None

    def training(self, start_step: int, batch_size: int, accumulation: int, rows: np.ndarray) -> Iterator[HostBatch]:
        micro = itertools.islice(self._endless(batch_size), start_step * accumulation, None)
        while len(group := list(itertools.islice(micro, accumulation))) == accumulation:
            yield {name: np.stack([batch[name][rows] for batch in group]) for name in group[0]}

    def evaluation(self, batch_size: int, rows: np.ndarray) -> Iterator[HostBatch]:
        for batch in map(self._complete, self.batches):
            missing = max(0, self.batch_size - len(batch["labels"]))
            padded = {name: np.pad(values, ((0, missing), (0, 0))) for name, values in batch.items()}
            for part in self._parts(padded, batch_size):
                yield {name: values[rows] for name, values in part.items()}

    def close(self) -> None:
        """Whoever made the batches closes them."""

    def _endless(self, batch_size: int) -> Iterator[HostBatch]:
        """Pass after pass; what cannot begin again, such as a generator, ends."""
        for _ in itertools.count():
            empty = True
            for batch in map(self._complete, self.batches):
                empty = False
                yield from self._parts(batch, batch_size)
            if empty:
                return

    def _complete(self, raw: Any) -> HostBatch:
        batch = complete(raw)
        _check_length(batch["labels"].shape[1], self.block_size)
        return batch

    def _parts(self, batch: HostBatch, batch_size: int) -> Iterator[HostBatch]:
        rows = len(batch["labels"])
        if rows != self.batch_size:
            raise UserError(
                f"A batch has {rows} sequences, and batch_size is {self.batch_size}. Make them equal (drop_last=True leaves a short last batch out)."
            )
        return ({name: values[i : i + batch_size] for name, values in batch.items()} for i in range(0, rows, batch_size))


class ItemDataset:
    """Items with a length, such as a torch or datasets Dataset, read row by row; each of `block_size` tokens."""

    def __init__(self, items: Any, block_size: int) -> None:
        self.items, self.block_size = items, block_size

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, indices: Any) -> HostBatch:
        items = [self.items[int(i)] for i in indices]
        for item in items:
            _check_length(len(item["input_ids"]) - ("labels" not in item), self.block_size)
        return complete({name: np.stack([np.asarray(item[name]) for item in items]) for name in items[0]})


def as_source(data: Any, *, batch_size: int, block_size: int, seed: int, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> Source:
    """Data of any accepted kind as a `Source`: a dataset of `get_dataset`, a mixture of them, a growing corpus, a list of token lists,
    a dataset of items, or batches.

    Raises:
        UserError: none of these, sequences of another length, or token lists without the ids that delimit them.
    """
    _check_length(getattr(getattr(data, "packed", data), "block_size", block_size), block_size)
    if isinstance(data, ConsynDataset):
        return _indexed(data.packed, data.seed, data.fingerprint)
    if isinstance(data, MixedDataset):
        return IndexedSource(data.order, data, data.fingerprint)
    if isinstance(data, Streamed):
        return IndexedSource(data, None, f"stream:{data.corpus.key}", data.corpus.close)
    if isinstance(data, FirstWindows):
        return IndexedSource(None, data, f"stream:{data.corpus.key}")
    if isinstance(data, PackedSequences):
        return _indexed(data, seed, f"{data.num_tokens} tokens")
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise UserError(
            f"Training data of type {type(data).__name__} is not supported. Give a dataset of get_dataset, a list of token lists, or an iterable of batches."
        )
    if isinstance(data, Sequence):
        if not data:
            raise UserError("The training data is empty.")
        if not isinstance(data[0], dict):
            return _token_lists(data, block_size, seed, bos_id, eos_id, pad_id)
    first = data[0] if hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data) else None
    if isinstance(first, dict) and "input_ids" in first and np.asarray(first["input_ids"]).ndim == 1:
        return _indexed(ItemDataset(data, block_size), seed, f"{len(data)} items")
    return BatchSource(data, batch_size, block_size)


def _token_lists(data: Sequence[Any], block_size: int, seed: int, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> Source:
    if bos_id is None or eos_id is None:
        raise UserError("A list of token lists needs to know BOS and EOS: pass tokenizer=, or a model whose configuration has them.")
    documents = [np.asarray(ids, np.int64) for ids in data]
    if not all(d.ndim == 1 for d in documents):
        raise UserError("A list as training data must hold lists of token ids, one a document.")
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(document.tobytes() + b"|")
    packed = PackedDataset(StoreSplit([MemoryShard(documents, eos_id)]), block_size, bos_id, pad_id if pad_id is not None else eos_id)
    return _indexed(packed, seed, digest.hexdigest())


def _indexed(dataset: Dataset, seed: int, fingerprint: str) -> IndexedSource:
    return IndexedSource(Shuffled(dataset, seed) if len(dataset) else None, dataset, fingerprint)


def complete(raw: Any) -> HostBatch:
    """A batch [b, T] with all four arrays, from what it has.

    Without labels the sequence itself is shifted by one. Labels of -100 and a false loss_mask are no targets; without segment_ids a
    row is one document, its padding by `attention_mask`.

    Raises:
        UserError: no input_ids, or labels that are not shifted.
    """
    if not isinstance(raw, dict) or "input_ids" not in raw:
        raise UserError(f"A batch must be a dict with 'input_ids', and is {sorted(raw) if isinstance(raw, dict) else type(raw).__name__}.")
    arrays = {name: np.asarray(value) for name, value in raw.items() if name in ("input_ids", "labels", "segment_ids", "loss_mask", "attention_mask")}
    ids = arrays["input_ids"]
    if ids.ndim != 2:
        raise UserError(f"A batch's input_ids must be [sequences, tokens], and have shape {ids.shape}.")
    segments = arrays.get("segment_ids", arrays.get("attention_mask", np.ones_like(ids)))
    if "labels" not in arrays:
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        mask = arrays["loss_mask"][:, 1:].astype(bool) if "loss_mask" in arrays else same
        arrays |= {"labels": ids[:, 1:], "loss_mask": mask & same}
        ids, segments = ids[:, :-1], segments[:, :-1]
    labels, targets = arrays["labels"], arrays["labels"] != IGNORED
    if targets.sum() > 1 and np.array_equal(labels[targets], ids[targets]) and len(np.unique(ids[targets])) > 1:
        raise UserError("The labels equal the input_ids, so nothing is predicted. Shift them (labels[t] follows input_ids[t]), or leave them out.")
    mask = arrays["loss_mask"].astype(bool) & targets if "loss_mask" in arrays else targets & (segments > 0)
    as_int = {"input_ids": ids, "labels": np.where(targets, labels, 0), "segment_ids": segments}
    return {name: value.astype(np.int32) for name, value in as_int.items()} | {"loss_mask": mask}


def _check_length(tokens: int, block_size: int) -> None:
    if tokens != block_size:
        raise UserError(f"A sequence of the data has {tokens} tokens, and max_tokens is {block_size}. Make them equal; without labels, give one id more.")
