"""The phi3 layout, for phi-3 and phi-4: llama with fused matrices and, optionally, partial RoPE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from consyn_jax.model.pretrained.families.hf_config import Fields, HfConfig, Unsupported
from consyn_jax.model.pretrained.families.llama import LLAMA, PLAIN
from consyn_jax.model.pretrained.families.rotary import ORIGINAL, parameters
from consyn_jax.model.pretrained.families.windows import sliding_window, windows
from consyn_jax.model_config import ModelConfig

OLD_NAMES = {"su": "longrope", "yarn": "longrope"}  # of the first phi3 models


def _read(hf: HfConfig) -> Fields:
    kind = parameters(hf).get("rope_type") or "default"
    if kind not in ("default", "longrope"):
        raise Unsupported(f"rotary scaling {kind}, which phi3 lacks")
    window = sliding_window(hf)
    return PLAIN | windows(window, [window is not None] * int(hf["num_hidden_layers"]))


def _write(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    original = config.context if scaling is None else scaling.original_max_position_embeddings
    return {"sliding_window": config.sliding_window, ORIGINAL: original}


def _renewed(hf: HfConfig) -> HfConfig:
    rope = parameters(hf)
    if not rope:
        return hf
    kind = rope.get("rope_type", rope.get("type"))
    return {**hf, "rope_scaling": {**rope, "rope_type": OLD_NAMES.get(str(kind), kind)}}


PHI3 = replace(
    LLAMA,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=_read,
    write=_write,
    block={name: tensor for name, tensor in LLAMA.block.items() if not name.endswith("_bias")}
    | dict.fromkeys("qkv", "self_attn.qkv_proj.weight")
    | dict.fromkeys(("gate", "up"), "mlp.gate_up_proj.weight"),
    defaults={"rms_norm_eps": 1e-5, ORIGINAL: 4096},
    renewed=_renewed,
    rotates_in_part=True,
)
