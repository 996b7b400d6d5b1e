"""Write model directories as safetensors or as Orbax arrays, and read them back."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath  # type: ignore[import-untyped]

from consyn_jax.inference.model_source import ModelSource, shapes_on
from consyn_jax.inference.run_models import ORBAX
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained.config_json import (
    to_hf_config,
    write_generation_config,
    write_json,
)
from consyn_jax.model.pretrained.inspection import read_checkpoint
from consyn_jax.model.pretrained.tensors import hf_tensors
from consyn_jax.model.pretrained.weights import load_parameters, save_parameters
from consyn_jax.model_config import ModelConfig
from consyn_jax.training.checkpointing.orbax_writes import WithoutAbandonedWork
from consyn_jax.training.checkpointing.saved_weights import read_arrays


def file_config(source: ModelSource, dtype: str | None) -> ModelConfig:
    """The configuration of the files to write, with `dtype` or the source's number types."""
    return source.config.saved_as(dtype)


def tensor_bytes(config: ModelConfig) -> int:
    """Total size of the tensors in a model's files, in bytes."""
    return sum(tensor.num_bytes for tensor in hf_tensors(config))


def write_hf(
    directory: Path, source: ModelSource, params: Params, dtype: str | None, shard_bytes: int
) -> None:
    """Write a model directory in the Hugging Face layout, including the source's tokenizer.

    Raises:
        UserError: A weight is too large for float16.
    """
    config = file_config(source, dtype)
    save_parameters(directory, config, params, shard_bytes)
    _write_tokenizer(directory, source)


def read_hf(directory: Path) -> tuple[ModelConfig, Params]:
    """Read the output of `write_hf` in the same way as `from_pretrained`.

    Raises:
        UserError: The directory is incomplete.
    """
    config = read_checkpoint(directory)
    return config, load_parameters(directory, config)


def write_orbax(directory: Path, source: ModelSource, params: Params, dtype: str | None) -> None:
    """Write config.json, the tokenizer, and the parameters as Orbax arrays in orbax/.

    The arrays have the names and shapes of `ConsynLMHeadModel.parameters`. There is no optimizer
    state.
    """
    import orbax.checkpoint as ocp

    config = file_config(source, dtype)
    directory.mkdir()
    write_json(directory / "config.json", to_hf_config(config))
    write_generation_config(directory, config)
    _write_tokenizer(directory, source)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.files.dtype)), params)
    # After a failed write, Orbax finishes the writes that it has abandoned; without this hook, each
    # of them prints a traceback.
    report = sys.unraisablehook
    sys.unraisablehook = WithoutAbandonedWork(report)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        place = epath.Path((directory / ORBAX).absolute())
        checkpointer.save(place, args=ocp.args.PyTreeSave(rounded))
    sys.unraisablehook = report


def read_orbax(directory: Path, config: ModelConfig) -> Params:
    """Read a directory written by `write_orbax`, in float32.

    Raises:
        UserError: The directory is incomplete.
    """
    return read_arrays(directory / ORBAX, shapes_on(config, None, jnp.float32))


def _write_tokenizer(directory: Path, source: ModelSource) -> None:
    if source.tokenizer is not None:
        source.tokenizer.save(directory, to_hf_config(source.config)["model_type"])
