"""A source that matches a name in `--data`, and the reason if it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from consyn_jax.data.sources.source import Source


@dataclass(frozen=True)
class Found:
    """A file, dataset or store that a name in `--data` matches.

    Attributes:
        source: the file, dataset or store.
        reason: why the source cannot be used; "" if it can be used.
        inside: path relative to the given directory or glob; the file's own name if its path was
            given.
        given: the name in `--data` that the source matches.
        is_named: whether the user gave the path of the source itself, and not a directory or glob.
    """

    source: Source
    reason: str
    inside: Path
    given: str
    is_named: bool = False

    @property
    def is_used(self) -> bool:
        """Whether the source is used, that is, whether `reason` is empty."""
        return not self.reason
