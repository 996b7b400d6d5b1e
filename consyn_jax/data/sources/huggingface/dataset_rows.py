"""Read rows of Parquet and Arrow files, saved datasets and Hub datasets, starting at any row.

A position is the number of rows before it, over all files in reading order. No code from the data
is run, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consyn_jax.data.sources.huggingface.arrow_tables import (
    pieces,
    python_rows,
    tables,
)
from consyn_jax.data.sources.huggingface.hub import downloaded_files, stream
from consyn_jax.data.sources.huggingface.hub_cache import check_name, files_in_cache, saved
from consyn_jax.data.sources.huggingface.hub_names import DEFAULT_SPLIT, hub_name
from consyn_jax.errors import UserError, brief

SUFFIXES = (".parquet", ".arrow")


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows.

    Attributes:
        rows: a dictionary for each row, by column.
        position: number of rows up to the end of this batch, where `rows(name, position)`
            continues.
        bytes_done: number of bytes read so far, out of `size(name)`; 0 while streaming.
        unread: names of columns that were not read, because no option needs them.
    """

    rows: list[dict[str, Any]]
    position: int
    bytes_done: int
    unread: tuple[str, ...]


def is_dataset(path: Path) -> bool:
    """Whether `path` is a Parquet file, an Arrow file, or a dataset written by `save_to_disk`.

    `PATH:SPLIT` is one split of a saved dataset with several splits.
    """
    return _local(str(path)) is not None


def files(path: Path) -> tuple[Path, ...]:
    """List the files with the rows of a local `path` or `PATH:SPLIT`, in reading order.

    Raises:
        UserError: the split does not exist, or files of a saved dataset are missing or damaged.
    """
    found = _local(str(path))
    if found is None:
        raise UserError(
            f"{path} is neither a Parquet file, an Arrow file nor a dataset written by "
            "save_to_disk. Check the path."
        )
    place, split = found
    if not place.is_dir():
        return (place,)
    if (place / "dataset_dict.json").is_file():
        splits = saved(place / "dataset_dict.json", "splits")
        check_name("split", split or DEFAULT_SPLIT, splits, str(place), f"{place}:SPLIT")
        place = place / (split or DEFAULT_SPLIT)
    state = saved(place / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        # These files define the order of the rows. `datasets` no longer reads them, and silently
        # returns the rows in another order.
        raise UserError(
            f"{place} was saved by an old version of datasets, with the order of its rows in a "
            "separate file. Load it with that version, call flatten_indices, and save it again."
        )
    data = [
        entry.get("filename") if isinstance(entry, dict) else None
        for entry in saved(place / "state.json", "_data_files")
    ]
    if not all(isinstance(name, str) and Path(name).name == name for name in data):
        raise UserError(
            f"{place / 'state.json'} names files outside its directory. Save the dataset again."
        )
    return tuple(place / str(name) for name in data)


def other_splits(path: Path) -> tuple[str, ...]:
    """List the splits of a saved dataset besides the default split; none for other paths.

    Raises:
        UserError: the list of splits is damaged.
    """
    if not (path / "dataset_dict.json").is_file():
        return ()
    splits = saved(path / "dataset_dict.json", "splits")
    return tuple(split for split in splits if split != DEFAULT_SPLIT)


def size(name: str) -> int:
    """Return the size of a dataset's files in bytes.

    For a Hub dataset, only files in the cache count. The size is 0 before the dataset is
    downloaded, and while it is streamed.
    """
    found = files(Path(name)) if _local(name) else files_in_cache(hub_name(name))
    return sum(file.stat().st_size for file in found if file.is_file())


def rows(
    name: str, start: int, columns: Sequence[str], streaming: bool = False
) -> Iterator[RowBatch]:
    """Read the rows of `name` from position `start` on, in batches.

    A batch has at most `BATCH_ROWS` rows and `BATCH_BYTES` bytes, or is a single larger row.

    Args:
        name: a local path, `PATH:SPLIT`, or the name of a dataset of the Hub.
        columns: the needed keys. A column is read if its name is a key, or the part of a key before
            the first dot. If a file has none of these columns, each row has all columns of the
            file, with the value None.
        streaming: whether to read a Hub dataset without storing it on the disk. This has no effect
            on local files. If the Hub cannot be reached, the cached copy is read.

    Raises:
        UserError: a file is damaged, or a Hub dataset cannot be reached or read.
    """
    if _local(name):
        found = tables(files(Path(name)), start, columns)
    elif streaming:
        found = stream(hub_name(name), start, columns)
    else:
        found = tables(downloaded_files(hub_name(name)), start, columns)
    position = start
    for table, names, bytes_done, place in found:
        read = set(table.schema.names)
        unread = tuple(name for name in names if name not in read)
        for piece in pieces(table):
            try:
                made = python_rows(piece)
            except (ValueError, OverflowError, ArithmeticError) as error:
                raise UserError(
                    f"Row {position} of {place}, or one of the {piece.num_rows - 1} after it, "
                    f"cannot be read: {brief(error)}. Correct the value, or save the data without "
                    "that row or column."
                ) from error
            position += piece.num_rows
            yield RowBatch(made, position, bytes_done, unread)


def _local(name: str) -> tuple[Path, str | None] | None:
    """Resolve a local name to (file or directory, split); None if there is no such local data."""
    path = Path(name)
    if path.is_dir():
        whole = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
        return (path, None) if whole or (path / "dataset_dict.json").is_file() else None
    if path.is_file():
        return (path, None) if path.suffix.lower() in SUFFIXES else None
    head, _, split = name.rpartition(":")
    return (Path(head), split) if head and (Path(head) / "dataset_dict.json").is_file() else None
