"""The mistral layout: llama with a sliding window on all layers."""

from __future__ import annotations

from dataclasses import replace

from consyn_jax.model.pretrained.families.hf_config import Fields, HfConfig, Unsupported
from consyn_jax.model.pretrained.families.llama import LLAMA, PLAIN
from consyn_jax.model.pretrained.families.windows import (
    FULL,
    layer_types,
    sliding_window,
    windows,
)


def _read(hf: HfConfig) -> Fields:
    window = sliding_window(hf)
    kinds = layer_types(hf)
    if kinds is not None and (len(set(kinds)) > 1 or (window is not None) != (kinds[0] != FULL)):
        raise Unsupported(
            "layer_types, which transformers ignores for mistral. Set model_type to "
            "ministral, which supports layer_types, or remove layer_types"
        )
    num_layers = int(hf["num_hidden_layers"])
    return PLAIN | windows(window, [window is not None] * num_layers)


MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=_read,
    write=lambda config: {"sliding_window": config.sliding_window},
    defaults={"sliding_window": 4096},
)
