"""Check the ids that a caller gives to a model or to `generate`, and make JAX arrays of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from consyn_jax.errors import UserError
from consyn_jax.tokenization.token_ids import as_array, check_fields, check_input_ids

UNPADDED = "leave it out and pass lists, since prompts may have any length"
MASKED = "put any id of the vocabulary there and 0 in segment_ids"


def checked_ids(
    input_ids: Any, segment_ids: Any, vocab_size: int
) -> tuple[jax.Array, jax.Array | None]:
    """The ids [B, T] and the documents of a call of a model.

    Traced arrays, and those that are split over several processes, have no values to check.

    Raises:
        UserError: An id is outside the vocabulary, or the arrays have other shapes.
    """
    if input_ids is None:
        raise UserError("The model needs token ids, not None. Pass ids [rows, tokens].")
    given = {"input_ids": input_ids, "segment_ids": segment_ids}
    fields = {name: values for name, values in given.items() if values is not None}
    for name, values in fields.items():
        if isinstance(values, Mapping):
            raise UserError(f"A model takes ids, not a dict. Pass batch[{name!r}].")
        if not isinstance(values, jax.Array):
            fields[name] = _rectangle(values, name)
        shape = fields[name].shape
        if len(shape) != 2 or 0 in shape:
            one_row = "Pass [ids] or ids[None] for one row"
            hint = one_row if len(shape) == 1 else "Give [rows, tokens], at least one of each"
            raise UserError(f"The model's {name} have shape {shape}. {hint}.")
    if all(_has_values(values) for values in fields.values()):
        here = {name: as_array(values) for name, values in fields.items()}
        check_fields(here, vocab_size, "The model's input", MASKED)
    found = {name: jnp.asarray(values) for name, values in fields.items()}
    for name, values in found.items():
        if not jnp.issubdtype(values.dtype, jnp.integer):
            raise UserError(f"The model's {name} are {values.dtype}. Pass them as int32.")
    return found["input_ids"], found.get("segment_ids")


def _has_values(values: Any) -> bool:
    if isinstance(values, jax.core.Tracer):
        return False
    return not isinstance(values, jax.Array) or values.is_fully_addressable


def _rectangle(values: Any, name: str) -> np.ndarray:
    try:
        array = as_array(values)
    except (ValueError, TypeError):  # lists of unequal length
        raise UserError(
            f"The model's {name} have rows of unequal length. Pad them at the end with any id, "
            "and give segment_ids with 0 there."
        ) from None
    return array.astype(np.int32) if array.dtype == np.int64 and _fits(array) else array


def _fits(array: np.ndarray) -> bool:
    limits = np.iinfo(np.int32)
    return not array.size or bool(array.min() >= limits.min and array.max() <= limits.max)


def checked_prompts(prompts: Any, vocab_size: int) -> list[list[int]]:
    """The ids of the prompts of `generate`.

    Raises:
        UserError: They are not rows of ids of the vocabulary.
    """
    found = []
    for i, ids in enumerate(as_array(prompts) if hasattr(prompts, "ndim") else prompts):
        if isinstance(ids, Mapping):
            raise UserError(f"Prompt {i} is a dict, but must be ids. Pass its 'input_ids'.")
        if isinstance(ids, str):
            raise UserError(f"Prompt {i} is a text, and others are ids. Pass one or the other.")
        if isinstance(ids, int) or getattr(ids, "ndim", 1) == 0:
            raise UserError("The prompts are one row of ids. Pass [ids] to continue one prompt.")
        found.append(check_input_ids(ids, vocab_size, f"Prompt {i}", UNPADDED).tolist())
    return found
