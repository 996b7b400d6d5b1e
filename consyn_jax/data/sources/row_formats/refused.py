"""Refuse rows that fine-tuning cannot use as they are, and suggest how to use part of them."""

from __future__ import annotations

from consyn_jax.data.sources.row_formats.fields import BadRow, missing, shown


def check_preference(row: dict) -> None:
    """Refuse preference data: pairs of a better and a worse answer, and labelled answers.

    Raises:
        BadRow: the row is preference data; the message names flags to train on the better answer.
    """
    if "chosen" in row and "rejected" in row:
        raise BadRow(
            "is a preference pair (chosen, rejected), which needs --objective dpo (consyn-train) "
            "or --row_format preference (consyn-prepare).",
            f"To train on the chosen answers alone, give {_chosen(row)}.",
        )
    if {"prompt", "completion", "label"} <= row.keys() and isinstance(row["label"], bool):
        raise BadRow(
            "is a labelled answer (prompt, completion, label), and training would also use the "
            "bad answers.",
            "Keep only rows whose label is true, and remove the field label.",
        )
    if {"prompt", "completions", "labels"} <= row.keys():
        raise BadRow(
            "has labels for the steps of an answer (prompt, completions, labels), which cannot "
            "be trained on.",
            "Write the good answers as prompt and completion.",
        )


def _chosen(row: dict) -> str:
    """Return the flags that train on the chosen answers."""
    chosen = row["chosen"]
    if isinstance(chosen, list) and isinstance(row.get("prompt"), list):
        return "--prompt_key prompt --completion_key chosen"
    if isinstance(chosen, list):
        return "--messages_key chosen"
    prompt = next((name for name in ("prompt", "question", "instruction") if name in row), None)
    if prompt is None:
        return "--text_key chosen"
    return f"--prompt_key {prompt} --completion_key chosen"


def unknown(row: dict, text_key: str) -> BadRow:
    """Build the error about a row of unknown format, with flags that would read the row."""
    if "input_ids" in row:
        return BadRow(
            f"holds token ids, but only text is read from rows; its keys are {shown(row)}.",
            "Give the text, write the ids to a .npy or .bin file, or train on them from Python.",
        )
    return missing(row, text_key)
