"""The reader of `--data sample`: the texts of Python's `help()`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from consyn_jax.data.sources.reader import Block, Position, Reader, Reading
from consyn_jax.errors import UserError

SAMPLE = "sample"


class SampleReader(Reader):
    """The built-in sample of text."""

    kind, noun, unit = SAMPLE, "text", SAMPLE

    def files(self, name: str) -> tuple[Path, ...]:
        """Return no files, because the texts are in a module of Python."""
        return ()

    def size(self, name: str) -> int:
        """Return the size of the sample's texts in bytes."""
        return sum(len(text.encode()) for text in sample_texts())

    def identity(self, name: str, file_hash: Callable[[Path], str]) -> list[Any]:
        """Return the entry in the cache key: [kind, False, [hash of all texts]]."""
        return [SAMPLE, False, [hashlib.sha256("\0".join(sample_texts()).encode()).hexdigest()]]

    def blocks(self, name: str, start: Position, reading: Reading) -> Iterator[Block]:
        """Read all texts of the sample as one block of rows."""
        texts = sample_texts()[start[1] :]
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        end = (0, start[1] + len(texts))
        yield Block("rows", name, lines, start[1] + 1, 0, end, self.size(name))


def sample_texts() -> list[str]:
    """Return the documents of the sample: the topics of Python's `help()`.

    The documents are sorted by topic.

    Raises:
        UserError: this Python was installed without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise UserError(
            "--data sample needs the module pydoc_data, which this Python lacks. "
            "Give --data a file."
        ) from error
    return [topics[name] for name in sorted(topics)]
