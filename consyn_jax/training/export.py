"""Models that a run leaves behind: directories that others load."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax

from consyn_jax.config import ModelConfig
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained import save_parameters
from consyn_jax.tokenization import BPETokenizer


def export_model(target: Path, config: ModelConfig, params: Params, tokenizer: BPETokenizer | None) -> None:
    """Write a model and its tokenizer to the directory `target`, whole or not at all; what was there before is replaced.

    All processes of a run call it together, and the first writes.
    """
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    save_parameters(fresh, config, params)
    if jax.process_index():
        return
    if tokenizer is not None:
        tokenizer.save(fresh)
    _replace(fresh, target, old)


def _replace(fresh: Path, target: Path, old: Path) -> None:
    """Put `fresh` in the place of `target`; a kill in between leaves one of them whole."""
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
