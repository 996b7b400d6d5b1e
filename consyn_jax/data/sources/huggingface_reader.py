"""The reader of Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from consyn_jax.data.sources.huggingface import dataset_rows, hub
from consyn_jax.data.sources.huggingface.hub_names import names_split, parse_hub_name
from consyn_jax.data.sources.reader import Block, Candidate, Position, Reader, Reading
from consyn_jax.data.sources.rows import RowKeys


class HuggingFaceReader(Reader):
    """Parquet and Arrow files, directories of `save_to_disk`, and datasets of the Hub.

    Rows are converted to JSON Lines.
    """

    kind, noun, unit = "huggingface", "a Hugging Face dataset", "Hugging Face dataset"
    suffixes = dataset_rows.SUFFIXES

    def recognise(self, file: Candidate) -> str | None:
        """Recognise a file by its suffix."""
        return "" if dataset_rows.is_dataset(file.path) else None

    def is_source(self, path: Path) -> bool:
        """Whether `path` is a dataset written by `save_to_disk`, or PATH:SPLIT for one split."""
        return dataset_rows.is_dataset(path)

    def other_splits(self, path: Path) -> tuple[str, ...]:
        """List the names PATH:SPLIT of the splits of a saved `DatasetDict`, except train."""
        return dataset_rows.other_splits(path)

    def remote_name(self, name: str) -> str | None:
        """Return the name of a Hub dataset including its commit; None for other names."""
        return hub.identity(name) if parse_hub_name(name) else None

    def remote_splits(self, name: str, remote: str) -> tuple[str, ...]:
        """List the splits of a Hub dataset, except train, as names of sources."""
        return () if names_split(name) else hub.other_splits(remote)

    def files(self, name: str) -> tuple[Path, ...]:
        """List the files of a local dataset; empty for a Hub dataset."""
        return dataset_rows.files(Path(name)) if dataset_rows.is_dataset(Path(name)) else ()

    def size(self, name: str) -> int:
        """Return the size in bytes of the files, or of a Hub dataset's copy in the cache."""
        return dataset_rows.size(name)

    def can_seek(self, name: str) -> bool:
        """Whether reading can skip whole row groups; true for local files."""
        return bool(self.files(name))

    def blocks(self, name: str, start: Position, reading: Reading) -> Iterator[Block]:
        """Read rows as JSON Lines; only the columns that the options need are read."""
        number, columns = start[1], RowKeys.of(reading.options).columns
        batches = dataset_rows.rows(name, start[0], columns, streaming=reading.streaming)
        for batch in batches:
            lines = [
                json.dumps(row, ensure_ascii=False, default=_in_json).encode(
                    "utf-8", "surrogateescape"
                )
                for row in batch.rows
            ]
            numbers = range(number + 1, number + len(lines) + 1)
            number += len(lines)
            end, done = (batch.position, number), batch.bytes_done
            yield Block.of_rows(name, lines, numbers, end, done, batch.unread)


def _in_json(value: Any) -> str:
    r"""Convert a value that JSON cannot represent to a string.

    Binary values are decoded as text without loss: their bytes can be recovered. Other values are
    converted by `str`.

    >>> _in_json("é".encode()), _in_json(b"\xff"), _in_json(3 + 4j)
    ('é', '\udcff', '(3+4j)')
    """
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
