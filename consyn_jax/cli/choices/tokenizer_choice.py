"""Choose the tokenizer of a run from `--tokenizer`, `--checkpoint` and the data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from consyn_jax.cli.choices.model_choice import ModelChoice
from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.model_config import ModelConfig

if TYPE_CHECKING:
    from consyn_jax.tokenization import BPETokenizer

ANOTHER = (
    "Set --tokenizer to the tokenizer that the checkpoint was trained with, or to a smaller "
    "one such as bytes."
)
ENLARGE = (
    "Remove the tokens that were added to the checkpoint's tokenizer, or enlarge the "
    "checkpoint's embedding with resize_token_embeddings of transformers."
)
PREPARE = "Give --data as text, or prepare it with the tokenizer of the checkpoint."
Note = tuple[str, str]  # a line of the header: its name and its text


def choose_tokenizer(
    config: RunConfig, choice: ModelChoice, is_store: bool
) -> BPETokenizer | str | None:
    """Choose the tokenizer of a run.

    A checkpoint is trained with its own tokenizer. If it has none, the user must name a tokenizer,
    unless `--data` is a token store.

    Args:
        is_store: whether `--data` is a token store.

    Returns:
        A tokenizer, or "train:SIZE" if a tokenizer is to be trained. None means the token store's
        tokenizer, or the bundled tokenizer if `--data` is not a token store.

    Raises:
        UserError: the tokenizer does not fit the checkpoint, or the checkpoint has none.
    """
    from consyn_jax.tokenization import load_tokenizer

    spec, checkpoint = config.data.tokenizer, config.model.checkpoint
    own = own_tokenizer(choice)
    if spec is None:
        if own is None and choice.weights is not None and not is_store:
            found = sorted(file.name for file in choice.weights.iterdir())
            raise UserError(
                f"--checkpoint {checkpoint} has no tokenizer (its files: "
                f"{', '.join(found[:8])}). Give the tokenizer that the model was trained with: "
                "--tokenizer and a directory or hub id."
            )
        return own
    misfit = f"--tokenizer {spec} does not fit --checkpoint {checkpoint}, which"
    if spec.startswith("train:"):
        if own is not None:
            raise UserError(f"{misfit} has a tokenizer. Leave --tokenizer out to use it.")
        return spec
    chosen = load_tokenizer(spec)
    if own is None:
        _check_size(chosen, choice.stored, config, ANOTHER)
        return chosen
    if chosen.sha256 != own.sha256:
        raise UserError(
            f"{misfit} was trained with another tokenizer. Leave --tokenizer out to use the "
            "checkpoint's tokenizer."
        )
    return own


def check_own_tokenizer(config: RunConfig, choice: ModelChoice) -> None:
    """Check the tokenizer in the checkpoint's directory, before any data is read.

    Raises:
        UserError: it is damaged, of an unknown kind, or larger than the embedding.
    """
    own = own_tokenizer(choice)
    if own is not None:
        _check_size(own, choice.stored, config, ENLARGE)


def own_tokenizer(choice: ModelChoice) -> BPETokenizer | None:
    """The tokenizer in the checkpoint's directory; None if there is none."""
    from consyn_jax import tokenization

    return None if choice.weights is None else tokenization.own_tokenizer(choice.weights)


def with_tokens(shape: ModelConfig, choice: ModelChoice, tokenizer: BPETokenizer) -> ModelConfig:
    """Set the BOS, EOS and padding ids of an architecture.

    The ids and `generation_config` of a checkpoint are kept if `tokenizer` is the checkpoint's
    tokenizer, or if the EOS token of `tokenizer` is among the EOS ids of the checkpoint.
    """
    stored = choice.stored
    if stored is not None and (_is_own(tokenizer, choice) or _knows_end(stored, tokenizer)):
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "generation_config")
        kept: dict[str, Any] = {name: getattr(stored, name) for name in names}
        return dataclasses.replace(shape, **kept)
    return dataclasses.replace(
        shape,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_config=None,
    )


def tokenizer_notes(choice: ModelChoice, tokenizer: BPETokenizer) -> list[Note]:
    """Header lines about the tokenizer.

    They name the tokens that begin and end a document. They also warn if the tokenizer drops some
    text, or if the checkpoint ends texts with another token.
    """
    names = {role: repr(name) for role, name in tokenizer.special_tokens.items() if name}
    begin = names["bos_token"] if tokenizer.first_id is not None else "no BOS"
    notes = [
        (
            "tokenizer",
            f"{tokenizer.vocab_size:,} tokens; documents begin with {begin} and end with "
            f"{names['eos_token']}",
        )
    ]
    if tokenizer.drops_text:
        lost = (
            "the tokenizer has no tokens for some bytes and no unknown token, so text with "
            "these bytes is left out"
        )
        notes.append(("left out text", lost))
    stored = choice.stored
    if stored is not None and stored.eos_token_ids and not _knows_end(stored, tokenizer):
        kept = "are not changed" if _is_own(tokenizer, choice) else "get the tokenizer's id"
        notes.append(
            (
                "end of text",
                f"the checkpoint ends texts with {listed_ids(stored.eos_token_ids)}, not with "
                f"{tokenizer.eos_token_id}; its config.json and generation_config.json {kept}",
            )
        )
    return notes


def listed_ids(ids: tuple[int, ...]) -> str:
    """Join token ids with "or", for a sentence.

    >>> listed_ids((5, 7))
    '5 or 7'
    """
    return " or ".join(map(str, ids))


def _is_own(tokenizer: BPETokenizer, choice: ModelChoice) -> bool:
    own = own_tokenizer(choice)
    return own is not None and own.sha256 == tokenizer.sha256


def _knows_end(stored: ModelConfig, tokenizer: BPETokenizer) -> bool:
    return tokenizer.eos_token_id in stored.eos_token_ids


def _check_size(
    tokenizer: BPETokenizer, stored: ModelConfig | None, config: RunConfig, advice: str
) -> None:
    if stored is not None and tokenizer.vocab_size > stored.vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, but --checkpoint "
            f"{config.model.checkpoint} has a vocabulary of {stored.vocab_size:,}. {advice}"
        )


def check_store(tokenizer: BPETokenizer, choice: ModelChoice, config: RunConfig) -> None:
    """Check the tokenizer of a token store, after the store is opened.

    Raises:
        UserError: the tokenizer has more tokens than the checkpoint's vocabulary.
    """
    _check_size(tokenizer, choice.stored, config, PREPARE)
