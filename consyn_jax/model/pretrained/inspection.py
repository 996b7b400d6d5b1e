"""Check that the tensors of a model directory match its config.json.

Only the headers of the safetensors files are read, so that an error is reported before any weights
are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from consyn_jax.errors import UserError, counted, listed
from consyn_jax.model.pretrained.config_json import read_config
from consyn_jax.model.pretrained.families.llama import OUTSIDE_BLOCKS
from consyn_jax.model.pretrained.peft_files import check_adapter, is_adapter, read_adapter
from consyn_jax.model.pretrained.safetensors_files import Header, open_weights, read_headers
from consyn_jax.model.pretrained.tensors import hf_tensors
from consyn_jax.model.pretrained.weights import base_of
from consyn_jax.model_config import ModelConfig

# Dtypes that can be trained, by their names in safetensors.
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Suffix of tensors that older versions of transformers saved, and newer versions compute.
COMPUTED = ".rotary_emb.inv_freq"
HEAD, EMBEDDING = OUTSIDE_BLOCKS["output"], OUTSIDE_BLOCKS["embedding"]


def read_checkpoint(directory: Path) -> ModelConfig:
    """Read the configuration of a model, and check that its files have exactly the right tensors.

    For an adapter, return the configuration of its base model, and check that the adapter fits it.

    Raises:
        UserError: A tensor is missing, unexpected, or of the wrong shape or dtype; or the model is
            not supported.
    """
    if is_adapter(directory):
        adapter = read_adapter(directory)
        config = read_checkpoint(base_of(directory, adapter))
        check_adapter(directory, adapter, config)
        return config
    config = read_config(directory)
    found = {
        name: header
        for name, header in read_headers(directory).items()
        if not name.endswith(COMPUTED)
    }
    _check_types(directory, found)
    if config.tie_embeddings and HEAD in found:
        _check_tied(directory, found)
        config = replace(config, files=replace(config.files, has_tied_head=True))
    _check_tensors(directory, config, found)
    dtype, others = _dtypes(found)
    return replace(config, files=replace(config.files, dtype=dtype, other_dtypes=others))


def _check_types(directory: Path, found: Mapping[str, Header]) -> None:
    other = {name: h.dtype for name, h in found.items() if h.dtype not in DTYPE_NAMES}
    if other:
        name, dtype = next(iter(other.items()))
        raise UserError(
            f"{directory} has {counted(len(other), 'tensor')} of a type that cannot be trained, "
            f"such as {name} of {dtype}. Use a model in float32, bfloat16 or float16."
        )


def _check_tied(directory: Path, found: Mapping[str, Header]) -> None:
    """Check that a stored output embedding of a tied model equals the input embedding."""
    same = HEAD in found and found.get(EMBEDDING) == found[HEAD]
    if same:
        read = open_weights(directory)
        head, embedding = (
            np.ascontiguousarray(read(name)).view(np.uint8) for name in (HEAD, EMBEDDING)
        )
        same = np.array_equal(head, embedding)
    if not same:
        raise UserError(
            f"{directory} has an output embedding, {HEAD}, that differs from the input embedding, "
            "but config.json ties the two. If the tensor is right, set tie_word_embeddings to "
            "false in config.json."
        )


def _check_tensors(directory: Path, config: ModelConfig, found: Mapping[str, Header]) -> None:
    expected = {tensor.name: tensor.shape for tensor in hf_tensors(config)}
    missing = [name for name in expected if name not in found]
    if missing:
        hint = (
            "Download the model again, or correct config.json, which may belong to another model."
        )
        if missing == [HEAD]:
            hint = (
                "Set tie_word_embeddings to true in config.json if the model uses the input "
                "embedding as its output embedding."
            )
        lacking = f"{counted(len(missing), 'tensor')}: {listed(missing)}"
        raise UserError(f"{directory} lacks {lacking}. {hint}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(
                f"{directory}: {name} has shape {found[name].shape}, "
                f"and config.json asks for {shape}. Correct config.json, or download the model "
                "again."
            )
    surplus = [name for name in found if name not in expected]
    if surplus:
        raise UserError(
            f"{directory} has {counted(len(surplus), 'tensor')} that its config.json does not "
            f"describe: {listed(surplus)}. Correct config.json, which has {config.num_layers} "
            f"layers and {_biases(config)}."
        )


def _dtypes(found: Mapping[str, Header]) -> tuple[str, tuple[str, ...]]:
    """Return the dtype of most elements, and a list of "name=dtype" for tensors of other dtypes."""
    sizes: Counter[str] = Counter()
    for header in found.values():
        sizes[DTYPE_NAMES[header.dtype]] += int(np.prod(header.shape))
    most = sizes.most_common(1)[0][0]
    others = ((name, DTYPE_NAMES[header.dtype]) for name, header in found.items())
    return most, tuple(f"{name}={dtype}" for name, dtype in others if dtype != most)


def _biases(config: ModelConfig) -> str:
    named = {"attention": config.qkv_bias or config.output_bias, "the MLP": config.mlp_bias}
    found = [name for name, has in named.items() if has]
    return f"biases in {' and '.join(found)}" if found else "no biases"
