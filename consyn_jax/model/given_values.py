"""Checks of the arguments of `ConsynLMHeadModel`'s methods, such as ids, seed and directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from consyn_jax.errors import UserError
from consyn_jax.integers import is_whole
from consyn_jax.model.transformer import Compute
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.token_ids import as_array, check_fields, check_input_ids

UNPADDED = "pass lists without padding, because prompts may have any length"
MASKED = "put any id of the vocabulary there, and give segment_ids with 0 at padding"


def checked_ids(
    input_ids: Any, segment_ids: Any, vocab_size: int
) -> tuple[jax.Array, jax.Array | None]:
    """Check the ids and segment ids of a model call, and return them as arrays [B, T].

    The values are not checked under `jax.jit`, nor if an array is split over several processes.

    Raises:
        UserError: An id is outside the vocabulary, or an array is not a [B, T] array of integers.
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
            "and give segment_ids with 0 at padding."
        ) from None
    return array.astype(np.int32) if array.dtype == np.int64 and _fits(array) else array


def _fits(array: np.ndarray) -> bool:
    limits = np.iinfo(np.int32)
    return not array.size or bool(array.min() >= limits.min and array.max() <= limits.max)


def _parts(prompt: Any) -> Sequence[Any]:
    """Return a list or tuple as it is, and any other prompt in a list."""
    return prompt if isinstance(prompt, list | tuple) else [prompt]


def checked_prompts(prompts: Any, vocab_size: int) -> list[list[int]]:
    """Return the prompts of `generate` as lists of token ids.

    Raises:
        UserError: A prompt is not a row of token ids of the vocabulary.
    """
    found = []
    for i, ids in enumerate(as_array(prompts) if hasattr(prompts, "ndim") else prompts):
        if any(isinstance(part, Mapping) and "role" in part for part in _parts(ids)):
            raise UserError(
                "The prompts are messages of a conversation. Use consyn-generate with --file, or "
                "pass ids from apply_chat_template of transformers."
            )
        if isinstance(ids, Mapping):
            raise UserError(f"Prompt {i} is a dict, but must be ids. Pass its 'input_ids'.")
        if isinstance(ids, str):
            raise UserError(f"Prompt {i} is a text, and others are ids. Pass either texts or ids.")
        if isinstance(ids, int) or getattr(ids, "ndim", 1) == 0:
            raise UserError("The prompts are one row of ids. Pass [ids] to continue one prompt.")
        found.append(check_input_ids(ids, vocab_size, f"Prompt {i}", UNPADDED).tolist())
    return found


def checked_config(config: Any) -> ModelConfig:
    """Return `config` if it is a `ModelConfig`.

    Raises:
        UserError: `config` has another type, such as a dict or a configuration of transformers.
    """
    if not isinstance(config, ModelConfig):
        raise UserError(
            f"from_config takes a ModelConfig or the name of a preset, not a "
            f"{type(config).__name__}. For a Hugging Face model, use from_pretrained(DIR), or "
            "consyn-train --model DIR/config.json for new weights."
        )
    return config


def checked_seed(seed: Any) -> int:
    """Return the seed of initial weights as an int.

    Raises:
        UserError: `seed` is not a whole number from 0 to 2^32 - 1.
    """
    most = np.iinfo(np.uint32).max
    if not is_whole(seed) or not 0 <= seed <= most:
        raise UserError(f"seed must be a whole number from 0 to {most}, not {seed!r}.")
    return int(seed)


def checked_compute(compute: Any) -> Compute | None:
    """Return `compute` if it is a `Compute` or None.

    Raises:
        UserError: `compute` has another type, for example the name of a dtype.
    """
    if not isinstance(compute, Compute | None):
        raise UserError(
            f"compute is a {type(compute).__name__}, not a Compute. Pass "
            "model.default_compute(jnp.bfloat16), or leave compute out for float32."
        )
    return compute


def check_destination(directory: Path) -> None:
    """Check that a model can be saved in `directory`.

    Raises:
        UserError: `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(
            f"{directory} is a file, so a model cannot be saved in it. Give a directory."
        )


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Check that a tokenizer fits a model with a vocabulary of `vocab_size` tokens.

    Raises:
        UserError: The tokenizer is not a `BPETokenizer`, or has more tokens than the vocabulary.
    """
    if tokenizer is None:
        return
    if not isinstance(tokenizer, BPETokenizer):
        raise UserError(
            f"tokenizer is a {type(tokenizer).__name__}, not a BPETokenizer. Pass "
            "model.tokenizer or BPETokenizer.from_file(DIR)."
        )
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, more than the model's vocabulary of "
            f"{vocab_size}. Use the tokenizer that the model was trained with."
        )
