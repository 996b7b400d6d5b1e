"""The tokenizer of a run from Python, and the ids that begin, end and pad its documents."""

from __future__ import annotations

from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer


def model_tokenizer(model: Any, made_by: BPETokenizer | None) -> BPETokenizer | None:
    """The tokenizer to save beside the model: its own, or that of the data.

    Args:
        model: what is trained; a loaded one may have a tokenizer.
        made_by: the tokenizer that made the data's ids, if it is known.

    Raises:
        UserError: a loaded model meets the ids of another tokenizer.
    """
    own: BPETokenizer | None = getattr(model, "tokenizer", None)
    if own is None or made_by is None:
        return own or made_by
    if own.sha256 != made_by.sha256:
        raise UserError(
            f"The data was made with another tokenizer than the model in {model.source}. Pass "
            "tokenizer=model.tokenizer to get_dataset, or name the other one with tokenizer= here."
        )
    return own


def document_ids(
    tokenizer: BPETokenizer | None, config: ModelConfig
) -> tuple[int | None, int | None, int | None]:
    """Ids in front of documents, at their ends, and for padding."""
    if tokenizer is not None:
        return tokenizer.first_id, tokenizer.eos_token_id, tokenizer.fill_id
    ends = config.eos_token_ids
    return config.bos_token_id, ends[0] if ends else None, config.pad_token_id
