"""The safetensors files of a model directory: one file, or shards with an index."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from consyn_jax.errors import UserError, brief, listed
from consyn_jax.files import check_is_no_pointer
from consyn_jax.model.pretrained.config_json import read_json, write_json

MAX_SHARD_BYTES = 5 * 10**9  # the default of huggingface_hub
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Shards = dict[str, dict[str, int]]  # file -> tensor -> bytes


Read = Callable[..., np.ndarray]


@contextmanager
def open_file(file: Path) -> Iterator[Any]:
    """Open a safetensors file and map it into memory for the duration of the `with` block.

    Raises:
        UserError: The file is too large for this process to map.
        SafetensorError, OSError: The file is damaged or missing.
    """
    from safetensors import safe_open

    try:
        opened = safe_open(file, framework="numpy")
    except MemoryError as wrong:
        raise UserError(
            f"{file} of {file.stat().st_size:,} bytes cannot be mapped into memory: {wrong}. Raise "
            "the limit (ulimit -v), or replace the file with a good copy."
        ) from None
    with opened as handle:
        yield handle


def open_weights(directory: Path) -> Read:
    """Return a function that reads one tensor by name, from a single file or from shards.

    If slices follow the name, the function reads only that part of the tensor. It raises
    `UserError` if the tensor is damaged or missing.

    Raises:
        UserError: There is no safetensors file, or the index is wrong.
    """
    from safetensors import SafetensorError

    files = _files(directory)

    def read(name: str, *index: slice) -> np.ndarray:
        file = directory / (SINGLE if files is None else files.get(name, ""))
        try:
            with open_file(file) as handle:
                return handle.get_slice(name)[index] if index else handle.get_tensor(name)
        except (SafetensorError, OSError) as wrong:
            raise UserError(
                f"{name} cannot be read from {file}: {brief(wrong)}. Download the model again, "
                "with the config.json that belongs to it."
            ) from None

    return read


def weights_hash(directory: Path) -> str:
    """SHA-256 of a model's safetensors files; it does not depend on the directory's name.

    Raises:
        UserError: A file cannot be read.
    """
    from consyn_jax.data.store.file_hashes import FileHashes

    with FileHashes() as file_hash:
        hashes = [file_hash(path) for path in sorted(directory.glob("*.safetensors"))]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


class Header(NamedTuple):
    """Shape of a tensor, and its dtype as safetensors names it ("BF16")."""

    dtype: str
    shape: tuple[int, ...]


def read_headers(directory: Path) -> dict[str, Header]:
    """Read the dtype and shape of all tensors of a model, by name, from the headers of its files.

    Raises:
        UserError: There is no safetensors file, the index is wrong, a file is damaged, or a file
            lacks a tensor that the index lists for it.
    """
    from safetensors import SafetensorError

    files = _files(directory)
    by_file: dict[str, dict[str, Header]] = {}
    named = sorted({SINGLE} if files is None else set(files.values()))
    absent = [name for name in named if not (directory / name).is_file()]
    if absent:
        raise UserError(
            f"{directory} lacks {listed(absent)}, which {INDEX} lists. Download or copy the "
            "model again."
        )
    for name in named:
        check_is_no_pointer(directory / name)
        try:
            with open_file(directory / name) as handle:
                slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
                by_file[name] = {
                    key: Header(part.get_dtype(), tuple(part.get_shape()))
                    for key, part in slices.items()
                }
        except (SafetensorError, OSError) as wrong:
            raise UserError(
                f"{directory / name} cannot be read: {wrong}. The file is damaged; download or "
                "copy it again."
            ) from None
    if files is None:
        return by_file[SINGLE]
    wrong_place = [name for name, file in files.items() if name not in by_file[file]]
    if wrong_place:
        raise UserError(
            f"{directory / INDEX} says that {files[wrong_place[0]]} holds {wrong_place[0]}, which "
            "it does not. Download or copy the model again."
        )
    return {name: header for headers in by_file.values() for name, header in headers.items()}


def _files(directory: Path) -> Mapping[str, str] | None:
    """Name of each tensor -> name of its file, from the index; None if there is a single file."""
    if (directory / INDEX).is_file():
        files = read_json(directory / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in files.values()
        ):
            raise UserError(
                f"{directory / INDEX} has no weight_map from tensors to files in its directory. "
                "Download the model again."
            )
        return files
    if (directory / SINGLE).is_file():
        return None
    pickles = [p.name for kind in ("*.bin", "*.pt*") for p in sorted(directory.glob(kind))]
    found = ". Download or copy the model again."
    if pickles:
        found = (
            f", only {pickles[0]}, a pickle, which is never opened. Load the model in "
            "transformers, and save it with save_pretrained."
        )
    raise UserError(f"{directory} has no {SINGLE}{found}")


def assign_shards(sizes: Mapping[str, int], max_bytes: int | None = None) -> Shards:
    """Distribute tensors over files, in order.

    Args:
        sizes: Bytes of each tensor.
        max_bytes: Size limit of a file, by default 5 GB; a larger tensor gets a file to itself.

    Returns:
        Name of each file -> name and bytes of each of its tensors.
    """
    most = MAX_SHARD_BYTES if max_bytes is None else max_bytes
    groups: list[dict[str, int]] = [{}]
    for name, num_bytes in sizes.items():
        if groups[-1] and sum(groups[-1].values()) + num_bytes > most:
            groups.append({})
        groups[-1][name] = num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def write_index(directory: Path, shards: Shards) -> None:
    """Write the index file, which maps each tensor to its shard."""
    total = sum(num_bytes for sizes in shards.values() for num_bytes in sizes.values())
    files = {name: file for file, sizes in shards.items() for name in sizes}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def delete_weights(directory: Path) -> None:
    """Delete the weight files of an earlier model.

    An old index would take precedence over the new weights when the model is loaded.
    """
    (directory / INDEX).unlink(missing_ok=True)
    for file in directory.iterdir():
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", file.name):
            file.unlink()
