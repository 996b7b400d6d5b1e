"""Load and save the parameters of a model directory, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from consyn_jax.errors import UserError, nearest
from consyn_jax.files import refuse_unfinished
from consyn_jax.hub_download import download, is_elsewhere
from consyn_jax.model.parameters import Convert, Params, layout, unchanged
from consyn_jax.model.pretrained.config_json import (
    to_hf_config,
    write_generation_config,
    write_json,
)
from consyn_jax.model.pretrained.peft_files import (
    ADAPTER_CONFIG,
    Adapter,
    Base,
    is_adapter,
    read_adapter,
)
from consyn_jax.model.pretrained.safetensors_files import (
    Header,
    Read,
    assign_shards,
    delete_weights,
    open_weights,
    read_headers,
    weights_hash,
    write_index,
)
from consyn_jax.model.pretrained.tensors import Part, Tensor, hf_tensors, on_host, rounded
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization.tokenizer_files import KEPT


def find_model(name: str) -> Path:
    """Find the directory of a model; download it if `name` is a hub id or URL that is not cached.

    Raises:
        UserError: There is no model of this name, or the model in the directory is incomplete.
    """
    if is_elsewhere(name):
        return download(name, ["*.json", "*.safetensors", *KEPT])
    if not Path(name).is_dir():
        raise _no_model(Path(name))
    refuse_unfinished(Path(name))
    return Path(name)


def base_directory(base: Base, owner: Path, named: str) -> Path:
    """Find the directory of an adapter's base model, and check that its weights are unchanged.

    Args:
        owner: Directory of the adapter, for error messages.
        named: Setting that names the base, for error messages.

    Raises:
        UserError: The base is missing, is an adapter itself, or has other weights than those on
            which the adapter was trained.
    """
    if base.name is None or not (Path(base.name).is_dir() or is_elsewhere(base.name)):
        fault = "has no name" if base.name is None else f"{base.name} does not exist"
        raise UserError(f"{owner} is an adapter, but its base model {fault}. Change {named}.")
    found = find_model(base.name)
    if is_adapter(found):
        raise UserError(
            f"{owner} is an adapter, and its base {found} is an adapter, too. Merge {found} with "
            f"consyn-convert --merge_lora, and name the merged model in {named}."
        )
    if base.sha256 is not None and weights_hash(found) != base.sha256:
        raise UserError(
            f"{owner} is an adapter that was trained on other weights than those in {found}. "
            f"Restore the original weights in {found}, or name another base in {named}."
        )
    return found


def base_of(directory: Path, adapter: Adapter) -> Path:
    """Find the base model of the adapter in `directory`, and check that the base is unchanged."""
    named = f"base_model_name_or_path in {directory / ADAPTER_CONFIG}"
    return base_directory(adapter.base, directory, named)


def _no_model(path: Path) -> UserError:
    """Build the error for a model path that is not a directory."""
    if path.suffix == ".gguf" and path.is_file():
        return UserError(
            f"{path} is a GGUF file, but only safetensors can be read. Give the Hugging Face model "
            "from which it was converted."
        )
    if path.is_file():
        return UserError(
            f"{path} is a file, but a model is a directory with config.json and safetensors. "
            f"Give {path.parent}."
        )
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    names = [str(entry) for entry in beside if entry.is_dir()]
    return UserError(
        f"{path} is not a model: no such directory{nearest(str(path), names)} Give a directory "
        "with config.json and safetensors, or a hub id as owner/name."
    )


def load_parameters(
    directory: Path,
    config: ModelConfig,
    mesh: Mesh | None = None,
    dtype: Any = np.float32,
    convert: Convert = unchanged,
    adapter: Adapter | None = None,
) -> Params:
    """Load the parameters of a model as arrays of `dtype`, sharded over `mesh`.

    Host memory needs room for only one device's shard of one parameter at a time, and for the slice
    of a tensor from which the shard is read.

    Args:
        directory: Directory of a model, or of an adapter, which is added to its base.
        mesh: Mesh over which to shard the parameters; None to load them on one device.
        convert: Function that converts each parameter before the next one is loaded.
        adapter: Adapter that is added to the float32 weights before they are rounded to `dtype`.

    Raises:
        UserError: There is no safetensors file, a file is damaged, or the tensors do not match
            `config`.
    """
    if is_adapter(directory):
        adapter = read_adapter(directory)
        directory = base_of(directory, adapter)
    read_tensor, headers = open_weights(directory), read_headers(directory)
    for tensor in hf_tensors(config):
        _check_shape(directory, tensor, headers)
    if adapter is not None:
        read_tensor = adapter.added_to(read_tensor)
    return parameters_of(config, read_tensor, mesh, dtype, convert)


def parameters_of(
    config: ModelConfig,
    read_tensor: Read,
    mesh: Mesh | None = None,
    dtype: Any = np.float32,
    convert: Convert = unchanged,
) -> Params:
    """Assemble the parameters from the tensors of a Hugging Face checkpoint.

    Args:
        read_tensor: Function that reads a tensor by name, as `open_weights` returns it.
        mesh, dtype, convert: As in `load_parameters`.
    """
    form = layout(config)
    places: dict[tuple[str, ...], list[tuple[Tensor, Part]]] = {}
    for tensor in hf_tensors(config):
        for part in tensor.parts:
            places.setdefault(part.path, []).append((tensor, part))
    shardings = form.shardings(mesh) if mesh is not None else None

    def load(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        keys = tuple(k.key for k in path)
        read = _reader(places[keys], read_tensor, np.dtype(dtype))
        if shardings is None:
            whole = tuple(slice(0, size) for size in leaf.shape)
            return convert(keys, jax.numpy.asarray(read(whole)))
        return convert(keys, _placed(leaf.shape, _at(shardings, keys), read))

    return jax.tree_util.tree_map_with_path(load, form.shapes)


def _check_shape(directory: Path, tensor: Tensor, headers: Mapping[str, Header]) -> None:
    """Check that a tensor is in the files, with the shape that config.json implies."""
    if tensor.name not in headers:
        raise UserError(
            f"{directory} has no tensor {tensor.name}, which config.json asks for. Download the "
            "model again, with the config.json that belongs to it."
        )
    if headers[tensor.name].shape != tensor.shape:
        raise UserError(
            f"{directory}: {tensor.name} has shape {headers[tensor.name].shape}, "
            f"and config.json asks for {tensor.shape}. Correct config.json, or download the model "
            "again."
        )


def _placed(
    shape: tuple[int, ...], where: Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Build a sharded array from shards that are read and copied to their devices one by one.

    A shard that several devices replicate is read only once.

    Args:
        where: Sharding of the array.
        read: Function that reads a slice of the array.
    """
    owners: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    parts = []
    for bounds, devices in owners.items():
        value = read(tuple(slice(*bound) for bound in bounds))
        parts += jax.block_until_ready([jax.device_put(value, device) for device in devices])
        del value
    return jax.make_array_from_single_device_arrays(shape, where, parts)


def _at(tree: Params, path: tuple[str, ...]) -> Any:
    value: Any = tree
    for key in path:
        value = value[key]
    return value


def _reader(
    places: list[tuple[Tensor, Part]], read_tensor: Read, dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Return a function that reads a slice of a parameter from the tensors that hold its layers.

    Args:
        places: For each layer, the tensor and the rows of the tensor that hold this layer. A
            parameter outside the blocks has a single entry.
    """

    def one(tensor: Tensor, part: Part, index: tuple[slice, ...]) -> np.ndarray:
        start = tensor.rows(part).start

        def rows(own: slice, columns: slice | None) -> np.ndarray:
            own = slice(start + own.start, start + own.stop)
            return read_tensor(tensor.name, own, *([] if columns is None else [columns]))

        return part.read(rows, index)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if places[0][1].layer is None:
            return one(*places[0], index).astype(dtype)
        wanted = places[index[0]]
        value = np.empty((len(wanted), *(i.stop - i.start for i in index[1:])), dtype)
        for layer, place in enumerate(wanted):
            value[layer] = one(*place, index[1:])
        return value

    return read


def save_parameters(
    directory: Path, config: ModelConfig, params: Params, max_shard_bytes: int | None = None
) -> None:
    """Write config.json, generation_config.json and the weights in safetensors.

    The layout and the dtypes are those of `config.files`. Weights larger than `max_shard_bytes`, by
    default 5 GB, are split into shards with an index. Weights of an earlier model in the directory
    are deleted. All processes of a run must call this function; process 0 writes.

    Raises:
        UserError: A weight is too large for float16, or no layout can describe the model.
    """
    from safetensors.numpy import save_file

    tensors = {tensor.name: tensor for tensor in hf_tensors(config)}
    sizes = {name: tensor.num_bytes for name, tensor in tensors.items()}
    shards = assign_shards(sizes, max_shard_bytes)
    writes = jax.process_index() == 0
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        delete_weights(directory)
        write_json(directory / "config.json", to_hf_config(config))
        write_generation_config(directory, config)
    for file, names in shards.items():
        values = {name: to_host(params, tensors[name]) for name in names}
        if writes:
            save_file(values, directory / file, metadata={"format": "pt"})
    if writes and len(shards) > 1:
        write_index(directory, shards)


def to_host(params: Params, tensor: Tensor) -> np.ndarray:
    """Gather the values of a tensor in host memory, in the dtype of the file.

    All processes of a run must call this function.

    Raises:
        UserError: A value is too large for float16.
    """
    rows = []
    for part in tensor.parts:
        value = _at(params, part.path)
        rows.append(part.to_rows(on_host(value if part.layer is None else value[part.layer])))
    return rounded(tensor.name, np.concatenate(rows), tensor.dtype)
