"""The keys of the rotary embedding in config.json, as transformers 4 and 5 write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from consyn_jax.model.pretrained.families.hf_config import Fields, HfConfig, Unsupported
from consyn_jax.model_config import ModelConfig, RopeScaling

KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
DEFAULT_THETA = 10_000.0
NAMES = {field.name for field in fields(RopeScaling)}
# Keys that repeat another key, or that are read separately from the scaling.
BESIDE = {"type", "rope_theta", "partial_rotary_factor", "finetuned"}
ORIGINAL = "original_max_position_embeddings"


def parameters(hf: HfConfig) -> Mapping[str, Any]:
    """Read the rotary parameters: the object rope_scaling or, if it is absent, rope_parameters.

    Raises:
        Unsupported: The value is not an object, or has parameters for each kind of layer.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise Unsupported(f"a rotary embedding {rope!r}, which is not an object")
    if any(isinstance(value, dict) for value in rope.values()):
        raise Unsupported("a rotary embedding for each kind of layer, which is not supported")
    return rope


def read_rotary(hf: HfConfig) -> Fields:
    """Read the base, the scaling and the rotated fraction of the rotary embedding."""
    rope = parameters(hf)
    theta = rope.get("rope_theta") or hf.get("rope_theta") or DEFAULT_THETA
    share = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    return {
        "rope_theta": float(theta),
        "rope_scaling": _scaling(hf, rope),
        "rotary_fraction": float(share),
    }


def _scaling(hf: HfConfig, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type")) or "default"
    unknown = sorted(rope.keys() - NAMES - BESIDE)
    if unknown:
        raise Unsupported(f"a rotary embedding with {', '.join(unknown)}, which is not supported")
    if kind == "default":
        return None
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in rope.items()
        if name in NAMES and value is not None
    }
    if kind in ("llama3", "yarn", "longrope"):
        original = hf.get(ORIGINAL) or values.get(ORIGINAL) or hf["max_position_embeddings"]
        values[ORIGINAL] = int(original)
    return RopeScaling(**values | {"rope_type": kind})


def write_rotary(config: ModelConfig) -> dict[str, Any]:
    """The rotary keys of config.json, in a form for transformers 4 and 5, vLLM and llama.cpp."""
    scaling = config.rope_scaling
    written = None
    if scaling is not None:
        unset = RopeScaling.__dataclass_fields__
        written = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(scaling).items()
            if value != unset[name].default
        }
    share = config.rotary_fraction
    partial = {} if share == 1 else {"partial_rotary_factor": share}
    return {"rope_theta": config.rope_theta, "rope_scaling": written, **partial}
