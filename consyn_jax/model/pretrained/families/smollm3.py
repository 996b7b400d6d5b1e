"""The smollm3 layout: llama, but each layer may lack rotary embedding or have a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from consyn_jax.model.pretrained.families.hf_config import Fields, HfConfig
from consyn_jax.model.pretrained.families.llama import LLAMA, PLAIN, read_biases, write_biases
from consyn_jax.model.pretrained.families.windows import (
    SLIDING,
    check_one_each,
    read_typed,
    sliding_window,
    write_typed,
)
from consyn_jax.model_config import ModelConfig


def _rotates(hf: HfConfig) -> list[bool]:
    """Whether each layer uses RoPE; despite its name, no_rope_layers has a 1 for such layers."""
    num_layers = int(hf["num_hidden_layers"])
    given = hf.get("no_rope_layers")
    if given is None:
        interval = int(hf["no_rope_layer_interval"])
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    longer = isinstance(given, list) and len(given) > num_layers  # transformers ignores the rest
    given = given[:num_layers] if longer else given
    check_one_each("no_rope_layers", given, num_layers)
    return [bool(layer) for layer in given]


def _read(hf: HfConfig) -> Fields:
    rotates, window = _rotates(hf), sliding_window(hf)
    used = bool(hf.get("use_sliding_window")) and window is not None
    found = read_typed(hf, window, [used and not layer for layer in rotates])
    rotary = {"rotary_layers": None if all(rotates) else tuple(rotates)}
    return PLAIN | read_biases(hf) | found | rotary


def _write(config: ModelConfig) -> dict[str, Any]:
    kinds = write_typed(config)
    rotates = config.rotary_layers or (True,) * config.num_layers
    return {
        **write_biases(config),
        "no_rope_layers": [int(layer) for layer in rotates],
        "sliding_window": config.sliding_window,
        "use_sliding_window": SLIDING in kinds,
        "layer_types": kinds,
    }


SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read=_read,
    write=_write,
    defaults={"no_rope_layer_interval": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
)
