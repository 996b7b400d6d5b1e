"""Read and write the keys of config.json about sliding windows."""

from __future__ import annotations

from typing import Any

from consyn_jax.model.pretrained.families.hf_config import Fields, HfConfig, Unsupported
from consyn_jax.model_config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def sliding_window(hf: HfConfig) -> int | None:
    """Length of the sliding window in tokens; None if there is none."""
    window = hf.get("sliding_window")
    return None if window is None else int(window)


def layer_types(hf: HfConfig) -> list[str] | None:
    """The kind of attention of each layer; None if config.json does not list them.

    Raises:
        Unsupported: A layer has neither full nor sliding attention.
    """
    kinds = hf.get("layer_types")
    if kinds is None:
        return None
    check_one_each("layer_types", kinds, int(hf["num_hidden_layers"]))
    other = sorted({str(kind) for kind in kinds} - {FULL, SLIDING})
    if other:
        raise Unsupported(f"layers of {', '.join(other)}, which is not supported")
    return kinds


def check_one_each(key: str, given: Any, num_layers: int) -> None:
    """Check that a list in config.json has one entry per layer.

    Raises:
        Unsupported: The number of entries differs.
    """
    if not isinstance(given, list) or len(given) != num_layers:
        found = f"{len(given)} {key}" if isinstance(given, list) else f"{key} that are not a list"
        raise Unsupported(f"{found}, but num_hidden_layers is {num_layers}. Correct one of the two")


def windows(window: int | None, has_window: list[bool]) -> Fields:
    """The window fields of `ModelConfig`.

    Args:
        window: Length of the window in tokens, if known.
        has_window: Whether each layer has a window.

    Raises:
        Unsupported: A layer has a window, but the length is missing.
    """
    if not any(has_window):
        return {"sliding_window": None, "window_layers": None}
    if window is None:
        raise Unsupported("sliding attention in layer_types, but no sliding_window")
    return {
        "sliding_window": window,
        "window_layers": None if all(has_window) else tuple(has_window),
    }


def read_typed(hf: HfConfig, window: int | None, implied: list[bool]) -> Fields:
    """Read the window fields of `ModelConfig` from layer_types.

    Args:
        implied: Whether each layer has a window; used only if the key layer_types is missing.
    """
    kinds = layer_types(hf)
    return windows(window, implied if kinds is None else [kind == SLIDING for kind in kinds])


def write_typed(config: ModelConfig) -> list[str]:
    """The value of layer_types in config.json."""
    return [FULL if window is None else SLIDING for window in config.windows]


def read_late(hf: HfConfig) -> Fields:
    """Read the window fields of a qwen model.

    If layer_types is missing, each layer with an index of at least max_window_layers has a window.
    """
    used = hf.get("use_sliding_window", False)
    first = int(hf["max_window_layers"])
    layers = int(hf["num_hidden_layers"])
    window = sliding_window(hf) if used else None
    return read_typed(hf, window, [window is not None and i >= first for i in range(layers)])


def write_late(config: ModelConfig) -> dict[str, Any]:
    """The window keys of a qwen model in config.json, with their values."""
    kinds = write_typed(config)
    return {
        "sliding_window": config.sliding_window,
        "use_sliding_window": SLIDING in kinds,
        "max_window_layers": kinds.index(SLIDING) if SLIDING in kinds else config.num_layers,
        "layer_types": kinds,
    }
