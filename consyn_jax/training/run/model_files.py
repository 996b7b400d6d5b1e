"""Formats in which a run writes best/ and final/: a full model, or only an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained.peft_files import (
    ADAPTER_CONFIG,
    Base,
    load_adapter,
    save_adapter,
)
from consyn_jax.model.pretrained.weights import load_parameters, save_parameters
from consyn_jax.model_config import LoraOptions, ModelConfig

MODEL_CONFIGS = ("config.json", ADAPTER_CONFIG)  # marks a directory as a model


def holds_model(directory: Path) -> bool:
    """Whether a directory contains a model or an adapter."""
    return any((directory / name).is_file() for name in MODEL_CONFIGS)


@dataclass(frozen=True)
class WholeModel:
    """Saves and loads all parameters, in the layout of Hugging Face."""

    def save(self, directory: Path, config: ModelConfig, params: Params) -> None:
        """Write config.json and the weights."""
        save_parameters(directory, config, params)

    def load(self, directory: Path, config: ModelConfig, mesh: Mesh | None) -> Params:
        """Read the weights."""
        return load_parameters(directory, config, mesh)


@dataclass(frozen=True)
class AdapterOnly:
    """Saves and loads only the adapter, in the layout of PEFT.

    Attributes:
        base: The base model, as adapter_config.json names it.
        dtype: Dtype of the adapter in the file; the base may have another dtype.
    """

    options: LoraOptions
    base: Base
    dtype: str = "float32"

    def save(self, directory: Path, config: ModelConfig, params: Params) -> None:
        """Write adapter_config.json and the adapter's weights."""
        save_adapter(directory, config.saved_as(self.dtype), params, self.options, self.base)

    def load(self, directory: Path, config: ModelConfig, mesh: Mesh | None) -> Params:
        """Read the adapter's weights."""
        return load_adapter(directory, config, self.options, mesh)


ModelFiles = WholeModel | AdapterOnly
