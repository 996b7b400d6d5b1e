"""The model that a run starts from, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.lora import BaseTypes, base_rounding, merged
from consyn_jax.model.parameters import Convert, Params, layout, unchanged
from consyn_jax.model.pretrained.peft_files import Base
from consyn_jax.model_config import LoraOptions, ModelConfig
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.step import BASE


@dataclass(frozen=True)
class DeferredModel:
    """A model whose parameters are created later, when the mesh of the run is known.

    Attributes:
        make: Function that makes the parameters on a mesh, one after the other, and applies a
            `Convert` to each.
        weights: Fingerprint of the weights; None if the seed determines them.
        name: Directory or hub id of the weights; None if the seed determines them.
    """

    config: ModelConfig
    make: Callable[[Mesh, Convert], Params]
    weights: str | None = None
    name: str | None = None


def checked(model: Any, tokenizer: Any) -> ConsynLMHeadModel | DeferredModel:
    """Check the types of the model and the tokenizer, and return the model.

    Raises:
        UserError: The model or the tokenizer is a path, or an object of another library.
    """
    if isinstance(model, str | os.PathLike):
        raise UserError(
            f"model is a path or a name. Pass ConsynLMHeadModel.from_pretrained("
            f"{os.fspath(model)!r}), or use from_config for new weights."
        )
    if not isinstance(model, ConsynLMHeadModel | DeferredModel):
        is_theirs = hasattr(model, "save_pretrained") and not isinstance(model, type)
        saved = "Save it with save_pretrained(DIR), then pass" if is_theirs else "Pass"
        raise UserError(
            f"model is a {type(model).__name__}, not a ConsynLMHeadModel. {saved} "
            "ConsynLMHeadModel.from_pretrained(DIR), or use from_config for new weights."
        )
    if not isinstance(tokenizer, BPETokenizer | None):
        raise UserError(
            f"tokenizer is a {type(tokenizer).__name__}, not a BPETokenizer. Leave tokenizer out "
            "to use the model's own, or pass BPETokenizer.from_file(DIR)."
        )
    return model


def parameters_on(
    model: ConsynLMHeadModel | DeferredModel, mesh: Mesh, convert: Convert = unchanged
) -> Params:
    """Copy the model's current parameters to a mesh in float32; the train step donates the copy.

    Args:
        convert: Function that converts each parameter before the next one is made.
    """
    if isinstance(model, DeferredModel):
        return model.make(mesh, convert)

    # The train step donates its parameters. It gets a copy, so that the caller's model stays valid.
    def place(path: Any, values: jax.Array, where: Any) -> Any:
        keys = tuple(key.key for key in path)
        return convert(keys, jax.device_put(jnp.array(values, jnp.float32), where))

    return jax.tree_util.tree_map_with_path(
        place, model.parameters, layout(model.config).shardings(mesh)
    )


def base_on(
    model: ConsynLMHeadModel | DeferredModel,
    untrained: Params | None,
    types: BaseTypes | None,
    mesh: Mesh,
) -> dict[str, Any]:
    """Return {BASE: frozen weights} for a run that trains an adapter; {} for other runs.

    The caller adds this dict to every batch.

    Args:
        untrained: Parameters that a model in memory had before this training; None to use the
            model's current parameters.
        types: Dtypes of the frozen weights; None without an adapter.
    """
    if types is None:
        return {}
    if isinstance(model, ConsynLMHeadModel) and untrained is not None:
        model = ConsynLMHeadModel.from_parameters(model.config, untrained)
    return {BASE: parameters_on(model, mesh, base_rounding(model.config, types, mesh))}


def give_parameters(
    model: ConsynLMHeadModel | DeferredModel, params: Params, lora: LoraOptions, base: Params | None
) -> ConsynLMHeadModel | DeferredModel:
    """Give a model its trained parameters: all of them, or `base` with the adapter added.

    A `DeferredModel` becomes a `ConsynLMHeadModel`, unless an adapter was trained.
    """
    if isinstance(model, ConsynLMHeadModel):
        model.take_over(params if base is None else merged(base, params, lora))
        return model
    return model if lora.is_used else ConsynLMHeadModel.from_parameters(model.config, params)


def base_of_adapter(model: ConsynLMHeadModel | DeferredModel) -> Base:
    """Return the base model to name in adapter_config.json, for the adapter of a run.

    A base in memory has no hash, because its weights may have changed since it was loaded.
    """
    if isinstance(model, DeferredModel):
        return Base(model.name, model.weights)
    return Base(None if model.source is None else str(model.source.resolve()))


def weights_of(model: ConsynLMHeadModel | DeferredModel) -> str | None:
    """Fingerprint the weights that a run starts from; None if the seed determines them.

    If this process holds only a part of an array, only the array's name, shape and dtype count.
    """
    if isinstance(model, DeferredModel):
        return model.weights
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.parameters):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}|".encode())
        if leaf.is_fully_addressable:
            digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
