"""The description of one Hugging Face layout: its config.json and its tensors."""

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
    """One layout, an entry of `config_json.FAMILIES`.

    Attributes:
        model_type: Its name in config.json.
        architecture: Its class in transformers.
        read: Reads from a config.json the fields of `ModelConfig` that not all families have. It
            raises `Unsupported`, or the errors of `Option.read`.
        write: Returns the keys of config.json for these fields.
        block: Parameter of a block -> tensor. A tensor may hold several parameters, concatenated in
            this order.
        defaults: Values of keys that a config.json may lack, as in its class in transformers.
        renewed: Replaces old spellings of this layout in a config.json.
        rotates_in_part: Whether the layout can rotate only a part of each head.
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
        """A config.json with missing values filled in."""
        return self.defaults | dict(self.renewed(hf))

    def read_more(self, hf: HfConfig) -> Fields:
        """Read the fields other than sizes and tokens from a complete config.json.

        Raises:
            Unsupported: A feature that this decoder or this layout lacks.
            UserError: A rotary scaling with wrong values.
        """
        fields = read_rotary(hf) | self.read(hf)
        share = fields["rotary_fraction"]
        if share != 1 and not self.rotates_in_part:
            raise Unsupported(f"partial_rotary_factor {share}, which {self.model_type} lacks")
        return fields

    def holds(self, config: ModelConfig) -> bool:
        """Whether this layout can describe `config`: it must read back what it writes."""
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
