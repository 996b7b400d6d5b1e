"""Models that a run leaves behind: directories that others load."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import jax
from safetensors import SafetensorError

from consyn_jax.config import ModelConfig, UserError
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained import save_parameters
from consyn_jax.tokenization import BPETokenizer

REFUSED = re.compile(r"I/O error: (.+) \(os error \d+\)")  # in what safetensors says


def export_model(target: Path, config: ModelConfig, params: Params, tokenizer: BPETokenizer | None) -> None:
    """Write a model and its tokenizer to the directory `target`, whole or not at all; what was there before is replaced.

    All processes of a run call it together, and the first writes.

    Raises:
        UserError: the disk refuses it. What was there before is whole.
    """
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    try:
        save_parameters(fresh, config, params)
        if jax.process_index():
            return
        if tokenizer is not None:
            tokenizer.save(fresh)
        _replace(fresh, target, old)
    except (OSError, SafetensorError) as error:
        said = REFUSED.search(str(error))
        if said is None and not isinstance(error, OSError):
            raise
        reason = said[1] if said else getattr(error, "strerror", None) or error
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"The model {target} could not be written: {reason}. With that mended, the same command goes on from the last checkpoint.") from error


def _replace(fresh: Path, target: Path, old: Path) -> None:
    """Put `fresh` in the place of `target`; a kill in between leaves one of them whole."""
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
