"""The model that a run begins with, and a fingerprint of its weights."""

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
    """A model whose parameters are made only on the run's mesh.

    Attributes:
        make: makes the parameters on a mesh one after the other, and passes each through a
            `Convert`.
        weights: fingerprint of the weights; None if the seed decides them.
        name: directory or hub id of the weights; None if the seed decides them.
    """

    config: ModelConfig
    make: Callable[[Mesh, Convert], Params]
    weights: str | None = None
    name: str | None = None


def checked(model: Any, tokenizer: Any) -> ConsynLMHeadModel | DeferredModel:
    """Return the model, once it and the tokenizer are known to be ours.

    Raises:
        UserError: one of them is a path, or of another library.
    """
    if isinstance(model, str | os.PathLike):
        raise UserError(
            f"model is a name. Pass ConsynLMHeadModel.from_pretrained({os.fspath(model)!r}), or "
            "from_config for new weights."
        )
    if not isinstance(model, ConsynLMHeadModel | DeferredModel):
        is_theirs = hasattr(model, "save_pretrained") and not isinstance(model, type)
        first = "Write it with save_pretrained(DIR), and pass" if is_theirs else "Pass"
        raise UserError(
            f"model is a {type(model).__name__}, not a ConsynLMHeadModel. {first} "
            "ConsynLMHeadModel.from_pretrained(DIR), or from_config for new weights."
        )
    if not isinstance(tokenizer, BPETokenizer | None):
        raise UserError(
            f"tokenizer is a {type(tokenizer).__name__}, not a BPETokenizer. Leave it out for the "
            "model's own, or pass BPETokenizer.from_file(DIR)."
        )
    return model


def parameters_on(
    model: ConsynLMHeadModel | DeferredModel, mesh: Mesh, convert: Convert = unchanged
) -> Params:
    """The model's current parameters in float32 on a mesh, for the train step to consume.

    Args:
        convert: applied to each parameter before the next one is made.
    """
    if isinstance(model, DeferredModel):
        return model.make(mesh, convert)

    # A copy, as the step consumes it: the caller's model stays whole until the run ends.
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
    """The frozen weights under an adapter, as every batch carries them; empty without an adapter.

    Args:
        untrained: for a model in memory, its parameters as they were passed.
        types: the number types of the frozen weights; None without an adapter.
    """
    if types is None:
        return {}
    if isinstance(model, ConsynLMHeadModel) and untrained is not None:
        model = ConsynLMHeadModel.from_parameters(model.config, untrained)
    return {BASE: parameters_on(model, mesh, base_rounding(model.config, types, mesh))}


def give_parameters(
    model: ConsynLMHeadModel | DeferredModel, params: Params, lora: LoraOptions, base: Params | None
) -> ConsynLMHeadModel | DeferredModel:
    """Give a model what a run has trained: all parameters, or the adapter added to `base`.

    A model that does not exist yet becomes one, unless an adapter was trained.
    """
    if isinstance(model, ConsynLMHeadModel):
        model.take_over(params if base is None else merged(base, params, lora))
        return model
    return model if lora.is_used else ConsynLMHeadModel.from_parameters(model.config, params)


def base_of_adapter(model: ConsynLMHeadModel | DeferredModel) -> Base:
    """The model under a run's adapter, as its files name it.

    The weights of a model in memory may have changed since they were read, so they have no hash.
    """
    if isinstance(model, DeferredModel):
        return Base(model.name, model.weights)
    return Base(None if model.source is None else str(model.source.resolve()))


def weights_of(model: ConsynLMHeadModel | DeferredModel) -> str | None:
    """A fingerprint of the weights that a run begins with; None if its seed decides.

    Arrays that this process holds only in part count by their names and shapes only.
    """
    if isinstance(model, DeferredModel):
        return model.weights
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.parameters):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}|".encode())
        if leaf.is_fully_addressable:
            digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
