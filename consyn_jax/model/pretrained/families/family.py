"""`Family`: how a Hugging Face layout names the keys of config.json and the tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.model.pretrained.families.hf_config import Fields, HfConfig, Unsupported
from consyn_jax.model.pretrained.families.rotary import read_rotary, write_rotary
from consyn_jax.model_config import ModelConfig


@dataclass(frozen=True)
class Family:
    """A Hugging Face layout, an entry of `config_json.FAMILIES`.

    Attributes:
        model_type: The layout's value of model_type in config.json.
        architecture: Name of the model class in transformers.
        read: Function that reads a config.json and returns the fields of `ModelConfig` that only
            some families have. Raises `Unsupported`, or the errors of `Option.read`.
        write: Function that returns the keys and values of config.json for these fields.
        block: Name of each parameter of a block -> name of its tensor in the file. Several
            parameters may share a tensor, which holds them in the order of `block`.
        defaults: Values of keys that config.json may omit, as in transformers.
        renewed: Function that renames keys of older versions of transformers to the current names.
        rotates_in_part: Whether the layout supports rotating only a part of each head.
    """

    model_type: str
    architecture: str
    read: Callable[[HfConfig], Fields]
    write: Callable[[ModelConfig], dict[str, Any]]
    block: dict[str, str]
    defaults: dict[str, Any] = field(default_factory=dict)
    renewed: Callable[[HfConfig], HfConfig] = lambda hf: hf
    rotates_in_part: bool = False

    def complete(self, hf: HfConfig) -> HfConfig:
        """Return the content of a config.json with missing values filled in."""
        return self.defaults | dict(self.renewed(hf))

    def read_more(self, hf: HfConfig) -> Fields:
        """Read the fields that not all families have, and the rotary embedding.

        Args:
            hf: Content of a config.json, as `complete` returns it.

        Raises:
            Unsupported: This decoder or this layout lacks a feature.
            UserError: The rotary scaling has wrong values.
        """
        fields = read_rotary(hf) | self.read(hf)
        share = fields["rotary_fraction"]
        if share != 1 and not self.rotates_in_part:
            raise Unsupported(f"partial_rotary_factor {share}, which {self.model_type} lacks")
        return fields

    def holds(self, config: ModelConfig) -> bool:
        """Whether `config` stays the same if it is written in this layout and read again."""
        sizes = {
            "num_hidden_layers": config.num_layers,
            "max_position_embeddings": config.context,
        }
        try:
            written = sizes | write_rotary(config) | self.write(config)
            fields = self.read_more(self.complete(written))
        except (Unsupported, UserError):
            return False
        return all(getattr(config, name) == value for name, value in fields.items())
