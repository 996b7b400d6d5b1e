"""The ministral layout: mistral with a sliding window on some layers."""

from __future__ import annotations

from dataclasses import replace

from consyn_jax.model.pretrained.families.hf_config import Fields, HfConfig
from consyn_jax.model.pretrained.families.llama import PLAIN
from consyn_jax.model.pretrained.families.mistral import MISTRAL
from consyn_jax.model.pretrained.families.windows import read_typed, sliding_window, write_typed


def _read(hf: HfConfig) -> Fields:
    window = sliding_window(hf)
    implied = [window is not None] * int(hf["num_hidden_layers"])
    return PLAIN | read_typed(hf, window, implied)


MINISTRAL = replace(
    MISTRAL,
    model_type="ministral",
    architecture="MinistralForCausalLM",
    read=_read,
    write=lambda config: {
        "sliding_window": config.sliding_window,
        "layer_types": write_typed(config),
    },
)
