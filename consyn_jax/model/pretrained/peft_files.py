"""Adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

The adapter of a tensor is two matrices, `a` [rank, inputs] and `b` [outputs, rank].

Some layouts, such as phi3, fuse several parameters into one tensor. In this package each of the
parameters has its own adapter, but the files have one adapter for the fused tensor. Its rank is the
sum of the ranks of the parameters' adapters. Its `b` is block-diagonal: it is zero where the row
belongs to one parameter and the column to another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from consyn_jax.errors import UserError
from consyn_jax.files import refuse_strays
from consyn_jax.model.lora import adapter_layout
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained.config_json import read_json, write_json
from consyn_jax.model.pretrained.safetensors_files import Read, open_file
from consyn_jax.model.pretrained.tensors import Part, Tensor, hf_tensors, on_host, rounded
from consyn_jax.model_config import LoraOptions, ModelConfig

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"  # of a tensor's name
BASE_HASH = "base_sha256"  # key in the metadata of the weights: hash of the base model's weights
# Settings of PEFT that change the computation of an adapter, with the supported values.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    # Unsupported values (pissa, olora, corda, loftq, lora_ga) also change the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "kasa_config": (None,),
    "velora_config": (None,),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "monteclora_config": (None,),
}


class Base(NamedTuple):
    """The model to which an adapter belongs.

    Attributes:
        name: Directory or hub id of the model; None if unknown.
        sha256: Hash of the model's weights (`safetensors_files.weights_hash`); None if unknown.
    """

    name: str | None
    sha256: str | None = None


class Change(NamedTuple):
    """The adapter of one tensor, which adds `scale * b @ a` to the tensor.

    Attributes:
        a: Matrix [rank, inputs].
        b: Matrix [outputs, rank].
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter in the layout of the files.

    Attributes:
        base: The model to which the adapter belongs.
        changes: The adapter of each adapted tensor, by the tensor's name in the base.
    """

    base: Base
    changes: dict[str, Change]

    def added_to(self, read: Read) -> Read:
        """Return a function that reads tensors of the base like `read`, and adds the adapter."""

        def merged(name: str, *index: slice) -> np.ndarray:
            values, change = read(name, *index), self.changes.get(name)
            if change is None:
                return values
            rows, columns = (*index, slice(None), slice(None))[:2]
            added = np.float32(change.scale) * (change.b[rows] @ change.a[:, columns])
            return values.astype(np.float32) + added

        return merged


def is_adapter(directory: Path) -> bool:
    """Whether a directory contains an adapter rather than a full model."""
    return (directory / ADAPTER_CONFIG).is_file()


# ---------------------------------------------------------------------------------------- reading


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter that PEFT or this package has written.

    Raises:
        UserError: The adapter is damaged, is not a plain LoRA, or has links to files outside its
            directory.
    """
    refuse_strays(directory, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    config = read_json(directory / ADAPTER_CONFIG)
    for key, allowed in PLAIN.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"{directory} is an adapter with {key} {config[key]!r}, which is not supported. "
                "Merge the adapter with PEFT, and use the merged model."
            )
    tensors, metadata = _read_tensors(directory / ADAPTER_WEIGHTS)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str | None) or not isinstance(revision, str | None):
        raise UserError(
            f"{directory / ADAPTER_CONFIG} has a base_model_name_or_path or a revision that is "
            "not text. Replace the file with a good copy."
        )
    name = f"{base}@{revision}" if base and revision else base
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, values in tensors.items():
        part = next((end for end in (A, B) if key.startswith(PREFIX) and key.endswith(end)), None)
        if part is None:
            raise UserError(
                f"{directory / ADAPTER_WEIGHTS} has {key}, which is not part of a plain LoRA. "
                "Merge the adapter with PEFT, and use the merged model."
            )
        module = key.removeprefix(PREFIX).removesuffix(part)
        pairs.setdefault(module, {})[part] = values.astype(np.float32)
    changes = {}
    for module, pair in pairs.items():
        if not _is_whole(pair):
            raise UserError(
                f"{directory / ADAPTER_WEIGHTS} lacks lora_A or lora_B of {module}, or their "
                "shapes do not fit each other. Replace the file with a good copy."
            )
        scale = _scale(directory, config, module, pair[A].shape[0])
        changes[f"{module}.weight"] = Change(pair[A], pair[B], scale)
    return Adapter(Base(name, metadata.get(BASE_HASH)), changes)


def _is_whole(pair: Mapping[str, np.ndarray]) -> bool:
    """Whether `pair` has both matrices of an adapter, with the same rank."""
    if pair.keys() != {A, B} or not pair[A].ndim == pair[B].ndim == 2:
        return False
    return 0 < pair[A].shape[0] == pair[B].shape[1]


def _read_tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError

    try:
        with open_file(file) as handle:
            names = list(handle.keys())
            return {name: handle.get_tensor(name) for name in names}, handle.metadata() or {}
    except (SafetensorError, OSError) as wrong:
        raise UserError(
            f"{file} cannot be read: {wrong}. The file is damaged or missing; copy it again."
        ) from None


def _scale(directory: Path, config: dict[str, Any], module: str, rank: int) -> float:
    """Return the scale of a module's adapter, from lora_alpha, alpha_pattern and use_rslora.

    Args:
        config: Content of adapter_config.json.
    """
    try:
        patterns = config.get("alpha_pattern") or {}
        own = (v for key, v in patterns.items() if _names(key, module))
        alpha = float(next(own, config["lora_alpha"]))
        int(alpha)  # raises if alpha is infinite or NaN
    except (LookupError, TypeError, ArithmeticError, ValueError, AttributeError, re.error) as wrong:
        raise UserError(
            f"{directory / ADAPTER_CONFIG} gives no lora_alpha for {module}: {wrong}. Replace the "
            "file with a good copy."
        ) from None
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _names(pattern: str, module: str) -> bool:
    """Whether a regular expression of alpha_pattern matches a module's name, by PEFT's rules.

    Raises:
        ValueError: The pattern has so many repetitions that matching could take forever.
    """
    if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
        raise ValueError(f"the pattern {pattern[:60]} repeats too much")
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def check_adapter(directory: Path, adapter: Adapter, config: ModelConfig) -> None:
    """Check that an adapter fits the model that `config` describes.

    Raises:
        UserError: The model lacks a tensor of the adapter, or the tensor has another shape.
    """
    shapes = {tensor.name: tensor.shape for tensor in hf_tensors(config)}
    for name, change in adapter.changes.items():
        shape = (change.b.shape[0], change.a.shape[1])
        if shapes.get(name) != shape:
            has = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise UserError(
                f"{directory} is an adapter for {name} of shape {shape}, but in the base model "
                f"{adapter.base.name} this tensor {has}. Correct base_model_name_or_path in "
                f"{directory / ADAPTER_CONFIG}."
            )


# ------------------------------------------------------------------- the files of a run's adapter


class _Place(NamedTuple):
    """The place of a parameter in a tensor of the files, and in the adapter of this tensor.

    Attributes:
        tensor: The tensor in the files of the base.
        part: The rows of the tensor that hold the parameter.
        columns: The columns of `b` and the rows of `a` that belong to the parameter.
    """

    tensor: Tensor
    part: Part
    columns: slice

    @property
    def key(self) -> str:
        return self.part.path[-1]


def _places(config: ModelConfig, options: LoraOptions) -> Iterator[list[_Place]]:
    """Yield a list of places for each tensor that has an adapter, in the order of the file."""
    for tensor in hf_tensors(config):
        parts = [p for p in tensor.parts if p.layer is not None and p.path[-1] in options.targets]
        if parts:
            r = options.rank
            yield [_Place(tensor, p, slice(i * r, i * r + r)) for i, p in enumerate(parts)]


def adapter_of(config: ModelConfig, params: Params, options: LoraOptions, base: Base) -> Adapter:
    """Convert the parameters of an adapter to the layout of the files, in host memory.

    All processes of a run must call this function.
    """
    host, changes = jax.tree.map(on_host, params["layers"]), {}
    for places in _places(config, options):
        tensor, rank = places[0].tensor, places[-1].columns.stop
        a = np.zeros((rank, tensor.shape[1]), np.float32)
        b = np.zeros((tensor.shape[0], rank), np.float32)
        for place in places:
            own, layer = host[place.key], place.part.layer
            assert layer is not None
            a[place.columns] = own["a"][layer].reshape(-1, options.rank).T
            outputs = own["b"][layer]
            if place.part.order is not None:
                outputs = outputs[..., np.argsort(place.part.order)]
            b[tensor.rows(place.part), place.columns] = outputs.reshape(options.rank, -1).T
        changes[tensor.name] = Change(a, b, options.scale)
    return Adapter(base, changes)


def save_adapter(
    directory: Path, config: ModelConfig, params: Params, options: LoraOptions, base: Base
) -> None:
    """Write an adapter in PEFT's layout, with a README.

    The weights are written in the dtype of `config.files`. All processes of a run must call this
    function; process 0 writes.

    Raises:
        UserError: A value is too large for float16.
    """
    from safetensors.numpy import save_file

    adapter = adapter_of(config, params, options, base)
    if jax.process_index():
        return
    tensors, ranks = {}, {}
    for name, change in adapter.changes.items():
        module = name.removesuffix(".weight")
        ranks[module.rsplit(".", 1)[1]] = change.a.shape[0]
        for end, values in ((A, change.a), (B, change.b)):
            key = f"{PREFIX}{module}{end}"
            tensors[key] = rounded(key, values, config.files.dtype)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({BASE_HASH: base.sha256} if base.sha256 else {})
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata=metadata)
    write_json(directory / ADAPTER_CONFIG, _adapter_config(options, base, ranks))
    (directory / "README.md").write_text(_readme(options, base), encoding="utf-8")


def _adapter_config(options: LoraOptions, base: Base, ranks: dict[str, int]) -> dict[str, Any]:
    """The content of adapter_config.json, with the same keys as PEFT writes.

    Args:
        ranks: Rank of each adapted module's adapter, by the module's name.
    """
    name, _, revision = (base.name or "").partition("@")
    is_hub = not Path(name).is_absolute()
    others = {module: rank for module, rank in ranks.items() if rank != options.rank}
    alpha = options.scale * options.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": (name if is_hub else base.name) or None,
        "revision": (revision or None) if is_hub else None,
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": options.lora_dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {module: _whole(options.scale * rank) for module, rank in others.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _readme(options: LoraOptions, base: Base) -> str:
    front = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    if base.name:
        lines.insert(0, f"base_model: {json.dumps(base.name.partition('@')[0])}")
    of = base.name or "the model that it was trained on"
    return (
        "---\n" + "\n".join(lines) + "\n---\n\n# Adapter\n\n"
        f"A LoRA adapter of rank {options.rank} and alpha {options.scale * options.rank:g} for "
        f"{of}, trained with consyn_jax. The base model's weights are not included.\n\n"
        "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("this directory")\n```\n\n'
        "`consyn-convert DIRECTORY --merge_lora --output MERGED` merges the adapter into the base "
        "model, and writes the full model.\n"
    )


def load_adapter(
    directory: Path, config: ModelConfig, options: LoraOptions, mesh: Mesh | None = None
) -> Params:
    """Load an adapter that `save_adapter` has written, as float32 parameters.

    Raises:
        UserError: The adapter is damaged, lacks a tensor, or has a rank other than that of
            `options`.
    """
    adapter, form = read_adapter(directory), adapter_layout(config, options)
    host = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), form.shapes)
    for places in _places(config, options):
        name, rank = places[0].tensor.name, places[-1].columns.stop
        change = adapter.changes.get(name)
        if change is None or change.a.shape[0] != rank:
            raise UserError(
                f"{directory} has no adapter of rank {rank} for {name}, so it does not belong to "
                "this run. Replace it with the adapter of this run."
            )
        for place in places:
            own, layer = host["layers"][place.key], place.part.layer
            own["a"][layer] = change.a[place.columns].T.reshape(own["a"].shape[1:])
            rows = change.b[place.tensor.rows(place.part), place.columns]
            outputs = rows.T.reshape(own["b"].shape[1:])
            order = place.part.order
            own["b"][layer] = outputs if order is None else outputs[..., order]
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, host)
    return jax.tree.map(
        lambda values, where: jax.make_array_from_callback(values.shape, where, values.__getitem__),
        host,
        form.shardings(mesh),
    )
