"""A path that `--data` matches, before its use is decided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from consyn_jax.data.sources.source import Source


@dataclass(frozen=True)
class Found:
    """A file, dataset or store that a name in `--data` matches.

    Attributes:
        source: the file, dataset or store.
        reason: why it cannot be used; "" if it can.
        inside: path relative to the given directory or glob; its own name if it was given itself.
        given: the name in `--data` that matched.
        is_named: whether the user gave its own path, not a directory or glob.
    """

    source: Source
    reason: str
    inside: Path
    given: str
    is_named: bool = False

    @property
    def is_used(self) -> bool:
        """Whether it is used, that is, `reason` is empty."""
        return not self.reason
