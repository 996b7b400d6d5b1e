"""Check rows that the user passes in Python: token ids, labels and masks.

Messages name the row, the position in the row, and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from consyn_jax.errors import UserError

NO_TARGETS = (-100, -1)  # the ignore_index of torch and that of nanoGPT
LABELS = (
    "Give one label for each token: the same as input_ids, with -100 where a token is not a target."
)
# Columns other than ids and labels, each with the advice that messages give about its values.
COLUMNS = {
    "attention_mask": "Give 1 for each token and 0 for padding; number documents in segment_ids.",
    "loss_mask": "Give 1 for each token that is a target and 0 for others.",
    "segment_ids": "Number the documents of a row from 1, and give 0 for padding.",
    "position_ids": "Count the tokens of each document from 0, or leave position_ids out.",
}
MASKED = "put any id there, and give every batch an attention_mask with 0 at padding"


def as_array(values: Any) -> np.ndarray:
    """Convert a list, or an array of any library, to a NumPy array in host memory."""
    if hasattr(values, "detach"):  # a tensor of torch, perhaps on a GPU
        values = values.detach().cpu()
    return np.asarray(values)


def are_targets(labels: np.ndarray) -> np.ndarray:
    """Return a mask of the labels that count in the loss.

    >>> are_targets(np.array([5, -100, -1, 0])).tolist()
    [True, False, False, True]
    """
    return ~np.isin(labels, NO_TARGETS)


def is_batch(fields: Mapping[str, Any]) -> bool:
    """Whether `fields` is a batch of rows, and not a single row."""
    return _is_nested(fields.get("input_ids"))


def _is_nested(values: Any) -> bool:
    try:
        return np.ndim(values[0]) > 0
    except (IndexError, KeyError, TypeError):  # empty, or no sequence
        return False
    except ValueError:  # lists of unequal length
        return True


def check_fields(
    fields: Mapping[str, Any], vocab_size: int | None, place: str, masked: str = MASKED
) -> None:
    """Check the ids of a row or batch, and that its labels and masks match the ids.

    Args:
        fields: arrays by name; only ids, labels and masks are checked.
        vocab_size: size of the vocabulary; None if not known yet.
        place: name of the row or batch in messages, such as "Row 3 of train_dataloader".
        masked: advice on padding for the message about a negative id.

    Raises:
        UserError: an id is outside the vocabulary, or labels or masks do not match the ids.
    """
    given = {
        name: fields[name]
        for name in ("input_ids", "labels", *COLUMNS)
        if fields.get(name) is not None
    }
    if "input_ids" not in given:
        raise UserError(f"{place} has no input_ids. Give the ids of its tokens.")
    shape = getattr(given["input_ids"], "shape", ())
    if len(shape) == 2 and 0 in shape:
        raise UserError(f"{place} is empty. Leave it out.")
    for where, row in _rows(given, place):
        ids = check_input_ids(row["input_ids"], vocab_size, where, masked)
        for name in given.keys() - {"input_ids"}:
            values, size = _numbers(row[name], name, where), len(ids)
            remedy = COLUMNS.get(name, LABELS)
            if values.shape != ids.shape:
                raise UserError(
                    f"{where} has {name} of shape {values.shape} for {size:,} input_ids. {remedy}"
                )
            if name == "labels":
                _check_labels(values, vocab_size, where)
            else:
                _check_mask(values, name, where)
        if "position_ids" in given:
            _check_positions(row, where)
        if "segment_ids" in given and "attention_mask" in given:
            _check_padding_agrees(row, where)
        if "labels" in given:
            _check_direction(ids, as_array(row["labels"]), where)


def check_input_ids(
    ids: Any, vocab_size: int | None, where: str, masked: str = MASKED
) -> np.ndarray:
    """Check the ids of one row and return them as whole numbers [T].

    Raises:
        UserError: the values are not ids in the vocabulary.
    """
    values = _numbers(ids, "input_ids", where)
    if values.ndim != 1:
        raise UserError(
            f"{where} has input_ids of shape {values.shape}. Give the ids of one row as a list or "
            "an array of one dimension."
        )
    if not values.size:
        return values.astype(np.int64)
    if values.dtype.kind not in "iu":
        position = int(np.argmax(values != np.round(values))) if values.dtype.kind == "f" else 0
        raise UserError(
            f"{where} has {values[position]} in input_ids at position {position:,}, but ids are "
            "whole numbers. Pass them as int32 or int64, as the tokenizer gives them."
        )
    if values.min() < 0:
        position = int(np.argmax(values < 0))
        if values[position] == NO_TARGETS[0]:
            raise UserError(
                f"{where} has -100 in input_ids at position {position:,}, which only labels may "
                f"have. Give the token's id there; if it stands for padding, {masked}."
            )
        raise UserError(
            f"{where} has token id {values[position]:,} in input_ids at position {position:,}, but "
            f"ids begin at 0. If it stands for padding, {masked}."
        )
    _check_below(values, vocab_size, "input_ids", where)
    return values.astype(np.int64)


def _rows(given: Mapping[str, Any], place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name for messages, fields) for each row; `given` is a batch or a single row."""
    if not is_batch(given):
        yield place, given
        return
    count = len(given["input_ids"])
    for name, values in given.items():
        remedy = COLUMNS.get(name, LABELS)
        if not _is_nested(values):
            raise UserError(
                f"{place} has several rows of input_ids, but its {name} are not a list of rows. "
                f"Give one row of {name} for each row of input_ids."
            )
        if len(values) != count:
            raise UserError(
                f"{place} has {len(values):,} rows of {name} for {count:,} rows of input_ids. "
                f"{remedy}"
            )
    for i in range(count):
        yield f"{place}, row {i},", {name: values[i] for name, values in given.items()}


def _numbers(values: Any, name: str, where: str) -> np.ndarray:
    try:
        numbers = as_array(values)
    except (ValueError, TypeError):  # lists of unequal length
        numbers = np.empty(0, object)
    if numbers.dtype.kind not in "iufb":
        raise UserError(f"{where} has {_no_number(values, name)}. Give an int32 for each token.")
    return numbers


def _no_number(values: Any, name: str) -> str:
    """Describe the first value that is not a number."""
    if isinstance(values, list | tuple):
        for position, value in enumerate(values):
            if isinstance(value, int) and value.bit_length() > 64:
                return f"{name} with a number of {value.bit_length()} bits at position {position:,}"
            if not isinstance(value, int | float | np.number | np.bool_):
                kind = type(value).__name__
                return f"a {kind} instead of a number in {name} at position {position:,}"
    return f"{name} of type {getattr(values, 'dtype', type(values).__name__)}, not numbers"


def _check_labels(values: np.ndarray, vocab_size: int | None, where: str) -> None:
    if not values.size:
        return
    if values.dtype.kind not in "iu":
        raise UserError(
            f"{where} has labels of {values.dtype}, but labels are token ids or -100. Pass them as "
            "int32 or int64."
        )
    wrong = (values < 0) & are_targets(values)
    if wrong.any():
        position = int(np.argmax(wrong))
        raise UserError(
            f"{where} has label {values[position]:,} at position {position:,}, which is not a "
            "token id. Mark a token that is not a target with -100."
        )
    _check_below(values, vocab_size, "labels", where)


def _check_below(values: np.ndarray, vocab_size: int | None, name: str, where: str) -> None:
    if vocab_size is None or values.max() < vocab_size:
        return
    position = int(np.argmax(values >= vocab_size))
    raise UserError(
        f"{where} has token id {values[position]:,} in {name} at position {position:,}, but the "
        f"vocabulary ends at {vocab_size - 1:,}. Use the tokenizer that the model was made with."
    )


def _check_mask(values: np.ndarray, name: str, where: str) -> None:
    if values.dtype.kind == "b":
        return
    wrong = values != np.round(values)
    if name != "position_ids":  # positions of padding may have any value
        wrong |= values < 0
    if name in ("loss_mask", "attention_mask"):
        wrong |= values > 1
    if wrong.any():
        position = int(np.argmax(wrong))
        raise UserError(
            f"{where} has {values[position]} in {name} at position {position:,}. {COLUMNS[name]}"
        )


def _check_padding_agrees(row: Mapping[str, Any], where: str) -> None:
    """Check that segment_ids and attention_mask mark the same positions as padding."""
    wrong = (as_array(row["segment_ids"]) > 0) != (as_array(row["attention_mask"]) > 0)
    if wrong.any():
        raise UserError(
            f"{where} has segment_ids and attention_mask that disagree about padding at position "
            f"{int(np.argmax(wrong)):,}. Give only one of the two columns."
        )


def _check_direction(ids: np.ndarray, labels: np.ndarray, where: str) -> None:
    """Raise UserError if the label at each position is the previous token, not the next one."""
    targets = are_targets(labels[1:])
    told = labels[1:][targets]
    is_backward = np.array_equal(told, ids[:-1][targets])
    if not is_backward or len(np.unique(told)) < 2 or np.array_equal(told, ids[1:][targets]):
        return  # a single repeated token does not show the direction
    forward = are_targets(labels[:-1])
    if not np.array_equal(labels[:-1][forward], ids[1:][forward]):
        raise UserError(
            f"{where} has labels that are shifted the wrong way: each is the previous token. Give "
            "labels that equal the input_ids, or labels that are each the next token."
        )


def _check_positions(row: Mapping[str, Any], where: str) -> None:
    """Check that position_ids count up by one, and restart at 0 only where a document begins."""
    positions = as_array(row["position_ids"])
    marks = row.get("segment_ids", row.get("attention_mask"))
    segments = np.ones_like(positions) if marks is None else as_array(marks)
    attended = segments > 0
    goes_on = (segments[1:] == segments[:-1]) & attended[1:]
    restarts = goes_on & (positions[1:] == 0)
    wrong = np.zeros(positions.shape, bool)
    wrong[1:] = goes_on & ~restarts & (positions[1:] != positions[:-1] + 1)
    wrong |= attended & (positions < 0)
    if restarts.any() and not positions[attended].any():  # all positions are 0
        wrong[1:] |= restarts
    if wrong.any():
        position = int(np.argmax(wrong))
        raise UserError(
            f"{where} has position_ids that neither count up by one nor restart at 0 with a "
            f"document, first at position {position:,}. Leave position_ids out, or mark documents "
            "with segment_ids."
        )
