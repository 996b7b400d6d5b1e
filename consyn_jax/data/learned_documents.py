"""Find the documents that a training step trains on, without building its batch.

The data order is a function of the step, so every step is found equally fast. From the stores, only
the starts, origins, targets and first tokens of documents are read. The first token is needed to
decide whether it counts in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from consyn_jax.data.loader import Order, Shuffled
from consyn_jax.data.mixture import Mixture, part_seed
from consyn_jax.data.order import ids_at
from consyn_jax.data.packing import PackedSequences
from consyn_jax.data.store.manifest import read_sources
from consyn_jax.data.store.raw_tokens import RawShard
from consyn_jax.data.store.shards import Shard, Tokens
from consyn_jax.errors import UserError


@dataclass
class LearnedDocument:
    """A document with tokens in the batch of a step.

    Attributes:
        data: in a mixture, the item of `--data` that the document comes from; otherwise "".
        source: file or dataset that the document comes from; the store itself if the origin is
            unknown.
        row: line of the file or row of the dataset, from 1; None for plain text, token files and
            unknown origins.
        bytes: (begin, end) of the document's text in the decompressed source, or of its tokens in a
            token file; None for rows and unknown origins.
        document: number of the document in the split of the store, from 0; None in token files.
        length: number of the document's tokens in the store, EOS included.
        parts: for each part of the document in the batch, the index of the sequence in the batch,
            and the part's range (start, stop) in tokens of the document.
        targets: number of the document's tokens that count in the loss of the step.
        share: `targets` divided by all tokens that count in the loss of the step.
    """

    data: str
    source: str
    row: int | None
    bytes: tuple[int, int] | None
    document: int | None
    length: int
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    targets: int = 0
    share: float = 0.0


def located(
    order: Order, positions: Int64[np.ndarray, " n"]
) -> tuple[dict[str, Any], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Find the dataset, and the sequence in it, at each position of a data order.

    Returns:
        The datasets by name ("" for a single dataset). For each position, the index of its
        dataset among these, and the index of its sequence in the dataset.

    Raises:
        UserError: the order is not known in advance, as with streamed data.
    """
    if isinstance(order, Shuffled):
        indices = ids_at(order.seed, positions, len(order.dataset), order.shuffle)
        return {"": order.dataset}, np.zeros_like(positions), indices
    if not isinstance(order, Mixture):
        raise UserError(
            "The documents of a step cannot be computed for this run. Train on prepared data "
            "without --streaming to compute them."
        )
    numbers, within = order.places(positions)
    indices = np.empty_like(within)
    for number, dataset in enumerate(order.datasets.values()):
        here = np.flatnonzero(numbers == number)
        if len(here):
            indices[here] = ids_at(part_seed(order.seed, number + 1), within[here], len(dataset))
    return dict(order.datasets), numbers, indices


class DocumentFinder:
    """Finds the documents that training steps train on.

    Args:
        order: order of the training sequences, whose datasets must be `PackedSequences`.
        sequences_per_step: number of sequences over all micro-batches and processes.

    Attributes:
        used_sources: the entries in sources.json for the sources of all documents found so far, by
            name of the source.
    """

    def __init__(self, order: Order, sequences_per_step: int) -> None:
        self.order, self.sequences_per_step = order, sequences_per_step
        self.used_sources: dict[str, dict[str, Any]] = {}
        self._sources = cache(read_sources)
        self._origins = cache(lambda shard: shard.origins())
        self._starts = cache(_starts)

    def documents(self, step: int) -> list[LearnedDocument]:
        """Find the documents of a step (counted from 1), in the order of the batch.

        Raises:
            UserError: the documents cannot be computed for this kind of data, or a file is damaged.
        """
        size = self.sequences_per_step
        positions = np.arange((step - 1) * size, step * size, dtype=np.int64)
        datasets, numbers, indices = located(self.order, positions)
        found: dict[tuple[int, int, int], LearnedDocument] = {}
        for number, (name, packed) in enumerate(datasets.items()):
            if not isinstance(packed, PackedSequences):
                raise UserError(
                    "The sequences of this run were given in Python and are not in a token "
                    "store, so their documents are unknown. Prepare the data with consyn-prepare."
                )
            here = np.flatnonzero(numbers == number)
            pieces = packed.pieces(indices[here])
            for row, start, length in zip(*(values.tolist() for values in pieces), strict=True):
                for shard, at, begin, stop in self._parts(packed, start, start + length):
                    key = number, shard, at
                    if key not in found:
                        found[key] = self._document(packed, name, shard, at)
                    self._add(found[key], packed, (int(here[row]), shard, at), begin, stop)
        total = sum(document.targets for document in found.values())
        for document in found.values():
            document.share = document.targets / total if total else 0.0
        return sorted(found.values(), key=lambda document: document.parts[0])

    def _parts(
        self, packed: PackedSequences, start: int, stop: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Find the parts of documents in a range of the token stream.

        Yields:
            (shard number, document number in the shard, start, stop), where start and stop are
            token positions in the shard.
        """
        for number, offset, shard in packed.split.touched(start, stop):
            low, high = max(start - offset, 0), min(stop - offset, shard.num_tokens)
            starts = self._starts(shard)
            first, last = np.searchsorted(starts, [low, high - 1], "right") - 1
            for at in range(int(first), int(last) + 1):
                end = int(starts[at + 1]) if at + 1 < len(starts) else shard.num_tokens
                yield number, at, max(low, int(starts[at])), min(high, end)

    def _document(
        self, packed: PackedSequences, name: str, number: int, at: int
    ) -> LearnedDocument:
        """Build the entry of a document, including its origin; `parts` is still empty."""
        shard, before = packed.split.shards[number], packed.split.shards[:number]
        starts = self._starts(shard)
        begin = int(starts[at])
        end = int(starts[at + 1]) if at + 1 < len(starts) else shard.num_tokens
        if isinstance(shard, RawShard):
            return LearnedDocument(
                name, str(shard.path), None, shard.byte_range(begin, end), None, end - begin
            )
        document = sum(other.num_documents or 0 for other in before) + at
        directory = shard.directory if isinstance(shard, Shard) else Path()
        found = LearnedDocument(name, str(directory), None, None, document, end - begin)
        origins = self._origins(shard)
        if origins is None:
            return found
        source, first, last = origins[at].tolist()
        sources = self._sources(directory)
        if source >= len(sources):
            raise UserError(
                f"{directory} is damaged: a document names source {source} (counted from 0), but "
                f"there are only {len(sources)} sources. "
                "Prepare the data again."
            )
        found.source = sources[source]["name"]
        self.used_sources[found.source] = sources[source]
        found.row, found.bytes = (None, (first, last)) if last else (first, None)
        return found

    def _add(
        self,
        document: LearnedDocument,
        packed: PackedSequences,
        place: tuple[int, int, int],
        begin: int,
        stop: int,
    ) -> None:
        """Add a range of tokens to the parts of a document, and count its targets.

        Args:
            place: (sequence of the batch, shard number, document number in the shard).
            begin: token position in the shard at which the range begins.
            stop: token position in the shard before which the range ends.
        """
        sequence, number, at = place
        shard = packed.split.shards[number]
        start = int(self._starts(shard)[at])
        document.parts.append((sequence, begin - start, stop - start))
        if shard.num_targets == shard.num_tokens:
            targets, first_counts = stop - begin, True
        else:
            marks = np.empty(stop - begin, np.uint8)
            shard.peek_targets(begin, marks)
            targets, first_counts = int(np.count_nonzero(marks == 1)), bool(marks[0] == 1)
        if begin == start and first_counts and self._begins(shard, number, at):
            first = np.empty(1, shard.dtype)
            shard.peek(begin, first)
            targets -= packed.bos_id is None or int(first[0]) == packed.bos_id
        document.targets += targets

    def _begins(self, shard: Tokens, number: int, at: int) -> bool:
        """Whether a document begins in this shard, and not in an earlier file.

        Args:
            at: number of the document in the shard.
        """
        return at > 0 or not isinstance(shard, RawShard) or shard.begins_document


def _starts(shard: Tokens) -> np.ndarray:
    """Return the starts of the documents of a shard, with 0 added if it is missing."""
    starts = shard.starts
    return starts if len(starts) and starts[0] == 0 else np.concatenate([[0], starts])
