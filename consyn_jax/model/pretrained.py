"""Weights in and out in the Hugging Face layouts: llama, mistral (llama with a sliding window) and qwen3 (with q/k norm).

Files are read and written tensor by tensor, only as safetensors and JSON: nothing is unpickled or executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from consyn_jax.config import PRESETS, ModelConfig, UserError, nearest
from consyn_jax.model.parameters import Layout, Params, layout

MAX_SHARD_BYTES = 5 * 10**9  # where Hugging Face splits, too
INDEX = "model.safetensors.index.json"

LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
TOP_NAMES = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class Tensor(NamedTuple):
    """One tensor of the Hugging Face layout and the parameter it is (a layer of)."""

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def hf_tensors(config: ModelConfig, shapes: Params) -> Iterator[Tensor]:
    """Every tensor that a checkpoint of this architecture holds, in file order."""
    for key, name in TOP_NAMES.items():
        if key in shapes:
            shape = shapes[key].shape
            yield Tensor(name, (key,), None, (config.vocab_size, *shape[1:]) if key in ("embedding", "output") else shape)
    for layer in range(config.num_layers):
        for key, leaf in shapes["layers"].items():
            yield Tensor(f"model.layers.{layer}.{LAYER_NAMES[key]}.weight", ("layers", key), layer, _hf_shape(key, leaf.shape[1:]))


def _hf_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 1:
        return shape
    inputs = int(np.prod(shape[:-1])) if key == "o" else shape[0]
    return (int(np.prod(shape)) // inputs, inputs)  # torch keeps [out, in]


# ---------------------------------------------------------------------------------------------------------------- config.json


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` for transformers, vLLM and llama.cpp."""
    kind = "qwen3" if config.qk_norm else "mistral" if config.sliding_window else "llama"
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if kind == "llama":
        hf["mlp_bias"] = False
    else:
        hf["sliding_window"] = config.sliding_window
    if kind == "qwen3":
        hf |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return hf


def from_hf_config(hf: dict[str, Any], where: str) -> ModelConfig:
    """The architecture that a `config.json` describes.

    Raises:
        UserError: a family or a feature that this decoder does not have, or a value that is missing or no number.
    """
    kind = hf.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{where} has model_type {kind!r}, which is not supported. Supported: {', '.join(ARCHITECTURES)}.")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{where} scales its rotary embedding ({rope!r}), which is not supported.")
    unsupported = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for name, only in unsupported.items():
        if hf.get(name, only) != only:
            raise UserError(f"{where} has {name} {hf[name]!r}, and only {only!r} is supported.")
    window = hf.get("sliding_window") if kind == "mistral" or hf.get("use_sliding_window") else None
    if kind == "qwen3" and window is not None and hf.get("max_window_layers", 0):
        raise UserError(f"{where} has a sliding window on some layers only, which is not supported.")
    try:
        heads, hidden = int(hf["num_attention_heads"]), int(hf["hidden_size"])
        return ModelConfig(
            vocab_size=int(hf["vocab_size"]),
            hidden_dim=hidden,
            num_layers=int(hf["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(hf.get("num_key_value_heads") or heads),
            head_dim=int(hf.get("head_dim") or hidden // heads),
            mlp_dim=int(hf["intermediate_size"]),
            context=int(hf["max_position_embeddings"]),
            rope_theta=float(hf.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            qk_norm=kind == "qwen3",
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            sliding_window=None if window is None else int(window),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_id=_first(hf.get("eos_token_id")),
            pad_token_id=hf.get("pad_token_id"),
        )
    except KeyError as missing:
        raise UserError(f"{where} has no {missing.args[0]!r}.") from None
    except (TypeError, ValueError, ZeroDivisionError) as wrong:
        raise UserError(f"{where} has a value that cannot be: {wrong}.") from None


def _first(ids: Any) -> int | None:
    """Llama 3 and others list several ends of text; the first is the one they were trained with."""
    return (ids[0] if ids else None) if isinstance(ids, list) else ids


def read_config(path: Path) -> ModelConfig:
    """The architecture in a model directory or a config.json.

    Raises:
        UserError: no such file, or not a model's configuration.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} is not a model: it has no config.json. Give the best/ or final/ of a run, or a Hugging Face llama or qwen3 directory.")
    return from_hf_config(_read_json(file), str(file))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as wrong:
        raise UserError(f"{file} is not JSON: {wrong}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object.")
    return content


# -------------------------------------------------------------------------------------------------------------------- weights


def find_model(name: str) -> Path:
    """The directory of a model: itself, or the snapshot of a hub id, downloaded when it is not cached.

    Raises:
        UserError: neither a directory nor a model that the hub gives.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        raise UserError(
            f"{name} is not a model: no such directory{nearest(name, PRESETS)} Give a directory, a hub id as owner/name, or one of {', '.join(PRESETS)}."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} is neither a directory here nor a model that the hub gives ({type(error).__name__}). Check the name and the network."
        ) from error


def load_parameters(directory: Path, config: ModelConfig, mesh: Mesh | None = None) -> Params:
    """Read a checkpoint into parameters, float32, each device only its part; memory on the host stays at a few tensors.

    Raises:
        UserError: no safetensors, a damaged file, or tensors that do not fit the configuration.
    """
    form = layout(config)
    open_tensor = _open_checkpoint(directory)
    by_path: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in hf_tensors(config, form.shapes):
        by_path.setdefault(tensor.path, []).append(tensor)
    shardings = form.shardings(mesh) if mesh is not None else None

    def load(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        keys = tuple(k.key for k in path)
        read = _reader(by_path[keys], leaf.shape, open_tensor, directory)
        if shardings is None:
            return jax.numpy.asarray(read((slice(None),) * len(leaf.shape)))
        where = shardings[keys[0]] if len(keys) == 1 else shardings[keys[0]][keys[1]]
        return jax.make_array_from_callback(leaf.shape, where, read)

    return jax.tree_util.tree_map_with_path(load, form.shapes)


def check_checkpoint(directory: Path) -> None:
    """Read one small tensor, so that a directory without weights, or with damaged ones, is known before anything slow.

    Raises:
        UserError: as `load_parameters`.
    """
    _open_checkpoint(directory)(TOP_NAMES["norm"])


def _reader(tensors: list[Tensor], shape: tuple[int, ...], open_tensor: Callable[[str], np.ndarray], where: Path) -> Callable[[Any], np.ndarray]:
    """A function from an index into the parameter to its values."""

    def one(tensor: Tensor) -> np.ndarray:
        value = open_tensor(tensor.name)
        if value.shape != tensor.shape:
            raise UserError(f"{where}: {tensor.name} has shape {value.shape}, and config.json asks for {tensor.shape}.")
        value = value.astype(np.float32)
        if tensor.layer is None:  # [V, D] as it is, padding rows zero
            return np.pad(value, [(0, shape[0] - value.shape[0])] + [(0, 0)] * (value.ndim - 1))
        return value.T.reshape(shape[1:])

    def read(index: Any) -> np.ndarray:
        if tensors[0].layer is None:
            return one(tensors[0])[index]
        return np.stack([one(t)[index[1:]] for t in tensors[index[0]]])

    return read


def _open_checkpoint(directory: Path) -> Callable[[str], np.ndarray]:
    """A function that reads one tensor by name from model.safetensors or the shards that its index lists."""
    from safetensors import SafetensorError, safe_open

    index_file, single = directory / INDEX, directory / "model.safetensors"
    if index_file.is_file():
        where = _read_json(index_file).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) and Path(f).name == f for f in where.values()):
            raise UserError(f"{index_file} has no weight_map of plain file names.")
    elif single.is_file():
        where = None
    else:
        pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt*"))
        raise UserError(
            f"{directory} has no model.safetensors" + (f", only {pickles[0]}, a pickle, which is never opened. Convert it to safetensors." if pickles else ".")
        )

    def read(name: str) -> np.ndarray:
        file = single if where is None else directory / where.get(name, "")
        try:
            with safe_open(file, framework="flax") as handle:  # flax: numpy has no bfloat16
                return np.asarray(handle.get_tensor(name))
        except (SafetensorError, OSError) as wrong:
            raise UserError(f"{file} does not give {name}: {wrong}. The file is damaged, or not of the model that config.json describes.") from None

    return read


def save_parameters(directory: Path, config: ModelConfig, params: Params) -> None:
    """Write config.json, generation_config.json and model.safetensors (shards of 5 GB and an index when larger), float32.

    Weights that an earlier model left in the directory go. All processes of a run call it; process 0 writes.
    """
    from safetensors.numpy import save_file

    form = layout(config)
    shards = _assign_shards(list(hf_tensors(config, form.shapes)))
    writes = jax.process_index() == 0
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        _delete_weights(directory)
        special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        _write_json(directory / "config.json", to_hf_config(config))
        _write_json(directory / "generation_config.json", {name: token for name, token in special.items() if token is not None})
    for file, tensors in shards.items():
        values = {t.name: _to_host(params, form, t) for t in tensors}
        if writes:
            save_file(values, directory / file, metadata={"format": "pt"})
    if writes and len(shards) > 1:
        total = sum(4 * int(np.prod(t.shape)) for tensors in shards.values() for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": {t.name: file for file, tensors in shards.items() for t in tensors}}
        _write_json(directory / INDEX, index)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _delete_weights(directory: Path) -> None:
    """An index left behind would be read before the new model.safetensors."""
    (directory / INDEX).unlink(missing_ok=True)
    for file in directory.iterdir():
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", file.name):
            file.unlink()


def _assign_shards(tensors: list[Tensor]) -> dict[str, list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        num_bytes = 4 * int(np.prod(tensor.shape))
        if groups[-1] and size + num_bytes > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _to_host(params: Params, form: Layout, tensor: Tensor) -> np.ndarray:
    from jax.experimental import multihost_utils

    value: Any = params
    for key in tensor.path:
        value = value[key]
    part = value if tensor.layer is None else value[tensor.layer]
    array = np.asarray(multihost_utils.process_allgather(part, tiled=True) if jax.process_count() > 1 else part)
    if tensor.layer is None:
        return np.ascontiguousarray(array[: tensor.shape[0]])
    return np.ascontiguousarray(array.reshape(tensor.shape[::-1]).T if array.ndim > 1 else array)
