"""Find the model that a user names: a directory, a run, a checkpoint, or a hub id."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from consyn_jax.config import PRESETS
from consyn_jax.errors import UserError
from consyn_jax.files import refuse_strays, refuse_unfinished
from consyn_jax.hub_download import is_elsewhere
from consyn_jax.inference.run_models import (
    ORBAX,
    RUN_FILES,
    check_kind,
    checkpoint_run,
    choose_in_run,
    is_run,
    run_adapter,
    run_architecture,
    run_tokenizer,
)
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.lora import adapter_layout
from consyn_jax.model.parameters import Layout, Params, layout
from consyn_jax.model.pretrained.config_json import DTYPE_KEYS, read_config
from consyn_jax.model.pretrained.inspection import read_checkpoint
from consyn_jax.model.pretrained.peft_files import adapter_of, is_adapter, read_adapter
from consyn_jax.model.pretrained.weights import (
    base_directory,
    base_of,
    find_model,
    load_parameters,
)
from consyn_jax.model_config import ModelConfig
from consyn_jax.remote.urls import is_bucket_url
from consyn_jax.tokenization import BPETokenizer, own_tokenizer
from consyn_jax.training.checkpointing.saved_weights import read_arrays, read_weights
from consyn_jax.training.run.directory import CONFIG

Load = Callable[[Mesh | None, Any], Params]


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and checked, but whose weights are not read yet.

    Attributes:
        name: The name that the user gave.
        taken: Description of the chosen model: "final/ of the run runs/verse".
        directory: The directory of the model or checkpoint.
        tokenizer: The model's own tokenizer; None if it has none.
        load: Function of a mesh and a number type, which reads the weights onto the mesh in this
            type. Without a mesh, it reads them onto the first device.
        run: The run that the model comes from; None for other models.
        step: The step of a checkpoint; None for other models.
        base: Name of the base model into which `load` merges an adapter; None without an adapter.
    """

    name: str
    taken: str
    directory: Path
    config: ModelConfig
    tokenizer: BPETokenizer | None
    load: Load
    run: Path | None = None
    step: int | None = None
    base: str | None = None

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's Jinja template for conversations; None if it has none."""
        return None if self.tokenizer is None else self.tokenizer.chat_template

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """Settings in the model's generation_config.json, such as temperature; often empty."""
        defaults: dict[str, Any] = json.loads(self.config.generation_config or "{}")
        return defaults

    def parameters(self, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Params:
        """Read the weights, as a nested dict of arrays sharded over the mesh.

        From a checkpoint, this reads only the weights, not the optimizer state.

        Args:
            dtype: float32, bfloat16 or float16; weights stored in another type are converted.

        Raises:
            UserError: the files are damaged, or belong to another model.
        """
        return self.load(mesh, jnp.dtype(dtype))

    def model(self, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> ConsynLMHeadModel:
        """Read the weights into a model; the arguments are the same as for `parameters`."""
        model = ConsynLMHeadModel.from_parameters(self.config, self.parameters(mesh, dtype))
        model.source = self.directory if self.step is None else _tokenizer_directory(self)
        return model


def _tokenizer_directory(source: ModelSource) -> Path | None:
    return None if source.run is None or source.tokenizer is None else source.run / "tokenizer"


def find_source(name: str | Path, step: int | None = None) -> ModelSource:
    """Find the model that a user names.

    For a run, this is final/ if it exists, otherwise best/, otherwise the newest checkpoint.

    Args:
        name: A directory in the Hugging Face layout, a run directory, a checkpoint directory
            (RUN/checkpoints/STEP), a hub id (owner/name, owner/name@revision), or the URL of a
            directory in a bucket.
        step: Use the checkpoint of this step of a run.

    Raises:
        UserError: There is no such model, its kind is unknown, or it is damaged.
    """
    path = Path(name)
    if is_elsewhere(str(name)) or not path.exists():
        return _from_elsewhere(str(name), step)
    refuse_unfinished(path)
    run = checkpoint_run(path)
    if run is not None or is_run(path):
        refuse_strays(path if run is None else run, RUN_FILES)
    if run is not None:
        if step is not None and step != int(path.resolve().name):
            raise UserError(f"{path} is already a checkpoint. Leave --step out.")
        return _from_checkpoint(str(name), run, int(path.resolve().name))
    if is_run(path):
        chosen = choose_in_run(path, step)
        if isinstance(chosen, int):
            return _from_checkpoint(str(name), path, chosen)
        taken = f"{chosen.name}/ of the run {path}"
        return _from_directory(str(name), chosen, taken, run=path)
    check_kind(path)
    if step is not None:
        raise UserError(f"--step {step} is for a run, but {path} is not one. Leave --step out.")
    return _from_directory(str(name), path, f"the directory {path}")


def _from_elsewhere(name: str, step: int | None) -> ModelSource:
    if name in PRESETS:
        raise UserError(
            f"{name} is the name of an architecture, for which no weights are published. Train "
            f"it with consyn-train --model {name}, and give the run's directory."
        )
    if step is not None and is_elsewhere(name):
        raise UserError(f"--step {step} is for a local run, not for {name}. Leave --step out.")
    at_hub = "" if is_bucket_url(name) else " of the Hugging Face Hub"
    return _from_directory(name, find_model(name), f"{name}{at_hub}")


def _from_directory(name: str, directory: Path, taken: str, run: Path | None = None) -> ModelSource:
    is_orbax = (directory / ORBAX).is_dir()
    config = _written_as_it_says(directory) if is_orbax else read_checkpoint(directory)
    tokenizer, base = own_tokenizer(directory), None
    if is_adapter(directory):
        adapter = read_adapter(directory)
        base, taken = adapter.base.name, f"{taken}, an adapter over {adapter.base.name}"
        tokenizer = tokenizer or own_tokenizer(base_of(directory, adapter))
    if tokenizer is None and run is not None:
        tokenizer = run_tokenizer(run)
    _check_size(directory, config, tokenizer)

    def load(mesh: Mesh | None, dtype: Any) -> Params:
        if is_orbax:
            return read_arrays(directory / ORBAX, shapes_on(config, mesh, dtype))
        return load_parameters(directory, config, mesh, dtype)

    return ModelSource(name, taken, directory, config, tokenizer, load, run, base=base)


def _written_as_it_says(directory: Path) -> ModelConfig:
    """Read the configuration of a model in Orbax format, with the dtype named in config.json."""
    config = read_config(directory)
    original = json.loads(config.files.config)
    return config.saved_as(next((original[key] for key in DTYPE_KEYS if key in original), None))


def _from_checkpoint(name: str, run: Path, step: int) -> ModelSource:
    tokenizer = run_tokenizer(run)
    config = run_architecture(run, tokenizer)
    place = run / "checkpoints" / str(step)
    _check_size(place, config, tokenizer)
    taken, found = f"step {step:,} of the run {run}", run_adapter(run)
    if found is None:

        def load(mesh: Mesh | None, dtype: Any) -> Params:
            return read_weights(place, shapes_on(config, mesh, dtype))

        return ModelSource(name, taken, place, config, tokenizer, load, run, step)
    options, base = found
    directory = base_directory(base, run, f"checkpoint in {run / CONFIG}")

    def load_adapted(mesh: Mesh | None, dtype: Any) -> Params:
        like = on_mesh(adapter_layout(config, options), None, jnp.float32)
        adapter = adapter_of(config, read_weights(place, like), options, base)
        return load_parameters(directory, config, mesh, dtype, adapter=adapter)

    taken = f"{taken}, an adapter over {base.name}"
    return ModelSource(name, taken, place, config, tokenizer, load_adapted, run, step, base.name)


def shapes_on(config: ModelConfig, mesh: Mesh | None, dtype: Any) -> Params:
    """Shapes, number types and shardings of a model's parameters on a mesh, or on one device."""
    return on_mesh(layout(config), mesh, dtype)


def on_mesh(form: Layout, mesh: Mesh | None, dtype: Any) -> Params:
    """Shapes, number types and shardings of parameters in any layout."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: one, form.shapes) if mesh is None else form.shardings(mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        form.shapes,
        places,
    )


def _check_size(where: Path, config: ModelConfig, tokenizer: BPETokenizer | None) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"The tokenizer in {where} has {tokenizer.vocab_size:,} tokens, but the model has only "
            f"{config.vocab_size:,}. The tokenizer belongs to another model; replace it."
        )
