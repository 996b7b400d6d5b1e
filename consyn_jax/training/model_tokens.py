"""Choose the tokenizer for `ConsynTrainer`, and the ids that begin, end and pad documents."""

from __future__ import annotations

from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer


def model_tokenizer(model: Any, made_by: BPETokenizer | None) -> BPETokenizer | None:
    """Choose the tokenizer to save with the model: the model's tokenizer, or else the data's.

    Args:
        model: The model to train; a loaded model may have a tokenizer.
        made_by: Tokenizer that made the ids of the data; None if unknown.

    Raises:
        UserError: A loaded model and the data have different tokenizers.
    """
    own: BPETokenizer | None = getattr(model, "tokenizer", None)
    if own is None or made_by is None:
        return own or made_by
    if own.sha256 != made_by.sha256:
        raise UserError(
            f"The data and the model in {model.source} have different tokenizers. Pass "
            "tokenizer=model.tokenizer to get_dataset, or the data's tokenizer to ConsynTrainer."
        )
    return own


def document_ids(
    tokenizer: BPETokenizer | None, config: ModelConfig
) -> tuple[int | None, int | None, int | None]:
    """Return the ids that begin documents, end documents and pad sequences."""
    if tokenizer is not None:
        return tokenizer.first_id, tokenizer.eos_token_id, tokenizer.fill_id
    ends = config.eos_token_ids
    return config.bos_token_id, ends[0] if ends else None, config.pad_token_id
