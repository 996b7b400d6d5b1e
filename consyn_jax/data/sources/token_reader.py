"""The reader of tokenised data: token stores, and token files of other programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from consyn_jax.data.sources.reader import Block, Candidate, Position, Reader, Reading
from consyn_jax.data.store.manifest import is_store
from consyn_jax.data.store.token_files import PICKLES, TOKEN_SUFFIXES, UnusableError, read_head


class TokenReader(Reader):
    """Tokenised data. It needs no preparation, because training reads it in place."""

    kind, noun, unit = "sharded", "tokens", "store or file of tokens"
    suffixes = TOKEN_SUFFIXES

    def recognise(self, file: Candidate) -> str | None:
        """Recognise `.bin` and `.npy` files, and refuse pickles."""
        if file.path.suffix.lower() not in TOKEN_SUFFIXES + PICKLES:
            return None
        try:
            read_head(file.path)
        except UnusableError as fault:
            return str(fault)
        return ""

    def is_source(self, path: Path) -> bool:
        """Whether the path is a token store."""
        return path.is_dir() and is_store(path)

    def describe(self, name: str) -> str:
        """Return "a token store" or "a file of tokens"."""
        return "a token store" if Path(name).is_dir() else "a file of tokens"

    def blocks(self, name: str, start: Position, reading: Reading) -> Iterator[Block]:
        """Raise an error, because tokenised data needs no preparation."""
        raise ValueError(f"{name} is tokenised already.")
