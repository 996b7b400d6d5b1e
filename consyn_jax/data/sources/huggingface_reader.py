"""Hugging Face datasets as sources."""

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

    Their rows are converted to JSON Lines.
    """

    kind, noun, unit = "huggingface", "a Hugging Face dataset", "Hugging Face dataset"
    suffixes = dataset_rows.SUFFIXES

    def recognise(self, file: Candidate) -> str | None:
        """Recognise a file by its suffix."""
        return "" if dataset_rows.is_dataset(file.path) else None

    def is_source(self, path: Path) -> bool:
        """Whether it is a directory of `save_to_disk`, or a split of one."""
        return dataset_rows.is_dataset(path)

    def other_splits(self, path: Path) -> tuple[str, ...]:
        """Splits of a saved `DatasetDict` besides train, to be read as PATH:SPLIT."""
        return dataset_rows.other_splits(path)

    def remote_name(self, name: str) -> str | None:
        """The name of a Hub dataset including its commit; None for other names."""
        return hub.identity(name) if parse_hub_name(name) else None

    def remote_splits(self, name: str, remote: str) -> tuple[str, ...]:
        """Names of the splits of a Hub dataset besides train."""
        return () if names_split(name) else hub.other_splits(remote)

    def files(self, name: str) -> tuple[Path, ...]:
        """The local files; none for a Hub dataset, which the commit in its name identifies."""
        return dataset_rows.files(Path(name)) if dataset_rows.is_dataset(Path(name)) else ()

    def size(self, name: str) -> int:
        """Size of the files, or of the copy in the cache, in bytes."""
        return dataset_rows.size(name)

    def blocks(self, name: str, start: Position, reading: Reading) -> Iterator[Block]:
        """Rows as JSON Lines; only the columns that the options name are read."""
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

    Binary values are decoded as text such that their bytes do not change; others use `str`.

    >>> _in_json("é".encode()), _in_json(b"\xff"), _in_json(3 + 4j)
    ('é', '\udcff', '(3+4j)')
    """
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
