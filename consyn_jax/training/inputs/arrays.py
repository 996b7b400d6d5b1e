"""The four arrays of a batch, derived from the arrays that the caller gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from consyn_jax.data.loader import Batch
from consyn_jax.data.sources.row_formats.suggestions import is_dialogue
from consyn_jax.errors import UserError, listed
from consyn_jax.tokenization.token_ids import NO_TARGETS, are_targets, as_array
from consyn_jax.training.inputs.content import documents

IGNORED = NO_TARGETS[0]
COMPARED = 3  # least number of targets for a check that labels are the next tokens
# Advice for an id that stands for padding, if rows are passed one by one.
UNPADDED = "leave it out, since rows may have any length"
USED = ("input_ids", "labels", "segment_ids", "loss_mask", "attention_mask", "position_ids")


def complete(raw: Any, labels_are_ids: bool | None = None) -> Batch:
    """Derive all four arrays of a batch [b, T] from the arrays in `raw`.

    Without labels, the labels are the next tokens of the sequence. Labels that equal the input_ids
    are shifted by one, because transformers' collators make such labels for models that shift them.
    A token is a target if its label is neither -100 nor -1, its loss_mask is true, and it is not
    padding. Without segment_ids, a row is one document, and `attention_mask` marks its padding. If
    `position_ids` restart in a row, each restart begins another document. Rows of unequal length
    are padded.

    Args:
        raw: A mapping such as a dict or a `BatchEncoding`, the input_ids alone, or a pair of
            input_ids and labels.
        labels_are_ids: Whether labels equal the input_ids in other batches of the same data; None
            if unknown.

    Raises:
        UserError: There are no input_ids, or the shapes of the arrays differ.
    """
    arrays = _arrays(raw)
    ids = arrays["input_ids"]
    segments = arrays.get("segment_ids", arrays.get("attention_mask", np.ones_like(ids)))
    if "position_ids" in arrays:
        segments = documents(segments, arrays["position_ids"])
    labels = arrays.get("labels")
    if labels_are_ids is None and labels is not None:
        labels_are_ids = are_ids(ids, labels)
    if labels is None or labels_are_ids:
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        for mask in (arrays.get("loss_mask"), None if labels is None else are_targets(labels)):
            same = same if mask is None else same & mask[:, 1:].astype(bool)
        labels, mask, ids, segments = ids[:, 1:], same, ids[:, :-1], segments[:, :-1]
    else:
        mask, labels = are_targets(labels), np.where(are_targets(labels), labels, 0)
        mask &= segments > 0
        mask &= arrays.get("loss_mask", mask).astype(bool)
    as_int = {"input_ids": ids, "labels": labels, "segment_ids": segments}
    return {name: value.astype(np.int32) for name, value in as_int.items()} | {"loss_mask": mask}


def are_ids(ids: np.ndarray, labels: np.ndarray) -> bool | None:
    """Whether the labels equal the input_ids, without a shift; None if this cannot be told.

    >>> are_ids(np.array([5, 6, 7]), np.array([-100, 6, 7]))
    True
    >>> are_ids(np.array([5, 6, 7]), np.array([6, 7, 2]))
    False
    """
    targets = are_targets(labels)
    if len(np.unique(ids[targets])) < 2:  # a repeated token equals both itself and the next token
        return None
    return np.array_equal(labels[targets], ids[targets])


def shown_labels(raw: Any) -> bool | None:
    """Whether the labels of a batch equal its input_ids; None if this cannot be told."""
    arrays = _arrays(raw)
    return are_ids(arrays["input_ids"], arrays["labels"]) if "labels" in arrays else None


def described_labels(batch: Batch, labels_are_ids: bool | None) -> str:
    """Describe unusual labels for the run's header; return "" if the labels are the next tokens.

    Labels are unusual if more than half of them differ from the next token. Some may differ, such
    as the label at the end of a document. Collators for masked language models make unusual labels.

    Args:
        batch: The first batch or row, from `complete`.
    """
    if labels_are_ids:
        return "; labels shifted by one"
    segments, labels = batch["segment_ids"], batch["labels"]
    told = batch["loss_mask"][:, :-1] & (segments[:, 1:] == segments[:, :-1])
    unlike = np.sum(told & (labels[:, :-1] != batch["input_ids"][:, 1:]))
    if np.sum(told) < COMPARED or 2 * unlike <= np.sum(told):
        return ""
    return "; labels that are not the next tokens (a collator of transformers needs mlm=False)"


def check_labels_agree(shown: bool | None, known: bool | None, where: str) -> bool | None:
    """Check that labels equal the input_ids in all rows or batches, or in none.

    Args:
        shown: Result of `are_ids` for these labels.
        known: Result of `are_ids` for earlier labels of the data.

    Returns:
        The result for all labels so far, to pass as `known` in the next call.

    Raises:
        UserError: The two results differ.
    """
    if shown is None or known is None:
        return known if shown is None else shown
    if shown != known:
        here, earlier = ("equal", "differ from") if shown else ("differ from", "equal")
        raise UserError(
            f"{where} has labels that {here} the input_ids, but earlier labels {earlier} them. "
            "Give labels of one kind: the input_ids, or the tokens after them."
        )
    return known


def fit(batch: Batch, block_size: int, rows: int) -> Batch:
    """Pad a batch to [rows, block_size] with masked rows and columns, and cut longer rows."""
    given, tokens = batch["labels"].shape
    padding = ((0, rows - given), (0, max(0, block_size - tokens)))
    return {name: np.pad(values[:, :block_size], padding) for name, values in batch.items()}


class CutRows:
    """Warns once if rows are longer than a sequence, and are therefore cut."""

    def __init__(self, block_size: int) -> None:
        self._block_size, self._is_said = block_size, False

    def look(self, batch: Batch, warn: Callable[[str], None]) -> None:
        """Warn if the rows of `batch` are longer than a sequence; call this before they are cut."""
        tokens = batch["labels"].shape[1]
        if tokens > self._block_size and not self._is_said:
            self._is_said = True
            warn(
                f"A row of the data has {tokens:,} tokens; rows are cut to max_tokens, "
                f"{self._block_size:,}. Set a larger max_tokens to keep all of their tokens."
            )


def check_length(tokens: int, block_size: int, where: str) -> None:
    """Check that a sequence is not longer than `block_size`.

    Args:
        tokens: Number of tokens that the model reads; without labels, this is one less than the
            number of ids.

    Raises:
        UserError: The sequence is longer.
    """
    if tokens > block_size:
        raise UserError(
            f"{where} needs max_tokens={tokens}, but max_tokens is {block_size}. Shorten the "
            f"sequence, or set max_tokens={tokens} and use a model whose context is at least as "
            "long."
        )


def check_columns(fields: Mapping[str, Any], first: Mapping[str, Any], where: str) -> None:
    """Check that a row or batch has the same columns as the first one.

    Raises:
        UserError: The row or batch differs from the first one.
    """
    for name in USED:
        if (fields.get(name) is None) != (first.get(name) is None):
            here, there = ("no ", "") if fields.get(name) is None else ("", "no ")
            raise UserError(
                f"{where} has {here}{name}, and the first one has {there}{name}. Give {name} in "
                "all of them or in none."
            )


def fields_of(raw: Any, where: str = "A batch") -> Mapping[str, Any]:
    """Return the arrays of a batch or of a single row, by name.

    Args:
        raw: A mapping with input_ids, an array of input_ids, or a tuple (input_ids, labels).
        where: Name of the batch or row in messages.

    Raises:
        UserError: `raw` has none of these forms.
    """
    if isinstance(raw, Mapping):
        if raw.get("input_ids") is not None:
            return raw
        texts = [str(key) for key, value in raw.items() if isinstance(value, str)]
        chats = [str(key) for key, value in raw.items() if is_dialogue(value)]
        hint = "Give the ids of its tokens"
        if texts or chats:
            hint = f"Tokenise {(chats or texts)[0]!r}, or write the rows to a file for get_dataset"
        names = sorted(map(repr, raw.keys() - {"input_ids"}))
        found = f", but {listed(names)}" if names else ""
        raise UserError(f"{where} has no input_ids{found}. {hint}.")
    if hasattr(raw, "ndim"):
        return {"input_ids": raw}
    if isinstance(raw, tuple | list) and 0 < len(raw) < 3 and hasattr(raw[0], "ndim"):
        return dict(zip(("input_ids", "labels"), raw, strict=False))
    raise UserError(
        f"{where} is {'None' if raw is None else f'of type {type(raw).__name__}'}, but must be a "
        "dict with 'input_ids'. Data may also be a dataset of get_dataset or a list of token "
        "lists."
    )


def one_row(fields: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Make a batch of one row."""
    return {name: [values] for name, values in fields.items() if values is not None}


def each_row(fields: Mapping[str, Any]) -> list[dict[str, list[Any]]]:
    """Split a batch into its rows; each is a batch of one row with its ids and labels."""
    ids, labels = fields["input_ids"], fields["labels"]
    return [{"input_ids": [ids[i]], "labels": [labels[i]]} for i in range(len(ids))]


def _arrays(raw: Any) -> dict[str, np.ndarray]:
    given = fields_of(raw)
    columns = {name: _rows(given[name]) for name in USED if given.get(name) is not None}
    shapes = {
        name: rows.shape if isinstance(rows, np.ndarray) else tuple(map(len, rows))
        for name, rows in columns.items()
    }
    wanted = shapes["input_ids"]
    if isinstance(columns["input_ids"], np.ndarray) and len(wanted) != 2:
        raise UserError(
            f"A batch's input_ids must be [sequences, tokens], not of shape {wanted}. Give one "
            "row per sequence."
        )
    for name, shape in shapes.items():
        if shape != wanted:
            raise UserError(
                f"A batch's {name} must have the shape of its input_ids, {wanted}, not {shape}. "
                f"Give one value of {name} per token."
            )
    if isinstance(columns["input_ids"], list):
        attended = [np.ones(length, np.int64) for length in wanted]
        columns.setdefault("segment_ids", columns.get("attention_mask", attended))
        padding = {"labels": IGNORED}
        columns = {name: _padded(rows, padding.get(name, 0)) for name, rows in columns.items()}
    return {name: np.asarray(rows) for name, rows in columns.items()}


def _rows(values: Any) -> np.ndarray | list[np.ndarray]:
    """Return a column as one array, or as a list of rows if their lengths differ."""
    if isinstance(values, Sequence) or getattr(values, "dtype", None) == np.dtype(object):
        rows = [as_array(row) for row in values]
        if all(row.ndim == 1 for row in rows) and len({len(row) for row in rows}) > 1:
            return rows
        return np.stack(rows) if len({row.shape for row in rows}) == 1 else np.empty(0)
    return as_array(values)


def _padded(rows: Any, padding: int) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), padding, np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
