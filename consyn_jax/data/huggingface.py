"""Rows of Parquet files, Arrow files, datasets written by `save_to_disk`, and datasets of the Hugging Face Hub, from any position on.

A position is the number of rows before it, counted over all files in reading order. Nothing that came with data is run or unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consyn_jax.config import UserError
from consyn_jax.data.arrow_tables import line, pieces, python_rows, tables
from consyn_jax.data.hub import DEFAULT_SPLIT, check_name, downloaded_files, files_in_cache, hub_name, saved, stream

SUFFIXES = (".parquet", ".arrow")


@dataclass(frozen=True)
class Batch:
    """Some rows, one after the other.

    Attributes:
        rows: a dictionary for each row, by column.
        position: how many rows lie before the end of this batch; `rows(name, position)` goes on behind it.
        bytes_done: how far reading has come, of the bytes that `size` gives; 0 while streaming.
    """

    rows: list[dict[str, Any]]
    position: int
    bytes_done: int


def look(path: Path) -> bool:
    """Whether `path` is a Parquet file, an Arrow file, or a dataset or one split of several written by `save_to_disk` (`PATH:SPLIT`)."""
    return _local(str(path)) is not None


def files(path: Path) -> tuple[Path, ...]:
    """The files that the rows of a local `path` (or `PATH:SPLIT`) come from, in reading order. Their bytes decide what the rows are.

    Raises:
        UserError: a split that is not there; a dataset whose files are missing or do not say what they are.
    """
    found = _local(str(path))
    if found is None:
        raise UserError(f"{path} is neither a Parquet file, an Arrow file nor a dataset written by save_to_disk. Check the path.")
    place, split = found
    if not place.is_dir():
        return (place,)
    if (place / "dataset_dict.json").is_file():
        splits = saved(place / "dataset_dict.json", "splits")
        check_name("split", split or DEFAULT_SPLIT, splits, str(place), f"{place}:SPLIT")
        place = place / (split or DEFAULT_SPLIT)
    state = saved(place / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        # `datasets` itself has stopped reading these, and gives the rows in another order without a word.
        raise UserError(f"{place} was saved by an old version of datasets, with its order in a file of its own. Load it with that version, "
                        "call flatten_indices, and save it again.")  # fmt: skip
    data = [entry.get("filename") if isinstance(entry, dict) else None for entry in saved(place / "state.json", "_data_files")]
    if not all(isinstance(name, str) and Path(name).name == name for name in data):
        raise UserError(f"{place / 'state.json'} names files outside its directory. Save the dataset again.")
    return tuple(place / str(name) for name in data)


def size(name: str) -> int:
    """Bytes of the files behind `name`; of a dataset of the Hub, those in the cache, so 0 before it is downloaded and when it is streamed."""
    found = files(Path(name)) if _local(name) else files_in_cache(hub_name(name))
    return sum(file.stat().st_size for file in found if file.is_file())


def rows(name: str, start: int, columns: Sequence[str], streaming: bool = False) -> Iterator[Batch]:
    """The rows of `name` from position `start` on, in batches of at most `BATCH_ROWS` rows and, but for a longer row, `BATCH_BYTES` bytes.

    Args:
        name: a local path, `PATH:SPLIT`, or the name of a dataset of the Hub.
        columns: keys of which the rows need those that there are; a column is read if a key, or a key's part before the first dot, is
            its name. Where that is no column at all, the rows have every column, each with None.
        streaming: read a dataset of the Hub without keeping it; no effect on files, or on a copy where the Hub is out of reach.

    Raises:
        UserError: a file that is damaged; whatever hinders getting at a dataset of the Hub.
    """
    if _local(name):
        found = tables(files(Path(name)), start, columns)
    else:
        hub = hub_name(name)
        found = stream(hub, start, columns) if streaming else tables(downloaded_files(hub), start, columns)
    position = start
    for table, bytes_done, place in found:
        for piece in pieces(table):
            try:
                made = python_rows(piece)
            except (ValueError, OverflowError, ArithmeticError) as error:
                raise UserError(f"Row {position} of {place}, or one of the {piece.num_rows - 1} behind it, cannot be read: {line(error)}.") from error
            position += piece.num_rows
            yield Batch(made, position, bytes_done)


def _local(name: str) -> tuple[Path, str | None] | None:
    """(file or directory, split) of a local name, else None."""
    path = Path(name)
    if path.is_dir():
        whole = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
        return (path, None) if whole or (path / "dataset_dict.json").is_file() else None
    if path.is_file():
        return (path, None) if path.suffix.lower() in SUFFIXES else None
    head, _, split = name.rpartition(":")
    return (Path(head), split) if head and (Path(head) / "dataset_dict.json").is_file() else None
