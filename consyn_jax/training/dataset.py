"""`ConsynDataset` and `MixedDataset`, on which the commands and the Python API train.

`get_dataset` makes a `ConsynDataset` in one call. This module does not import JAX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.data.loader import Shuffled
from consyn_jax.data.mixture import Joined, Mixture
from consyn_jax.data.packing import PackedSequences, Sequences, WholeDocuments, pack
from consyn_jax.data.pairs import PairDataset
from consyn_jax.data.preparation.cached_store import Prepared, prepare
from consyn_jax.data.preparation.preparation_spec import place_of
from consyn_jax.data.split import TRAIN, VALIDATION
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError, counted, listed, nearest
from consyn_jax.integers import is_whole
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.resolve import resolve_preparation
from consyn_jax.tokenization import BPETokenizer

LOWEST = {"block_size": 1, "seed": 0}
CHOICES = {"packing": ("cut", "whole"), "on_long_rows": ("truncate", "drop", "error")}


class ConsynDataset:
    """Packed sequences of a token store, in a shuffled order that a seed determines.

    Item i is sequence `order.ids_at(seed, [i], len(self))` of `packed`. It depends only on the
    data, `block_size`, `seed` and i. In a pass over all items, every token of the split is a label
    exactly once. A validation split is not shuffled.

    `ConsynTrainer` uses `packed` and `seed`, and shuffles anew in every epoch. The first epoch of
    `ConsynTrainer` has the order of these items.

    Attributes:
        packed: The sequences in the order of the store.
        prepared: The token store, and the source files that were read or left out.
    """

    def __init__(
        self, prepared: Prepared, packed: PackedSequences, seed: int, shuffle: bool
    ) -> None:
        self.prepared, self.packed, self.seed, self.shuffle = prepared, packed, seed, shuffle

    def with_seed(self, seed: int) -> ConsynDataset:
        """Return the same sequences, shuffled with another seed."""
        return ConsynDataset(self.prepared, self.packed, seed, self.shuffle)

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, i: int) -> Sequences:
        """Return item i: int32 arrays "input_ids", "labels", "segment_ids", and a bool "loss_mask".

        Each array has shape [block_size].
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"Item {i} of {len(self)}.")
        return {name: values[0] for name, values in self.rows([i % len(self)]).items()}

    def rows(self, indices: Any) -> Sequences:
        """Return the items at n `indices`, each in range(len(self)), as arrays [n, block_size]."""
        return Shuffled(self.packed, self.seed, self.shuffle).at(np.asarray(indices, np.int64))

    @property
    def tokenizer(self) -> BPETokenizer:
        """The tokenizer that made the ids."""
        return self.prepared.store.tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of the token ids in store order; a run resumes only with data of the same hash."""
        return self.prepared.store.fingerprint

    @property
    def read(self) -> set[str]:
        """Names of the data sources whose documents can be in this split."""
        by_name = {place_of(source) for source in self.prepared.validation}
        if by_name and not self.shuffle:
            return by_name
        return {place_of(source) for source in self.prepared.used} - by_name

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the split; each is a label once per epoch."""
        return self.packed.num_tokens

    @property
    def num_targets(self) -> int:
        """Number of tokens in the split that count in the loss."""
        return self.packed.num_targets

    @property
    def num_documents(self) -> int | None:
        """Number of documents in the split; None if the store has no count."""
        return self.packed.num_documents

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the split's text, for bits per byte; None if the store has no count."""
        return self.packed.num_bytes


class MixedDataset:
    """Several datasets as one: mixed by weight in training, concatenated in evaluation.

    Args:
        sources: The datasets by name. The names appear in events and in the header of a run.
        weights: Weight of each source, proportional to the source's share of the training
            sequences.
        seed: Seed of the order; the seeds of the sources are not used.

    Attributes:
        order: Order of the training sequences, a `data.mixture.Mixture`.

    Raises:
        UserError: The sources have different tokenizers or sequence lengths, or a weight is not
            above 0.
    """

    def __init__(
        self, sources: Mapping[str, ConsynDataset], weights: Sequence[float | int], seed: int
    ) -> None:
        if not sources:
            raise UserError("A mixture needs at least one dataset.")
        if not isinstance(sources, Mapping) or isinstance(weights, Mapping):
            raise UserError(
                "A mixture takes datasets by name and a list of weights in the same order, as in "
                'MixedDataset({"a": one, "b": two}, [3, 1], seed=42).'
            )
        self.sources, self.weights = dict(sources), weights
        (first, dataset), *others = self.sources.items()
        for name, other in others:
            if other.tokenizer.sha256 != dataset.tokenizer.sha256:
                raise UserError(
                    f"{first} and {name} were made with different tokenizers and cannot be mixed. "
                    "Prepare both with the same --tokenizer."
                )
            if other.packed.block_size != dataset.packed.block_size:
                lengths = f"{dataset.packed.block_size} and {other.packed.block_size}"
                raise UserError(
                    f"{first} and {name} have sequences of {lengths} tokens and cannot be mixed. "
                    "Give both the same block_size."
                )
        packed = {name: source.packed for name, source in self.sources.items()}
        try:
            self.order = Mixture(packed, weights, seed)
        except ValueError as error:
            raise UserError(f"These datasets cannot be mixed: {error}") from error
        self._joined = Joined(list(packed.values()))
        self.block_size, self.tokenizer = dataset.packed.block_size, dataset.tokenizer
        content = [
            [source.fingerprint for source in self.sources.values()],
            [float(weight) for weight in weights],
        ]
        self.fingerprint = (
            "mixture:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        )
        self.num_tokens = sum(source.num_tokens for source in self.sources.values())
        self.num_targets = sum(source.num_targets for source in self.sources.values())
        sizes = [source.num_bytes for source in self.sources.values()]
        self.num_bytes = None if None in sizes else sum(size for size in sizes if size is not None)

    def with_seed(self, seed: int) -> MixedDataset:
        """Return the same mixture, shuffled with another seed."""
        return MixedDataset(self.sources, self.weights, seed)

    def __len__(self) -> int:
        return len(self._joined)

    def rows(self, indices: Any) -> Sequences:
        """Return the sequences at n `indices` of the joined sources, as arrays [n, block_size]."""
        return self._joined.rows(indices)


def get_dataset(
    data_path: str | Path | Sequence[str | Path],
    tokenizer: BPETokenizer | str | None = None,
    block_size: int = 1024,
    dataset_type: str = "auto",
    split: str = TRAIN,
    seed: int = 42,
    *,
    packing: str | None = None,
    on_long_rows: str | None = None,
    test_fraction: float = 0.0,
    **options: Any,
) -> ConsynDataset:
    """Make a dataset of packed sequences from raw text, rows or a token store.

    Raw data is tokenised once, and the tokens are cached on disk.

    Args:
        data_path: A file, directory, glob, Hugging Face dataset, token store or "sample", or a list
            of these.
        tokenizer: A tokenizer, or a value of `--tokenizer`. By default, a token store keeps its
            tokenizer, and other data gets the default of `--tokenizer`.
        block_size: Tokens per sequence.
        split: "train", "validation" or "test".
        packing, on_long_rows: Values of `--packing` and `--on_long_rows`. By default (None), rows
            with prompts are not cut.
        test_fraction: Share of the documents that goes into the split "test".
        options: Other flags of `consyn-prepare` for reading and cleaning, by name.

    Returns:
        A dataset whose items have the arrays "input_ids", "labels" and "segment_ids", int32
        [block_size], and "loss_mask", bool [block_size]. `labels[t]` is the token after
        `input_ids[t]`. With row_format="preference", arrays are [2 * block_size]: the chosen
        sequence, then the rejected one.

    Raises:
        UserError: The data cannot be prepared (see `cached_store.prepare`), an option or the split
            is unknown, or the split is empty.
    """
    choices = {"packing": packing, "on_long_rows": on_long_rows}
    _check_arguments(tokenizer, {"block_size": block_size, "seed": seed}, choices, options)
    paths = list(map(str, [data_path] if isinstance(data_path, str | Path) else data_path))
    given = {"data": paths, "dataset_type": dataset_type, "test_fraction": test_fraction, **options}
    made = tokenizer if isinstance(tokenizer, BPETokenizer) else None
    resolved, _ = resolve_preparation(given | {"tokenizer": None if made else tokenizer})
    prepared = prepare(resolved.data, made, test_fraction=test_fraction)
    documents = _split(prepared, split, paths)
    packed = pack_split(prepared, documents, block_size, packing, on_long_rows)
    _warn_of_omissions(prepared, packed)
    return ConsynDataset(prepared, packed, seed, shuffle=split == TRAIN)


def pack_split(
    prepared: Prepared,
    documents: StoreSplit,
    block_size: int,
    packing: str | None,
    on_long_rows: str | None,
) -> PackedSequences:
    """Pack the documents of a split into sequences, or into pairs of sequences.

    Args:
        packing, on_long_rows: Arguments of `get_dataset`.

    Raises:
        UserError: No target is left, because all rows are too long.
    """
    tokenizer = prepared.store.tokenizer
    ids = tokenizer.first_id, tokenizer.fill_id
    if prepared.store.holds_pairs:
        if packing is not None:
            raise UserError(
                f"packing {packing!r} does not work for pairs of sequences. Leave packing out."
            )
        packed: PackedSequences = PairDataset(documents, block_size, *ids, on_long_rows)
    else:
        packed = pack(documents, block_size, *ids, packing, on_long_rows)
    is_cut = isinstance(packed, WholeDocuments | PairDataset) and packed.num_long > 0
    if is_cut and not packed.num_targets:
        names = listed([source.name for source in prepared.used])
        raise UserError(
            f"The rows of {names} are longer than a sequence of {block_size:,} tokens, "
            "so no target is left to learn. Use longer sequences (--max_tokens, or block_size in "
            "Python), as far as the model's context allows, or shorten the prompts."
        )
    return packed


def _check_arguments(
    tokenizer: Any,
    numbers: Mapping[str, Any],
    choices: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    if not isinstance(tokenizer, BPETokenizer | str | Path | None):
        place = getattr(tokenizer, "name_or_path", "") or "DIR"
        raise UserError(
            f"tokenizer is a {type(tokenizer).__name__}, not a BPETokenizer. Pass the directory or "
            f"the hub id that it is from: tokenizer={place!r}."
        )
    for name, number in numbers.items():
        if not is_whole(number) or number < LOWEST[name]:
            raise UserError(
                f"{name} must be a whole number of at least {LOWEST[name]}, not {number!r}."
            )
    for name, words in CHOICES.items():
        if choices.get(name) not in (None, *words):
            raise UserError(
                f"{name} {choices[name]!r} is not known{nearest(str(choices[name]), words)} Known: "
                f"{', '.join(words)}."
            )
    known = [f.name for f in dataclasses.fields(CorpusOptions)]
    for name in options:
        if name not in known:
            raise UserError(f"{name} is not an option of get_dataset{nearest(name, known)}")


def _split(prepared: Prepared, split: str, paths: Sequence[str]) -> StoreSplit:
    names = sorted({TRAIN, VALIDATION, *prepared.store.splits})
    if split not in names:
        raise UserError(f"There is no split {split!r} in the data. Known: {', '.join(names)}.")
    documents = prepared.store.split(split)
    if not documents.num_tokens:
        shares = {TRAIN: "make the other splits smaller"}
        share = shares.get(split, f"raise {split}_fraction")
        if prepared.used[0].is_store:
            share = f"prepare it again with consyn-prepare: {share}"
        raise UserError(
            f"The split {split!r} of {', '.join(paths)} has no documents. Give more data, or "
            f"{share}."
        )
    return documents


def _warn_of_omissions(prepared: Prepared, packed: PackedSequences) -> None:
    for name, reason in prepared.left_out:
        warnings.warn(f"{name} is left out: it {reason}.", stacklevel=3)
    bad = prepared.report.dropped.get("bad row", 0)
    if bad:
        warnings.warn(
            f"{bad} bad rows were left out. The first one: "
            f"{prepared.report.examples['bad row'][0]}",
            stacklevel=3,
        )
    if isinstance(packed, WholeDocuments | PairDataset) and packed.lost_tokens:
        warnings.warn(
            f"{counted(packed.num_long, 'row')} longer than block_size={packed.block_size} lost "
            f"{packed.lost_tokens:,} tokens (on_long_rows={packed.on_long!r}).",
            stacklevel=3,
        )
