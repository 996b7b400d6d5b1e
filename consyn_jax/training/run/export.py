"""Export models of a run to directories that other programs can load."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from safetensors import SafetensorError

from consyn_jax.errors import CONTINUES, UserError
from consyn_jax.files import aside, replace_directory
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained.config_json import to_hf_config
from consyn_jax.model.pretrained.weights import save_parameters
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.run.model_manifest import seal

IO_ERROR = re.compile(r"I/O error: (.+) \(os error \d+\)")  # in messages of safetensors


def export_model(
    target: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: BPETokenizer | None,
    before_name: Callable[[], None] = lambda: None,
    provenance: Callable[[Mapping[str, str]], str] | None = None,
    save: Callable[[Path, ModelConfig, Params], None] = save_parameters,
) -> None:
    """Write a model and its tokenizer atomically to the directory `target`.

    The files are written to a temporary directory with a manifest, and flushed to the disk. Then
    the directory is renamed to `target`, and replaces an older model. All processes of a run must
    call this function; process 0 writes.

    Args:
        before_name: Function that process 0 calls before the rename.
        provenance: Argument of `seal`.
        save: Function that writes the parameters to a directory.

    Raises:
        UserError: The files cannot be written. An older model in `target` stays intact.
    """
    fresh = aside(target)
    try:
        save(fresh, config, params)
        if jax.process_index():
            return
        if tokenizer is not None:
            tokenizer.save(fresh, to_hf_config(config)["model_type"])
        seal(fresh, provenance)
        before_name()
        replace_directory(fresh, target)
    except (OSError, SafetensorError) as error:
        match = IO_ERROR.search(str(error))
        if match is None and not isinstance(error, OSError):
            raise
        reason = match[1] if match else getattr(error, "strerror", None) or error
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(
            f"The model {target} could not be written: {reason}. Once that is fixed, the same "
            f"command {CONTINUES}."
        ) from error
