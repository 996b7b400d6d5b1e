"""The table of dataset types, and `Source`: one input of `--data`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from consyn_jax.data.sources.csv_reader import CsvReader
from consyn_jax.data.sources.huggingface_reader import HuggingFaceReader
from consyn_jax.data.sources.json_reader import JsonReader
from consyn_jax.data.sources.reader import Block, Position, Reader, Reading
from consyn_jax.data.sources.sample_reader import SampleReader
from consyn_jax.data.sources.text_reader import TextReader
from consyn_jax.data.sources.token_reader import TokenReader
from consyn_jax.errors import UserError, with_urls

# Readers are tried in this order, so the most general reader comes last.
READERS: dict[str, Reader] = {
    reader.kind: reader
    for reader in (
        SampleReader(),
        TokenReader(),
        HuggingFaceReader(),
        CsvReader(),
        JsonReader(),
        TextReader(),
    )
}


@dataclass(frozen=True)
class Source:
    """One input: a file, a dataset, a token store, or the sample.

    Attributes:
        name: path of the input; name and commit of a Hub dataset; or "sample".
        kind: type of the input, a key of `READERS`.
    """

    name: str
    kind: str

    @property
    def reader(self) -> Reader:
        """The reader of the source's type."""
        return READERS[self.kind]

    @property
    def shown(self) -> str:
        """Name for users and records; a file that is a copy from a bucket is named by its URL."""
        return with_urls(self.name)

    @cached_property
    def num_bytes(self) -> int:
        """Number of bytes to read, for progress; 0 for a dataset that is not downloaded yet.

        Raises:
            UserError: a file cannot be read.
        """
        try:
            return self.reader.size(self.name)
        except OSError as error:
            raise UserError(
                f"{self.name} can no longer be read: {error.strerror}. Restore the file, and do "
                "not change data while it is read."
            ) from error

    @property
    def files(self) -> tuple[Path, ...]:
        """The files whose bytes determine the data; empty if the name alone identifies it."""
        return self.reader.files(self.name)

    @property
    def is_store(self) -> bool:
        """Whether the source is a token store and not a file of tokens."""
        return isinstance(self.reader, TokenReader) and Path(self.name).is_dir()

    def blocks(self, start: Position, reading: Reading) -> Iterator[Block]:
        """Read the source's blocks from position `start` on.

        Raises:
            UserError: the source cannot be read; the message names the file and the fault.
        """
        return self.reader.blocks(self.name, start, reading)
