"""Choose the sequence length and batch size of a fine-tune; sources in docs/finetuning.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from consyn_jax.config import RunConfig
from consyn_jax.flags import with_flags
from consyn_jax.integers import round_up

if TYPE_CHECKING:
    from consyn_jax.data.store.store_split import StoreSplit

COVERED = 0.99  # share of the rows that fit in a sequence
LENGTH_STEP = 128
LONGEST_TEXT = 2048  # longest sequence for documents without prompts, which may be split
TOKENS_PER_STEP = 65_536
TOKENS_PER_MICRO_BATCH = 16_384
STEPS_PER_EPOCH = 32  # a small data set gets smaller batches instead of fewer steps

Settings = tuple[RunConfig, dict[str, str]]
"""A configuration, and the origins of its values by flag name."""


def with_length(
    settings: Settings, splits: Sequence[StoreSplit], context: int
) -> tuple[Settings, str]:
    """Choose the sequence length from the rows, unless the user gave it, and explain the choice.

    Args:
        splits: the training documents.
        context: context length of the model, in tokens.
    """
    config, _ = settings
    if config.data.max_tokens is not None:
        return settings, ""
    lengths = _lengths(splits, config.trains_on_pairs)
    need = int(lengths[int(COVERED * (len(lengths) - 1))]) if len(lengths) else context
    most = context
    if all(split.num_targets == split.num_tokens for split in splits):
        most = min(context, LONGEST_TEXT)
    chosen = min(round_up(max(need, 1), LENGTH_STEP), most)
    why = f"{COVERED:.0%} of the rows have at most {need:,} tokens"
    return _set(settings, {"max_tokens": chosen}, "the rows"), f"{chosen:,} tokens: {why}"


def with_batch(settings: Settings, num_sequences: int, num_devices: int) -> Settings:
    """Choose the batch size and accumulation of a fine-tune, unless the user set one of them.

    Args:
        num_sequences: number of sequences or preference pairs in an epoch.
    """
    config, origins = settings
    chosen_by_user = {origins["batch_size"], origins["gradient_accumulation_steps"]} != {"default"}
    if config.model.checkpoint is None or chosen_by_user:
        return settings
    length = config.row_length
    wanted = max(min(TOKENS_PER_STEP // length, num_sequences // STEPS_PER_EPOCH), 1)
    batch = round_up(max(min(wanted, TOKENS_PER_MICRO_BATCH // length), 1), num_devices)
    accumulation = max(round(wanted / batch), 1)
    changes = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
    return _set(settings, changes, "fine-tuning")


def shortest(settings: Settings, context: int | None) -> Settings:
    """Set the smallest sequence length and batch size that may later be chosen from the rows.

    The result is used in checks that run before the rows are read. The user's settings are kept.

    Args:
        context: context length of the model, in tokens; None for a preset.
    """
    if context is None or settings[0].data.max_tokens is not None:
        return settings
    settings = _set(settings, {"max_tokens": min(LENGTH_STEP, context)}, "the rows")
    return with_batch(settings, num_sequences=1, num_devices=1)


def _set(settings: Settings, changes: dict[str, Any], origin: str) -> Settings:
    config, origins = settings
    return with_flags(config, changes), {**origins, **dict.fromkeys(changes, origin)}


def _lengths(splits: Sequence[StoreSplit], are_pairs: bool) -> Any:
    """Sorted lengths, in tokens, of all documents, or of the longer sequence of each pair."""
    import numpy as np

    from consyn_jax.data.pairs import longer_sequences

    found = [np.zeros(0, np.int64)]
    for split in splits:
        if are_pairs:
            found.append(longer_sequences(split))
            continue
        starts = np.concatenate([np.zeros(0, np.int64), *split.document_starts()])
        found.append(np.diff(starts, append=split.num_tokens))
    return np.sort(np.concatenate(found))
